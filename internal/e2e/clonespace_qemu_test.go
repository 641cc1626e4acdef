package e2e

import (
	"fmt"
	"strings"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// TestQEMUCloneWithoutSpace makes clones on a file system that is full, or runs
// full meanwhile. The error names the disk, what is needed, and what to do, nothing
// is left behind, and the same clone can be made when there is space.
func TestQEMUCloneWithoutSpace(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "clonespace-"+q.Name, "root.qcow2", "data.qcow2")
		h, gate := gatedHost(t, q, vm)
		vm.write(1)
		golden := vm.name + "/golden"
		h.must("snapshot", "create", vm.name, "golden", "--quiesce", "none")
		vm.write(2)
		dir := t.TempDir()
		sh(t, "mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", dir)
		t.Cleanup(func() { sh(t, "umount", dir) })
		file := dir + "/new.qcow2"
		disk := []string{"snapshot", "clone", golden, file, "--disk", "data"}
		machine := []string{"snapshot", "clone", golden, "other", "--dir", dir}
		const linked, data = 16 << 20, 64 << 10
		left := everything(t, vm.dir)
		for _, c := range []struct {
			what   string
			line   []string
			left   uint64 // bytes on the file system
			needed int
			device string
			gated  string // the command of qemu-img before which it runs full
		}{
			{"a linked disk", disk, linked - 4096, linked, "disk data", ""},
			{"a full disk", append(disk, "--full"), data - 4096, data, "disk data", ""},
			{"a linked VM", machine, 2*linked - 4096, 2 * linked, "disks root, data", ""},
			{"a full VM", append(machine, "--full"), 2*data - 4096, 2 * data, "disks root, data", ""},
			{"a linked disk, full meanwhile", disk, 0, linked, "disk data", "create"},
			{"a full disk, full meanwhile", append(disk, "--full"), data, data, "disk data", ""},
			{"a linked VM, full meanwhile", machine, 0, linked, "disk root", "create"},
		} {
			var free func()
			if c.gated == "create" {
				gate.hold(c.gated)
				m := h.meanwhile(c.line...)
				gate.await(h, c.gated)
				free = fill(t, dir, c.left)
				gate.release(c.gated)
				h.tellsSpace(c.what, m.end(), c.device, c.needed, dir)
			} else {
				free = fill(t, dir, c.left)
				h.tellsSpace(c.what, h.run(c.line...), c.device, c.needed, dir)
			}
			free()
			h.leftNothing(dir, c.what)
			if show := h.must("snapshot", "show", golden); strings.Contains(show, dir) {
				t.Errorf("%s: a clone is recorded that was not made:\n%s", c.what, show)
			}
		}
		if now := everything(t, vm.dir); fmt.Sprint(now) != fmt.Sprint(left) {
			t.Errorf("beside the origin are %q, were %q", now, left)
		}
		h.must(disk...)
		h.must(machine...)
		vm.imageHolds(snapshotDisk{Path: file, Format: "qcow2"}, 1, "the disk")
		vm.imageHolds(snapshotDisk{Path: dir + "/other-root.qcow2", Format: "qcow2"}, 1, "the VM")
		vm.holds(2, "the origin")
		vm.check("in the end")
	})
}

// tellsSpace fails unless a command ended for want of space, with all that an
// operator needs to know.
func (h *host) tellsSpace(what string, r result, device string, needed int, dir string) {
	h.t.Helper()
	for _, words := range []string{device, fmt.Sprintf("%d bytes", needed), dir, "make room"} {
		if r.code != 6 || !strings.Contains(r.stderr, words) {
			h.t.Errorf("%s: exit code %d, and %q is to be in: %s", what, r.code, words, r.stderr)
		}
	}
}
