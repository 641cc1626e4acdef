package e2e

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// TestQEMUAttach plugs a linked clone into a running VM, snapshots and restores it
// there, takes it out and plugs it in again.
func TestQEMUAttach(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "attach-"+q.Name, "root.qcow2")
		vm.kill()
		vm.args = append(vm.args, "-device", "virtio-scsi-pci,id=scsi0")
		vm.start()
		h, _ := gatedHost(t, q, vm)
		vm.write(1)
		h.must("snapshot", "create", vm.name, "golden", "--quiesce", "none")
		clone := vm.dir + "/clone.qcow2"
		h.must("snapshot", "clone", vm.name+"/golden", clone, "--disk", "root")

		r := h.run("disk", "attach", vm.name, clone, "--device", "second", "--bus", "scsi")
		if r.code != 0 || !strings.Contains(r.stderr, "attached-until-end") && !strings.Contains(r.stderr, "until this QEMU ends") {
			t.Fatalf("%+v\n%s", r, h.log)
		}
		vm.disks = append(vm.disks, "second")
		h.fails(13, "has a device", "disk", "attach", vm.name, clone, "--device", "second")
		qemuWrites(t, h, vm, "second", 7)
		h.must("snapshot", "create", vm.name, "both", "--quiesce", "none")
		qemuWrites(t, h, vm, "second", 8)
		for device, want := range map[string]int{"root": 1, "second": 7} {
			for _, d := range h.snapshot(vm.name + "/both").Disks {
				if d.Device == device {
					vm.imageHolds(d, want, "both: "+device)
				}
			}
		}
		h.fails(14, "in its launch command", "disk", "detach", vm.name, "root")
		h.must("disk", "detach", vm.name, "second")
		if err := h.hasDisks(vm.name, "root"); err != nil {
			t.Error(err)
		}
		g, err := blockdev.ReadGraph(h.ctx(), vm.own)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range g.Nodes {
			if strings.Contains(n.Filename, "clone") {
				t.Errorf("QEMU has %s open still", n.Filename)
			}
		}
		h.must("snapshot", "create", vm.name, "alone", "--quiesce", "none")
		if n := len(h.snapshot(vm.name + "/alone").Disks); n != 1 {
			t.Errorf("%d disks after it was taken out", n)
		}

		// Its layers are known again by what they are.
		h.must("disk", "attach", vm.name, clone, "--bus", "scsi")
		if err := h.hasDisks(vm.name, "root", "second"); err != nil {
			t.Error(err)
		}
		h.must("snapshot", "create", vm.name, "again", "--quiesce", "none")
		for _, d := range h.snapshot(vm.name + "/again").Disks {
			if d.Device == "second" {
				vm.imageHolds(d, 8, "again")
			}
		}
		h.must("snapshot", "delete", vm.name+"/both")
		h.fails(12, "lie on", "snapshot", "delete", vm.name+"/golden")
		for _, d := range h.snapshot(vm.name + "/again").Disks {
			if d.Device == "second" {
				vm.imageHolds(d, 8, "again, after a deletion")
			}
		}
		vm.kill()
		h.await(vm.name, "stopped")
		h.eventually(eventLimit, "it has ended with QEMU", func() error { return h.hasDisks(vm.name, "root") })
		vm.disks = vm.disks[:1]
		vm.start()
		h.await(vm.name, "paused")
		vm.holds(1, "started again")

		h.attachesVirtio(vm)
		h.refusesImages(vm)
		vm.check("in the end")
	})
}

// attachesVirtio plugs a disk into the PCI bus, of which a guest that does not run
// never lets go, and has another hand take one out.
func (h *host) attachesVirtio(vm *still) {
	h.t.Helper()
	img(h.t, vm.q, "create", "-q", "-f", "raw", vm.dir+"/third.raw", "8M")
	h.must("disk", "attach", vm.name, vm.dir+"/third.raw", "--format", "raw", "--device", "third", "--bus", "virtio")
	c := h.meanwhile("disk", "detach", vm.name, "third")
	id := h.operation(vm.name)
	h.awaitStep(id, "unplug")
	if err := h.cancel(id); err != nil {
		h.t.Error(err)
	}
	c.end()
	if c.code != 130 {
		h.t.Errorf("exit code %d: %s", c.code, c.stderr)
	}
	vm.kill()
	h.await(vm.name, "stopped")
	vm.start()
	h.await(vm.name, "paused")

	// A guest that lets go when nobody waits any more leaves the layers open.
	h.must("disk", "attach", vm.name, vm.dir+"/third.raw", "--format", "raw", "--device", "third", "--bus", "scsi")
	if err := vm.own.Execute(h.ctx(), "device_del", map[string]string{"id": "third"}, nil); err != nil {
		h.t.Fatal(err)
	}
	h.eventually(eventLimit, "it is seen that it is out", func() error { return h.hasDisks(vm.name, "root") })
	h.must("disk", "detach", vm.name, "third")
	l, err := blockdev.LockNoWriters(vm.dir + "/third.raw")
	if err != nil {
		h.t.Errorf("it is open still: %v", err)
	} else if err := l.Close(); err != nil {
		h.t.Error(err)
	}
}

// refusesImages tries to plug in what must not be.
func (h *host) refusesImages(vm *still) {
	h.t.Helper()
	img(h.t, vm.q, "create", "-q", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw", vm.dir+"/crafted.qcow2", "8M")
	h.fails(14, "not what it lay on", "disk", "attach", vm.name, vm.dir+"/crafted.qcow2")
	if err := errors.Join(os.Symlink(vm.dir+"/crafted.qcow2", vm.dir+"/link"), os.Mkdir(vm.dir+"/sub", 0o700)); err != nil {
		h.t.Fatal(err)
	}
	h.fails(7, "symbolic link", "disk", "attach", vm.name, vm.dir+"/link")
	h.fails(2, "neither a file", "disk", "attach", vm.name, vm.dir+"/sub")
	golden := h.snapshot(vm.name + "/golden").Disks[0]
	h.fails(12, "others lie on", "disk", "attach", vm.name, golden.Path)
	h.fails(13, "has a device root", "disk", "attach", vm.name, vm.dir+"/root.qcow2")
	if err := errors.Join(os.Remove(vm.dir+"/link"), os.Remove(vm.dir+"/crafted.qcow2"), os.Remove(vm.dir+"/sub")); err != nil {
		h.t.Error(err)
	}
}

// hasDisks fails unless a VM has these disks and no others.
func (h *host) hasDisks(name string, want ...string) error {
	vm, err := h.vm(name)
	if err != nil {
		return err
	}
	var has []string
	for _, d := range vm.GetDisks() {
		has = append(has, d.GetDevice())
	}
	if strings.Join(has, " ") != strings.Join(want, " ") {
		return fmt.Errorf("%s has the disks %v, want %v", name, has, want)
	}
	return nil
}

// qemuWrites writes a value to one disk, as the guest would.
func qemuWrites(t *testing.T, h *host, vm *still, device string, value int) {
	t.Helper()
	path := "/machine/peripheral/" + device
	if device == "root" {
		path += "/virtio-backend"
	}
	line := fmt.Sprintf(`qemu-io -d %s "write -f -P %d 0 64k"`, path, value)
	if err := vm.own.Execute(h.ctx(), "human-monitor-command", map[string]any{"command-line": line}, nil); err != nil {
		t.Fatal(err)
	}
}
