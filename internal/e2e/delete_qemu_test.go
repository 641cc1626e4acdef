package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// contents are what the snapshots of a VM, and its disks now, read as: a hash by
// snapshot and disk.
type contents map[string]string

// contentsOf reads all snapshots of a VM that can be restored, and its disks.
func (h *host) contentsOf(vm *still) contents {
	h.t.Helper()
	c := contents{}
	for _, name := range strings.Fields(h.must("snapshot", "list", vm.name, "-o", "name")) {
		for _, d := range h.snapshot(name).Disks {
			c[name+" "+d.Device] = h.hash(vm.q, d)
		}
	}
	for _, d := range h.disksOf(vm.name) {
		c["now "+d.Device] = h.hash(vm.q, snapshotDisk{Device: d.Device, Path: d.LaunchPath, Format: "qcow2"})
	}
	return c
}

func (h *host) hash(q testvm.QEMU, d snapshotDisk) string {
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

// without fails unless the contents are what they were, but for a snapshot that
// was deleted.
func (c contents) without(t *testing.T, before contents, when string, gone ...string) {
	t.Helper()
	for name, sum := range before {
		deleted := false
		for _, g := range gone {
			deleted = deleted || strings.HasPrefix(name, g+" ")
		}
		switch now, there := c[name]; {
		case deleted && there:
			t.Errorf("%s: %s is there still", when, name)
		case !deleted && !there:
			t.Errorf("%s: %s is gone", when, name)
		case !deleted && now != sum:
			t.Errorf("%s: %s reads as something else", when, name)
		}
	}
}

// grow makes snapshots with contents of their own: each writes to a place of its
// own and to one that all write to.
func (h *host) grow(vm *still, value int, names ...string) {
	h.t.Helper()
	for i, name := range names {
		vm.write(value + i)
		vm.fill(value+i, (value+i)%7+1)
		h.must("snapshot", "create", vm.name, name, "--quiesce", "none")
	}
}

// fill writes a value to one MiB of each disk.
func (s *still) fill(value, at int) {
	s.t.Helper()
	for _, d := range s.disks {
		line := fmt.Sprintf(`qemu-io -d /machine/peripheral/%s/virtio-backend "write -f -P %d %dM 1M"`, d, value, at)
		if err := s.own.Execute(s.t.Context(), "human-monitor-command", map[string]any{"command-line": line}, nil); err != nil {
			s.t.Fatal(err)
		}
	}
}

// TestQEMUDelete deletes snapshots at each position of a chain, while the VM runs,
// after it was started again, and when it is stopped. Everything else reads as
// before, and nothing is left over.
func TestQEMUDelete(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "delete-"+q.Name, "root.qcow2", "data.qcow2")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		h.await(vm.name, "paused")
		h.grow(vm, 1, "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
		vm.write(20)

		plan := h.must("snapshot", "delete", vm.name+"/three", "--dry-run", "-o", "wide")
		for _, want := range []string{"root", "data", "QEMU"} {
			if !strings.Contains(plan, want) {
				t.Errorf("the plan does not say %q:\n%s", want, plan)
			}
		}
		remove := func(when string, names ...string) {
			t.Helper()
			before := h.contentsOf(vm)
			args := []string{"snapshot", "delete"}
			var gone []string
			for _, n := range names {
				gone = append(gone, vm.name+"/"+n)
			}
			h.must(append(args, gone...)...)
			h.contentsOf(vm).without(t, before, when, gone...)
			h.accounted(vm, when)
			vm.check(when)
		}
		remove("a middle one, live", "three")
		remove("the first, live", "one")
		remove("the newest, live", "nine")
		h.launchesActive(vm, "live")
		vm.write(21)
		vm.kill()
		h.await(vm.name, "stopped")
		vm.start()
		h.await(vm.name, "paused")
		vm.holds(21, "started again")
		remove("two at once, after a start", "five", "six")
		h.launchesActive(vm, "after a start")
		vm.write(22)
		vm.kill()
		h.await(vm.name, "stopped")
		remove("the first, stopped", "two")
		remove("the newest, stopped", "eight")
		vm.start()
		h.await(vm.name, "paused")
		vm.holds(22, "started after deletions")
		remove("all that are left", "four", "seven")
		if n := h.layers(vm.name); !slices.Equal(n, []int{1, 1}) {
			t.Errorf("the disks have %d layers without a snapshot", n)
		}
		h.must("snapshot", "create", vm.name, "again", "--quiesce", "none")
		h.launchesActive(vm, "in the end")
		if f := h.findings(vm.name); len(f) != 0 {
			t.Errorf("the doctor finds %+v", f)
		}
	})
}
