package e2e

import (
	"strings"
	"syscall"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// TestQEMUPreview opens, keeps and leaves previews, of a VM that runs, that is
// started again meanwhile, and that is stopped, over restarts of the daemon.
func TestQEMUPreview(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		b := newBench(t, q, "preview")
		vm := b.vm
		covered := ledger{}
		for i, name := range []string{"one", "two"} {
			vm.write(i + 1)
			b.must("snapshot", "create", vm.name, name, "--quiesce", "none")
			covered.cover(t, b.snapshot(vm.name+"/"+name))
		}
		vm.write(3)
		b.letRun()
		b.fails(4, "runs no preview", "preview", "undo", vm.name)

		b.must("snapshot", "preview", vm.name+"/one", "--discard-running-state")
		vm.holds(1, "previewed")
		b.runs("previewed")
		b.launchesActive(vm, "previewed")
		vm.write(4)
		b.fails(11, "runs a preview of one", "snapshot", "create", vm.name)
		b.fails(11, "runs a preview of one", "snapshot", "restore", vm.name+"/two")
		b.signal(syscall.SIGKILL)
		b.start()
		if shown := b.must("preview", "show", vm.name); !strings.Contains(shown, "one") || !strings.Contains(shown, "isolated") {
			t.Errorf("shown is:\n%s", shown)
		}
		b.restart()
		vm.holds(4, "started again in the preview")
		b.must("preview", "undo", vm.name)
		vm.holds(3, "undone")
		b.launchesActive(vm, "undone")
		b.fails(4, "runs no preview", "preview", "show", vm.name)
		b.accounted(vm, "undone")
		if n := b.depth(); n != 3 {
			t.Errorf("each disk has %d layers after the undo, and had 3", n)
		}

		b.must("snapshot", "preview", vm.name+"/one", "--network", "connected")
		vm.holds(1, "previewed again")
		vm.write(5)
		b.must("preview", "commit", vm.name)
		vm.holds(5, "kept")
		b.restart()
		vm.holds(5, "kept, started again")
		before := b.newestBefore()
		for _, d := range b.snapshot(before).Disks {
			vm.imageHolds(d, 3, before)
		}

		vm.kill()
		b.await(vm.name, "stopped")
		b.must("snapshot", "preview", vm.name+"/two")
		b.restart()
		vm.holds(2, "previewed when stopped")
		vm.write(6)
		vm.kill()
		b.await(vm.name, "stopped")
		b.must("preview", "undo", vm.name)
		b.restart()
		vm.holds(5, "undone when stopped")
		b.must("snapshot", "create", vm.name, "after", "--quiesce", "none")
		covered.verify(t, q)
		vm.check("in the end")
		b.accounted(vm, "in the end")
	})
}

// depth is the number of layers of the deepest disk.
func (b *bench) depth() int {
	b.t.Helper()
	vm, err := b.host.vm(b.vm.name)
	if err != nil {
		b.t.Fatal(err)
	}
	most := 0
	for _, d := range vm.GetDisks() {
		most = max(most, len(d.GetLayers()))
	}
	return most
}

// newestBefore is the name of the newest automatic snapshot.
func (b *bench) newestBefore() string {
	b.t.Helper()
	for line := range strings.Lines(b.must("snapshot", "list", b.vm.name, "-o", "name")) {
		if name := strings.TrimSpace(line); strings.HasPrefix(name, b.vm.name+"/before-") {
			return name
		}
	}
	b.t.Fatal("there is no automatic snapshot")
	return ""
}

// TestQEMUPreviewIsIsolated has the network links taken down before the guest
// runs, and again when the VM was started in the preview.
func TestQEMUPreviewIsIsolated(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "isolated-"+q.Name, "root.qcow2")
		vm.kill()
		vm.args = append(vm.args, "-netdev", "user,id=lan", "-device", "virtio-net-pci,netdev=lan", "-nic", "user,model=e1000,id=wan")
		vm.start()
		b := &bench{vm: vm, r: newRelay(t, vm.dir+"/q1")}
		b.host = newHostOf(t, map[string]string{vm.name: vm.uuid})
		b.await(vm.name, "paused")
		b.must("snapshot", "create", vm.name, "one", "--quiesce", "none")
		b.letRun()

		second := b.r.hold("set_link", 2) // there are two devices
		c := b.meanwhile("snapshot", "preview", vm.name+"/one", "--discard-running-state")
		second.await(b.host)
		if st, err := vm.own.QueryStatus(b.ctx()); err != nil || st.Status == "running" {
			t.Errorf("the guest is %s before its links are down: %v", st.Status, err)
		}
		second.release(pass)
		if r := c.end(); r.code != 0 {
			t.Fatalf("preview: %d %s", r.code, r.stderr)
		}
		b.runs("previewed")

		vm.kill()
		b.signal(syscall.SIGSTOP)
		vm.start()
		b.r.close()
		b.r = newRelay(t, vm.dir+"/q1")
		again := b.r.hold("set_link", 2)
		b.signal(syscall.SIGCONT)
		again.await(b.host)
		again.release(pass)
		b.await(vm.name, "paused")

		up := b.r.hold("set_link", 2)
		c = b.meanwhile("preview", "commit", vm.name)
		up.await(b.host)
		up.release(pass)
		if r := c.end(); r.code != 0 {
			t.Fatalf("commit: %d %s", r.code, r.stderr)
		}
	})
}
