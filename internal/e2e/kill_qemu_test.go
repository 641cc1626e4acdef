package e2e

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"connectrpc.com/connect"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// TestQEMUDaemonKilledAtEveryChange kills the daemon at the changes that a
// snapshot makes to files, lets the VM write on, kills QEMU too, and starts the
// VM by its unchanged command line, half the time before the daemon is back.
func TestQEMUDaemonKilledAtEveryChange(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "still-"+q.Name, "root.qcow2", "data.qcow2")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		h.killedAtEach(q, effects, nil, func(p killPoint, round int) bool { return h.killRound(vm, p, round) }, "linkat", "renameat", "fsync", "ioctl")
	})
}

// killRound is one snapshot under the tracer. It says whether the daemon was
// killed in it.
func (h *host) killRound(vm *still, p killPoint, round int) bool {
	h.t.Helper()
	when := p.String()
	name := fmt.Sprintf("s%d", round)
	atCut := round*2%250 + 1
	newest := atCut + 1
	h.await(vm.name, "paused")
	vm.write(atCut)
	tracer := h.killAt(p)
	h.run("snapshot", "create", vm.name, name, "--quiesce", "none", "--detach")
	killed := h.diedOr(tracer, h.idle)
	vm.write(newest) // the VM outlives the daemon, and writes on
	vm.kill()
	if killed && round%2 == 0 {
		h.start()
	}
	vm.start()
	if killed && round%2 == 1 {
		h.start()
	}
	vm.holds(newest, when)
	h.await(vm.name, "paused")
	h.settled(vm, name, atCut, newest, when)
	if h.t.Failed() {
		h.t.FailNow()
	}
	return killed
}

// idle fails while an operation runs.
func (h *host) idle() error {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), eventLimit)
	defer cancel()
	res, err := h.Operations().ListOperations(ctx, connect.NewRequest(&vmsnapv1.ListOperationsRequest{Active: true}))
	if err != nil {
		return err
	}
	for _, o := range res.Msg.GetOperations() {
		return fmt.Errorf("operation %s is %s", o.GetId(), o.GetState())
	}
	return nil
}

// settled verifies that no operation is left unfinished, that a snapshot which
// exists holds what was there at the cut, that the running VM holds what came
// after, and that nothing is left over.
func (h *host) settled(vm *still, name string, atCut, newest int, when string) {
	h.t.Helper()
	h.eventually(eventLimit, when+": recovery ends", h.idle)
	vm.holds(newest, when+", after recovery")
	vm.check(when)
	if r := h.run("snapshot", "show", vm.name+"/"+name, "-o", "json"); r.code == 0 {
		// A cut that may have been sent is adopted: when QEMU died before it
		// took the cut, the instant is that of its death. And the test's second
		// write may come before the cut.
		for _, d := range h.snapshot(vm.name + "/" + name).Disks {
			if vm.reads(d, newest) != nil {
				vm.imageHolds(d, atCut, when)
			}
		}
	} else if r.code != 4 {
		h.t.Errorf("%s: snapshot show: %d %s", when, r.code, r.stderr)
	}
	h.noOrphans(vm, when)
}

// noOrphans verifies that every image beside the VM's disks is a layer of a
// disk, one that a snapshot holds, or the launch path.
func (h *host) noOrphans(vm *still, when string) {
	h.t.Helper()
	h.eventually(eventLimit, when+": nothing is left over", func() error {
		shown, err := h.vm(vm.name)
		if err != nil {
			return err
		}
		known := map[string]bool{}
		for _, d := range shown.GetDisks() {
			if d.GetNotCuttable() != "" {
				return errors.New(d.GetNotCuttable())
			}
			known[d.GetLaunchPath()] = true
			for _, l := range d.GetLayers() {
				known[l.GetPath()] = true
			}
		}
		taken, err := h.Snapshots().ListSnapshots(h.ctx(), connect.NewRequest(&vmsnapv1.ListSnapshotsRequest{Vm: vm.name}))
		if err != nil {
			return err
		}
		for _, s := range taken.Msg.GetSnapshots() {
			for _, d := range s.GetDisks() {
				known[d.GetPath()] = true
			}
		}
		for _, f := range vm.images() {
			if !known[f] {
				return fmt.Errorf("%s is left over", f)
			}
		}
		return nil
	})
}
