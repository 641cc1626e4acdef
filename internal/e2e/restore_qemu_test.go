package e2e

import (
	"fmt"
	"strings"
	"testing"

	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// restored restores, and returns the name of the safety snapshot.
func (h *host) restored(args ...string) string {
	h.t.Helper()
	out := h.must(append([]string{"snapshot", "restore"}, args...)...)
	_, back, _ := strings.Cut(out, "vmsnap snapshot restore ")
	name, _, ok := strings.Cut(back, " goes back.")
	if !ok {
		h.t.Fatalf("nothing says how to go back: %s", out)
	}
	return name
}

// TestQEMURestore goes back and forth between the states of a VM with two disks,
// while it runs, after it was started again, and when it is stopped.
func TestQEMURestore(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "restore-"+q.Name, "root.qcow2", "data.qcow2")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		h.await(vm.name, "paused")
		covered := ledger{}
		for i, name := range []string{"one", "two", "three"} {
			vm.write(i + 1)
			h.must("snapshot", "create", vm.name, name, "--quiesce", "none")
			covered.cover(t, h.snapshot(vm.name+"/"+name))
		}
		vm.write(4)

		four := h.restored(vm.name + "/one")
		vm.holds(1, "restored to one")
		vm.write(5)
		h.launchesActive(vm, "restored to one")

		five := h.restored(vm.name + "/two")
		vm.holds(2, "restored to two")
		vm.kill()
		h.await(vm.name, "stopped")
		vm.start()
		h.await(vm.name, "paused")
		vm.holds(2, "restored to two, started again")

		h.restored(four)
		vm.holds(4, "back to the state before the first restore")
		vm.write(6)
		vm.kill()
		h.await(vm.name, "stopped")

		six := h.restored(vm.name + "/three")
		vm.start()
		h.await(vm.name, "paused")
		vm.holds(3, "restored to three when stopped")
		h.must("snapshot", "create", vm.name, "three-again", "--quiesce", "none")
		vm.write(7)
		h.must("snapshot", "restore", vm.name+"/three-again", "--no-safety-snapshot")
		vm.holds(3, "restored to a snapshot on the branch")
		h.launchesActive(vm, "in the end")

		for name, want := range map[string]int{vm.name + "/one": 1, vm.name + "/two": 2, vm.name + "/three": 3, four: 4, five: 5, six: 6} {
			s := h.snapshot(name)
			for _, d := range s.Disks {
				vm.imageHolds(d, want, name)
			}
		}
		covered.verify(t, q)
		vm.check("in the end")
		h.accounted(vm, "in the end")
	})
}

// launchesActive fails unless each launch path leads to the layer that QEMU
// writes to, and QEMU has no layer open that the disk does not lie on.
func (h *host) launchesActive(vm *still, when string) {
	h.t.Helper()
	g, err := blockdev.ReadGraph(h.ctx(), vm.own)
	if err != nil {
		h.t.Fatal(err)
	}
	used := map[string]bool{}
	for _, d := range g.Drives() {
		chain, err := g.Chain(d)
		if err != nil {
			h.t.Fatal(err)
		}
		for _, l := range chain {
			used[l.Filename] = true
		}
		launch, err := blockdev.StatPath(fmt.Sprintf("%s/%s.qcow2", vm.dir, d.Device))
		if err != nil {
			h.t.Fatal(err)
		}
		if active, err := blockdev.StatPath(chain[0].Filename); err != nil || active.FileID != launch.FileID {
			h.t.Errorf("%s: the launch path of %s does not lead to %s: %v", when, d.Device, chain[0].Filename, err)
		}
	}
	for _, n := range g.Nodes {
		if n.Driver == "file" && !used[n.Filename] {
			h.t.Errorf("%s: QEMU has %s open for nothing", when, n.Filename)
		}
	}
}

// TestQEMURestoreOfARunningGuest restores a booted guest, with all its disks and
// with one: its QEMU process stays, and it boots from what it is given.
func TestQEMURestoreOfARunningGuest(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q, Disks: []testvm.Disk{{Name: "root"}, {Name: "data"}}, NoReboot: true})
		h := newHost(t, g)
		put(t, g, "file", "at the snapshot")
		h.must("snapshot", "create", g.Name, "good", "--quiesce", "require")
		put(t, g, "file", "broken")
		pid := g.PID()
		plan := h.must("snapshot", "restore", g.Name+"/good", "--dry-run")
		for _, want := range []string{"QEMU runs on", "root", "data"} {
			if !strings.Contains(plan, want) {
				t.Errorf("the plan does not say %q:\n%s", want, plan)
			}
		}
		h.guestHolds(g, "broken") // the plan has changed nothing

		back := h.restored(g.Name + "/good")
		if err := g.AwaitBoot(t.Context(), 2); err != nil {
			t.Fatal(err)
		}
		h.guestHolds(g, "at the snapshot")
		if g.PID() != pid {
			t.Errorf("QEMU is another process: %d, was %d", g.PID(), pid)
		}
		thawed(t, g)

		put(t, g, "file", "kept on data")
		h.must("snapshot", "restore", back, "--disk", "root")
		if err := g.AwaitBoot(t.Context(), 3); err != nil {
			t.Fatal(err)
		}
		thawed(t, g)
		for disk, want := range map[string]string{"root": "broken", "data": "kept on data"} {
			if got, err := g.ReadFile(t.Context(), testvm.Mountpoint(disk)+"/file"); err != nil || string(got) != want {
				t.Errorf("%s holds %q, %v; want %q", disk, got, err, want)
			}
		}
		h.must("snapshot", "create", g.Name, "after", "--quiesce", "require")
		// -no-reboot holds again.
		if out, err := g.Exec(t.Context(), "reboot -f"); err == nil {
			t.Errorf("the guest goes on: %s", out)
		}
		h.await(g.Name, "stopped")
	})
}
