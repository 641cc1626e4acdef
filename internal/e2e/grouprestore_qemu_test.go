package e2e

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"

	"connectrpc.com/connect"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// TestQEMUAGroupGoesBack restores a group of VMs, one of them stopped, and has
// restores fail that one VM cannot come along with.
func TestQEMUAGroupGoesBack(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		b := newBench(t, q, "back-b")
		a, c := newStill(t, q, "back-a-"+q.Name, "root.qcow2"), newStill(t, q, "back-c-"+q.Name, "root.qcow2")
		for _, v := range []*still{a, c} {
			b.list(v.name, v.uuid)
		}
		b.signal(syscall.SIGHUP)
		for _, v := range []*still{a, c} {
			b.sees(eventLimit, v.name, inState(paused))
		}
		all := []*still{a, b.vm, c}
		write := func(value int) {
			for _, v := range all {
				v.write(value)
			}
		}
		hold := func(value int, when string) {
			t.Helper()
			for _, v := range all {
				v.holds(value, when)
				v.check(when)
			}
		}
		names := []string{a.name, b.vm.name, c.name}
		write(1)
		b.must(slices.Concat([]string{"snapshot", "create-group", "one"}, names, []string{"--quiesce", "none"})...)
		write(2)

		plan := b.must("snapshot", "restore-group", "one", "--dry-run")
		for _, name := range names {
			if !strings.Contains(plan, "VM "+name+":") {
				t.Errorf("the plan does not tell of %s:\n%s", name, plan)
			}
		}
		hold(2, "planned")

		// One VM does not come along: the others, whose disks are swapped, are
		// not kept waiting for it, and go on as they were.
		gate := b.r.hold("transaction", 1)
		ended := make(chan result, 1)
		go func() { ended <- b.run("snapshot", "restore-group", "one") }()
		gate.await(b.host)
		b.eventually(eventLimit, "the others have given up", func() error { return b.areIdle(a.name, c.name) })
		gate.release(pass)
		if r := <-ended; r.code != 8 || !strings.Contains(r.stderr, "has not swapped its disks") {
			t.Errorf("exit code %d: %s", r.code, r.stderr)
		}
		b.eventually(eventLimit, "all has ended", b.idle)
		hold(2, "one did not come along")

		// The daemon is killed while they wait for each other.
		gate = b.r.hold("transaction", 1)
		id := strings.TrimSpace(b.must("snapshot", "restore-group", "one", "--detach", "-o", "name"))
		gate.await(b.host)
		b.signal(syscall.SIGKILL)
		gate.release(swallow)
		b.start()
		b.fails(1, "", "operation", "watch", id)
		b.eventually(eventLimit, "all is recovered", b.idle)
		hold(2, "killed")

		if out := b.must("snapshot", "restore-group", "one"); !strings.Contains(out, "group one restored: ") {
			t.Errorf("it prints %s", out)
		}
		hold(1, "restored")
		write(3)
		a.kill()
		b.await(a.name, "stopped")
		b.must("snapshot", "restore-group", "one", "--no-safety-snapshot")
		a.start()
		hold(1, "restored, one of them stopped")
		for _, v := range all {
			b.launchesActive(v, "in the end")
		}

		b.await(a.name, "paused")
		b.must("snapshot", "delete", c.name+"/one", "--keep-layers")
		write(4)
		b.fails(4, "only "+a.name+", "+b.vm.name+" have their snapshot", "snapshot", "restore-group", "one")
		b.fails(4, `no group of snapshots is called "two"`, "snapshot", "restore-group", "two")
		hold(4, "refused")
		b.must("snapshot", "restore-group", "one", "--best-effort")
		a.holds(1, "by best effort")
		b.vm.holds(1, "by best effort")
		c.holds(4, "not in the group any more")
	})
}

// areIdle fails if an operation is at work on one of the VMs.
func (h *host) areIdle(names ...string) error {
	res, err := h.Operations().ListOperations(h.ctx(), connect.NewRequest(&vmsnapv1.ListOperationsRequest{Active: true}))
	if err != nil {
		return err
	}
	for _, o := range res.Msg.GetOperations() {
		if slices.Contains(names, o.GetVmName()) {
			return fmt.Errorf("operation %s on %s is %s", o.GetId(), o.GetVmName(), o.GetState())
		}
	}
	return nil
}
