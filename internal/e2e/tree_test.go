package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// tree is what a VM's snapshots, its disks now, and clones of them are known to
// hold: a hash by what it is of.
type tree struct {
	h    *host
	vm   *still
	want map[string]string
	n    int  // writes
	bare bool // its file system has no immutable flag
}

func newTree(h *host, vm *still) *tree { return &tree{h: h, vm: vm, want: map[string]string{}} }

// write writes to a place of each disk that is its own, and to one that all
// writes go to.
func (k *tree) write() {
	k.h.t.Helper()
	k.writeAt("0 64k", fmt.Sprintf("%dk 192k", 64+(k.n+1)*192%7000))
}

// writeAt writes what was not written before to places of each disk: their
// beginnings and lengths.
func (k *tree) writeAt(places ...string) {
	k.h.t.Helper()
	k.n++
	for _, d := range k.vm.disks {
		for _, where := range places {
			line := fmt.Sprintf(`qemu-io -d /machine/peripheral/%s/virtio-backend "write -f -P %d %s"`, d, k.n%250+1, where)
			if err := k.vm.own.Execute(k.h.ctx(), "human-monitor-command", map[string]any{"command-line": line}, nil); err != nil {
				k.h.t.Fatal(err)
			}
		}
	}
	k.look()
}

// look takes what the disks hold now for what they should.
func (k *tree) look() {
	k.h.t.Helper()
	for name, sum := range k.now() {
		k.want[name] = sum
	}
}

// now returns what the disks hold.
func (k *tree) now() map[string]string {
	k.h.t.Helper()
	c := map[string]string{}
	for _, d := range k.vm.disks {
		c["now "+d] = hash(k.h, k.vm.q, snapshotDisk{Device: d, Path: k.vm.dir + "/" + d + ".qcow2", Format: "qcow2"})
	}
	return c
}

// take takes a snapshot: it is to hold what the disks hold now.
func (k *tree) take(name string) {
	k.h.t.Helper()
	k.h.must("snapshot", "create", k.vm.name, name, "--quiesce", "none")
	k.taken(name)
}

func (k *tree) taken(name string) {
	for _, d := range k.vm.disks {
		k.want[k.vm.name+"/"+name+" "+d] = k.want["now "+d]
	}
}

// grow writes and takes snapshots.
func (k *tree) grow(names ...string) {
	k.h.t.Helper()
	for _, name := range names {
		k.write()
		k.take(name)
	}
}

// names returns the snapshots that there should be.
func (k *tree) names() []string {
	var names []string
	for what := range k.want {
		if name, _, _ := strings.Cut(what, " "); strings.Contains(name, "/") && !strings.HasPrefix(name, "/") {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// gone says that snapshots were deleted.
func (k *tree) gone(names ...string) {
	for _, name := range names {
		maps.DeleteFunc(k.want, func(what, _ string) bool { return strings.HasPrefix(what, name+" ") })
	}
}

// verify fails unless everything that there is holds what it should, and nothing
// else is there.
func (k *tree) verify(when string) {
	t := k.h.t
	t.Helper()
	is := k.now()
	for _, name := range strings.Fields(k.h.must("snapshot", "list", k.vm.name, "-o", "name")) {
		for _, d := range k.h.snapshot(name).Disks {
			is[name+" "+d.Device] = hash(k.h, k.vm.q, d)
		}
	}
	for what := range k.want {
		if strings.HasPrefix(what, "/") { // a clone
			is[what] = hash(k.h, k.vm.q, snapshotDisk{Device: "clone", Path: what, Format: "qcow2"})
		}
	}
	for _, what := range slices.Sorted(maps.Keys(k.want)) {
		if sum, there := is[what]; !there {
			t.Errorf("%s: %s is gone", when, what)
		} else if sum != k.want[what] {
			t.Errorf("%s: %s holds something else than it did", when, what)
		}
	}
	for what := range is {
		if _, wanted := k.want[what]; !wanted {
			t.Errorf("%s: %s should not be there", when, what)
		}
	}
	k.h.accounted(k.vm, when)
	k.vm.check(when)
	if !k.bare {
		k.protected(when)
	}
	if t.Failed() {
		t.Fatalf("%s; vmsnapd's log:\n%s", when, k.h.log)
	}
}

// protected fails unless exactly the layers that others lie on, or that a snapshot
// is restored from, are immutable.
func (k *tree) protected(when string) {
	t := k.h.t
	t.Helper()
	db := k.h.database()
	defer func() { _ = db.Close() }()
	rows, err := db.QueryContext(k.h.ctx(), "SELECT path, covered FROM layers")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		var path string
		var covered bool
		if err := rows.Scan(&path, &covered); err != nil {
			t.Fatal(err)
		}
		if _, immutable := fileOf(t, path); immutable != covered {
			t.Errorf("%s: the layer %s is covered: %v, immutable: %v", when, path, covered, immutable)
		}
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
}

// hash returns what an image holds, with all below it.
func hash(h *host, q testvm.QEMU, d snapshotDisk) string {
	h.t.Helper()
	path := raw(h.t, q, d)
	data, err := os.ReadFile(path)
	if err != nil {
		h.t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		h.t.Fatal(err)
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:8])
}
