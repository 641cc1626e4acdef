package e2e

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// records are what a catalog knows of VMs.
type records struct {
	VMs       []catalog.VM
	Disks     []catalog.Disk
	Layers    []catalog.Layer
	Snapshots []catalog.Snapshot
}

// recordsIn reads the catalog of a state directory whose daemon has ended.
func (h *host) recordsIn(dir string) (r records) {
	h.t.Helper()
	c, err := catalog.Open(h.ctx(), dir, hclog.NewNullLogger())
	if err != nil {
		h.t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	must := func(err error) {
		h.t.Helper()
		if err != nil {
			h.t.Fatal(err)
		}
	}
	r.VMs, err = c.VMs(h.ctx())
	must(err)
	for _, v := range r.VMs {
		of := func(ctx context.Context) {
			disks, err := c.Disks(ctx, v.ID)
			must(err)
			layers, err := c.Layers(ctx, v.ID)
			must(err)
			snapshots, err := c.Snapshots(ctx, v.ID)
			must(err)
			r.Disks, r.Layers, r.Snapshots = append(r.Disks, disks...), append(r.Layers, layers...), append(r.Snapshots, snapshots...)
		}
		of(h.ctx())
	}
	return r
}

// lose ends the daemon, moves its catalog away and starts it with an empty one.
func (h *host) lose() (away string) {
	h.t.Helper()
	h.signal(syscall.SIGTERM)
	away = filepath.Join(h.t.TempDir(), "lost")
	if err := os.Rename(h.path("state"), away); err != nil {
		h.t.Fatal(err)
	}
	h.start()
	return away
}

// TestQEMURebuildsALostCatalog loses the catalog of a VM with branches, memory and
// renamed snapshots, while it runs and when it is stopped.
func TestQEMURebuildsALostCatalog(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "lost-"+q.Name, "root.qcow2", "data.qcow2")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		h.await(vm.name, "paused")
		vm.write(1)
		h.must("snapshot", "create", vm.name, "one", "--quiesce", "none", "--label", "a=<b>", "--description", "the first")
		vm.write(2)
		h.must("snapshot", "create", vm.name, "two", "--quiesce", "none", "--exclude", "data")
		h.must("snapshot", "rename", vm.name+"/two", "second")
		h.must("snapshot", "restore", vm.name+"/one")
		vm.write(3)
		h.must("snapshot", "create", vm.name, "three", "--memory")
		vm.kill()
		h.await(vm.name, "stopped")
		vm.start()
		h.await(vm.name, "paused")
		tree := h.must("snapshot", "list", vm.name, "--tree", "--no-header")
		if f := h.findings(vm.name); len(f) != 0 {
			t.Errorf("before: %+v", f)
		}
		for _, running := range []bool{true, false} {
			if !running {
				vm.kill()
				h.await(vm.name, "stopped")
			}
			away := h.lose()
			args := []string{"doctor", "--rebuild"}
			if running {
				h.await(vm.name, "paused") // its directories are known
			} else {
				args = append(args, "--dir", vm.dir)
			}
			if out := h.must(args...); !strings.Contains(out, vm.name+" is in the catalog again, with 4 snapshots") || strings.Contains(out, "Left out") {
				t.Errorf("running %v: %s", running, out)
			}
			if running {
				h.await(vm.name, "paused")
			} else {
				h.await(vm.name, "stopped")
			}
			if got := h.must("snapshot", "list", vm.name, "--tree", "--no-header"); normalTree(got) != normalTree(tree) {
				t.Errorf("running %v: the tree is\n%s\nand not\n%s", running, got, tree)
			}
			if f := h.findings(vm.name, "--deep"); len(f) != 0 {
				t.Errorf("running %v: %+v", running, f)
			}
			if out := h.must("doctor", "--rebuild", "--dir", vm.dir); !strings.Contains(out, "Nothing was found") || !strings.Contains(out, "the catalog knows it") {
				t.Errorf("once more: %s", out)
			}
			h.signal(syscall.SIGTERM)
			lost, got := h.recordsIn(away), h.recordsIn(h.path("state"))
			if diff := cmp.Diff(lost, got, cmpopts.IgnoreFields(catalog.VM{}, "LastSeen", "Stopped")); diff != "" {
				t.Errorf("running %v: the catalog is another one (-lost +rebuilt):\n%s", running, diff)
			}
			h.start()
		}
		vm.start()
		h.await(vm.name, "paused")
		vm.holds(3, "in the end")
		h.must("snapshot", "preview", vm.name+"/one")
		if f := h.findings(vm.name); len(f) != 0 {
			t.Errorf("in a preview: %+v", f)
		}
		if tree := h.must("snapshot", "list", vm.name, "--tree"); !strings.Contains(tree, "you are here, in a preview") {
			t.Errorf("in a preview:\n%s", tree)
		}
		h.lose()
		h.await(vm.name, "paused")
		h.must("doctor", "--rebuild")
		h.await(vm.name, "paused")
		h.must("preview", "undo", vm.name)
		vm.holds(3, "after the preview")
		h.must("snapshot", "create", vm.name, "four", "--quiesce", "none")
		if f := h.findings(vm.name); len(f) != 0 {
			t.Errorf("in the end: %+v", f)
		}
	})
}

// normalTree leaves out the columns that change: times and sizes.
func normalTree(text string) string {
	var names []string
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(strings.TrimRight(line, "\n"), "  c")
		line, _, _ = strings.Cut(line, "  m")
		names = append(names, strings.TrimRight(line, " "))
	}
	return strings.Join(names, "\n")
}
