package e2e

import (
	"strings"
	"syscall"
	"testing"

	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

// restoreMoments are in all steps of a restore of two disks of a running VM.
var restoreMoments = []moment{
	{step: "overlays", command: "blockdev-add", nth: 3},
	{step: "overlays", command: "blockdev-add", nth: 7},
	{step: "swap", command: "stop", nth: 1},
	{step: "swap", command: "transaction", nth: 1},
	{step: "swap", command: "blockdev-reopen", nth: 1},
	{step: "reset", command: "system_reset", nth: 1, past: true},
	{step: "reset", command: "cont", nth: 1, past: true},
	{step: "settle", command: "query-block", nth: 4, past: true},
}

// TestQEMURestoreDies kills QEMU, the daemon, or both at each moment of a restore
// in place. The VM ends in the state before or in the restored one, with all its
// disks, runs, and comes up in the same state by its unchanged command line.
func TestQEMURestoreDies(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		b := newBench(t, q, "restoredies")
		b.vm.write(1)
		b.must("snapshot", "create", b.vm.name, "one", "--quiesce", "none")
		first, stride := share(t, q)
		round := 1
		for _, m := range restoreMoments {
			for _, how := range []string{"QEMU dies", "the daemon dies", "the daemon dies before it is sent", "both die", "both die, and the VM is back first"} {
				round++
				if !thorough() && round%stride != first%stride {
					continue // it is the other version's
				}
				b.restoreDies(m, how, round)
				if t.Failed() {
					t.FailNow()
				}
			}
		}
	})
}

func (b *bench) restoreDies(m moment, how string, round int) {
	b.t.Helper()
	when := m.String() + ", " + how
	b.letRun()
	old := round%250 + 2
	b.vm.write(old)
	g := b.r.hold(m.command, m.nth)
	c := b.meanwhile("snapshot", "restore", b.vm.name+"/one")
	g.await(b.host)
	b.awaitStep(b.operation(b.vm.name), m.step)
	passage := pass
	switch how {
	case "QEMU dies":
		b.vm.kill()
		g.release(pass)
		b.restart()
	case "the daemon dies before it is sent":
		passage = swallow
		fallthrough
	case "the daemon dies":
		b.signal(syscall.SIGKILL)
		g.release(passage)
		b.start()
		b.eventually(eventLimit, when+": recovery ends", b.idle)
		b.runs(when)
	default:
		b.signal(syscall.SIGKILL)
		b.vm.kill()
		g.release(pass)
		b.r.close()
		if how != "both die, and the VM is back first" || b.vm.tryStart() != nil {
			// A VM whose launch paths are being changed does not start.
			b.start()
			b.eventually(eventLimit, when+": recovery ends", b.idle)
			b.vm.start()
		} else {
			b.start()
		}
		b.eventually(eventLimit, when+": recovery ends", b.idle)
		b.vm.kill()
		b.await(b.vm.name, "stopped")
		b.restart()
	}
	b.eventually(eventLimit, when+": recovery ends", b.idle)
	c.end()
	state := b.oneOf(when, old, 1)
	if (state == 1) != m.past && how != "both die" {
		b.t.Errorf("%s: the VM has the state %d", when, state)
	}
	b.launchesActive(b.vm, when)
	b.noOrphans(b.vm, when)
	b.vm.check(when)
	b.restart()
	b.vm.holds(state, when+", started again")
}

// oneOf returns the value, of some, that all disks hold.
func (b *bench) oneOf(when string, values ...int) int {
	b.t.Helper()
	g, err := blockdev.ReadGraph(b.ctx(), b.vm.own)
	if err != nil {
		b.t.Fatal(err)
	}
	var errs []string
	for _, value := range values {
		all := true
		for _, d := range g.Drives() {
			chain, err := g.Chain(d)
			if err != nil {
				b.t.Fatal(err)
			}
			if err := b.vm.reads(snapshotDisk{Device: d.Device, Path: chain[0].Filename, Format: chain[0].Node.Driver}, value); err != nil {
				all = false
				errs = append(errs, err.Error())
			}
		}
		if all {
			return value
		}
	}
	b.t.Fatalf("%s: the disks hold none of the states %v:\n%s\nvmsnapd's log:\n%s", when, values, strings.Join(errs, "\n"), b.log)
	return 0
}

// letRun lets the guest run, which has nothing to boot from.
func (b *bench) letRun() {
	b.t.Helper()
	if err := b.vm.own.Cont(b.ctx()); err != nil {
		b.t.Fatal(err)
	}
	b.await(b.vm.name, "running")
}

// runs fails unless the guest runs.
func (b *bench) runs(when string) {
	b.t.Helper()
	st, err := b.vm.own.QueryStatus(b.ctx())
	if err != nil || st.Status != monitor.RunStateRunning {
		b.t.Errorf("%s: the VM is %s, %v\nvmsnapd's log:\n%s", when, st.Status, err, b.log)
	}
}

// meanwhile runs a command meanwhile.
func (h *host) meanwhile(args ...string) *creation {
	c := &creation{h: h, ended: make(chan struct{})}
	go func() {
		defer close(c.ended)
		c.result = h.run(args...)
	}()
	return c
}
