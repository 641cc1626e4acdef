package e2e

import (
	"syscall"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// TestQEMUPreviewDies kills the daemon, QEMU, or both at moments of opening a
// preview of a running VM, and of leaving it. The VM ends on the trial state with
// its preview open, or on the state before without one, to which it comes back from
// an open preview, with nothing left over.
func TestQEMUPreviewDies(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		b := newBench(t, q, "previewdies")
		b.vm.write(1)
		b.must("snapshot", "create", b.vm.name, "one", "--quiesce", "none")
		first, stride := share(t, q)
		round := 0
		for _, command := range []string{"blockdev-add", "stop", "system_reset", "cont"} {
			for _, verb := range []string{"snapshot", "undo"} {
				for _, how := range []string{"QEMU dies", "the daemon dies", "the daemon dies before it is sent", "both die"} {
					round++
					if !thorough() && round%(4*stride) != first%(4*stride) {
						continue
					}
					b.previewDies(verb, command, how, round)
					if t.Failed() {
						t.FailNow()
					}
				}
			}
		}
	})
}

func (b *bench) previewDies(verb, command, how string, round int) {
	b.t.Helper()
	when := verb + ", " + command + ", " + how
	b.letRun()
	old := round%100 + 10
	b.vm.write(old)
	line := []string{"snapshot", "preview", b.vm.name + "/one", "--discard-running-state"}
	trial := 1
	if verb == "undo" {
		b.must(line...)
		line, trial = []string{"preview", "undo", b.vm.name}, old+100
		b.vm.write(trial)
	}
	g := b.r.hold(command, 1)
	c := b.meanwhile(line...)
	g.await(b.host)
	switch how {
	case "QEMU dies":
		b.vm.kill()
		g.release(pass)
		b.restart()
	case "the daemon dies before it is sent":
		b.signal(syscall.SIGKILL)
		g.release(swallow)
		b.start()
	case "the daemon dies":
		b.signal(syscall.SIGKILL)
		g.release(disconnect)
		b.start()
	default:
		b.signal(syscall.SIGKILL)
		b.vm.kill()
		g.release(pass)
		b.start()
		b.eventually(eventLimit, when+": recovery ends", b.idle)
		b.restart()
	}
	b.eventually(eventLimit, when+": recovery ends", b.idle)
	c.end()
	state := b.oneOf(when, old, trial)
	open := b.run("preview", "show", b.vm.name).code == 0
	if open != (state == trial) {
		b.t.Errorf("%s: the VM has the state %d, and a preview is open: %t\nvmsnapd's log:\n%s", when, state, open, b.log)
	}
	b.launchesActive(b.vm, when)
	if open {
		b.must("preview", "undo", b.vm.name)
	}
	b.noOrphans(b.vm, when)
	b.vm.holds(old, when+", undone")
	b.vm.check(when)
	b.restart()
	b.vm.holds(old, when+", started again")
}
