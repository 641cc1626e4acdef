package e2e

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// moment is a point in a snapshot of two disks, without a freeze, at which it
// can be stopped: by a command to QEMU, or by a write to the catalog.
type moment struct {
	step    string
	command string
	nth     int
	locked  bool // the command is let go, and the catalog locked before
	past    bool // past the point of no return
}

func (m moment) String() string {
	kind := "at"
	if m.locked {
		kind = "at the catalog after"
	}
	return fmt.Sprintf("in %s, %s %s %d", m.step, kind, m.command, m.nth)
}

// moments are in all steps of the snapshot.
var moments = []moment{
	{step: "preflight", command: "query-named-block-nodes", nth: 1},
	{step: "overlays", command: "blockdev-add", nth: 1},
	{step: "overlays", command: "blockdev-add", nth: 2},
	{step: "overlays", command: "blockdev-add", nth: 4},
	{step: "cut", command: "blockdev-add", nth: 4, locked: true},
	{step: "cut", command: "transaction", nth: 1, past: true},
	{step: "settle", command: "blockdev-reopen", nth: 2, past: true},
	{step: "commit", command: "blockdev-reopen", nth: 2, locked: true, past: true},
}

// stopAt starts a snapshot and stops it at a moment. resume lets it go on.
func (h *host) stopAt(r *relay, m moment, vm string, args ...string) (c *creation, id string, resume func(passage)) {
	h.t.Helper()
	g := r.hold(m.command, m.nth)
	c = h.create(append([]string{vm}, args...)...)
	g.await(h)
	id = h.operation(vm)
	if !m.locked {
		h.awaitStep(id, m.step)
		return c, id, g.release
	}
	unlock := h.lockCatalog()
	g.release(pass)
	h.awaitStep(id, m.step)
	return c, id, func(passage) { unlock() }
}

func TestQEMUCancelAtEveryStep(t *testing.T) {
	t.Parallel() // it waits most of its time
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vms, relays, h := relayed(t, q, "cancel-"+q.Name)
		for i, m := range moments {
			n := m.vm()
			h.cancelRound(vms[n], relays[n], m, i)
			if t.Failed() {
				t.FailNow()
			}
		}
	})
}

// TestQEMUCancelWhileFormatting cancels while qemu-img writes a header.
func TestQEMUCancelWhileFormatting(t *testing.T) {
	testvm.OnOneQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "cancelformat", "root.qcow2", "data.qcow2")
		h, g := gatedHost(t, q, vm)
		vm.write(1)
		before := h.world(vm.own, vm.dir)
		g.hold("create")
		c := h.create(vm.name, "x", "--quiesce", "none")
		g.await(h, "create")
		if err := h.cancel(h.operation(vm.name)); err != nil {
			t.Error(err)
		}
		if got := c.end(); got.code != 130 {
			t.Errorf("exit code %d: %s", got.code, got.stderr)
		}
		h.unchanged(vm, "x", before, "cancelled while formatting")
		g.release("create")
		h.must("snapshot", "create", vm.name, "x", "--quiesce", "none")
		vm.holds(1, "after a snapshot")
	})
}

// relayed starts four VMs behind relays: see moment.vm.
func relayed(t *testing.T, q testvm.QEMU, name string) ([]*still, []*relay, *host) {
	t.Helper()
	var vms []*still
	var relays []*relay
	uuids := map[string]string{}
	for i := range 4 {
		vm := newStill(t, q, fmt.Sprintf("%s-%d", name, i), "root.qcow2", "data.qcow2")
		vms = append(vms, vm)
		relays = append(relays, newRelay(t, vm.dir+"/q1"))
		uuids[vm.name] = vm.uuid
	}
	return vms, relays, newHostOf(t, uuids)
}

// vm is the number of the VM that a moment is tried on. What is past the cut
// has one of its own, since only its first snapshot opens the base anew.
func (m moment) vm() int {
	if !m.past {
		return 0
	}
	return map[string]int{"cut": 1, "settle": 2, "commit": 3}[m.step]
}

// cancelRound cancels a snapshot at a moment, and expects that nothing came of
// it, or all.
func (h *host) cancelRound(vm *still, r *relay, m moment, round int) {
	h.t.Helper()
	atCut, newest := 2*round+1, 2*round+2
	name := fmt.Sprintf("s%d", round)
	h.await(vm.name, "paused")
	vm.write(atCut)
	before := h.world(vm.own, vm.dir)
	c, id, resume := h.stopAt(r, m, vm.name, name, "--quiesce", "none")
	err := h.cancel(id)
	resume(pass)
	got := c.end()
	if m.past {
		if err == nil || !strings.Contains(err.Error(), "cannot be cancelled") || got.code != 0 {
			h.t.Fatalf("%s: cancel: %v; exit code %d: %s", m, err, got.code, got.stderr)
		}
		vm.write(newest)
		h.whole(vm, name, atCut, newest, m.String())
		return
	}
	if err != nil || got.code != 130 {
		h.t.Fatalf("%s: cancel: %v; exit code %d, want 130: %s\n%s", m, err, got.code, got.stderr, h.log)
	}
	h.unchanged(vm, name, before, m.String())
	vm.write(newest)
}

// unchanged verifies that a snapshot did not come about and left nothing.
func (h *host) unchanged(vm *still, name string, before world, when string) {
	h.t.Helper()
	if diff := cmp.Diff(before, h.world(vm.session(), vm.dir)); diff != "" {
		h.t.Errorf("%s: before (-) and after (+):\n%s\nvmsnapd's log:\n%s", when, diff, h.log)
	}
	h.fails(4, "", "snapshot", "show", vm.name+"/"+name)
	if err := h.idle(); err != nil {
		h.t.Errorf("%s: %v", when, err)
	}
}

// whole verifies that a snapshot exists with all disks and their content, that
// the VM holds what came after, and that no file is left over.
func (h *host) whole(vm *still, name string, atCut, newest int, when string) {
	h.t.Helper()
	s := h.snapshot(vm.name + "/" + name)
	if len(s.Disks) != len(vm.disks) || s.Partial {
		h.t.Errorf("%s: snapshot %+v", when, s)
	}
	for _, d := range s.Disks {
		vm.imageHolds(d, atCut, when)
	}
	vm.holds(newest, when)
	vm.check(when)
	h.noOrphans(vm, when)
	if j := h.journal(); len(j) > 0 {
		h.t.Errorf("%s: journal %v", when, j)
	}
	if g := h.guards(); len(g) > 0 {
		h.t.Errorf("%s: processes %v", when, g)
	}
}
