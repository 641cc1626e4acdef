package e2e

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// restart starts the VM by its unchanged command line, and puts a relay before
// it while the daemon cannot look.
func (b *bench) restart() {
	b.t.Helper()
	b.vm.kill()
	b.signal(syscall.SIGSTOP)
	b.vm.start()
	b.r.close()
	b.r = newRelay(b.t, b.vm.dir+"/q1")
	b.signal(syscall.SIGCONT)
	b.await(b.vm.name, "paused")
}

// TestQEMUTheVMDiesAtEveryStep kills QEMU at each moment of a snapshot.
func TestQEMUTheVMDiesAtEveryStep(t *testing.T) {
	t.Parallel() // it waits most of its time
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		b := newBench(t, q, "dies")
		for i, m := range moments {
			if m.past {
				b = newBench(t, q, "dies-past") // only a first snapshot opens the base anew
			}
			b.diesRound(m, i)
			if t.Failed() {
				t.FailNow()
			}
		}
	})
}

func (b *bench) diesRound(m moment, round int) {
	b.t.Helper()
	newest, name := round+1, fmt.Sprintf("s%d", round)
	b.vm.write(newest)
	c, _, resume := b.stopAt(b.r, m, b.vm.name, name, "--quiesce", "none")
	b.vm.kill()
	resume(pass)
	if r := c.end(); (r.code == 0) != m.past {
		b.t.Errorf("%s: exit code %d: %s\n%s", m, r.code, r.stderr, b.log)
	}
	if g := append(b.guards(), b.journal()...); len(g) > 0 {
		b.t.Errorf("%s: left over: %v", m, g)
	}
	b.restart()
	b.vm.holds(newest, m.String())
	if m.past {
		b.whole(b.vm, name, newest, newest, m.String())
	} else {
		b.fails(4, "", "snapshot", "show", b.vm.name+"/"+name)
	}
	b.noOrphans(b.vm, m.String())
	b.next("after-" + name)
}

// TestQEMUTheAnswerIsLost loses QEMU's answer to the transaction: with QEMU
// having executed it or not, at once or after it was stopped, and for good.
func TestQEMUTheAnswerIsLost(t *testing.T) {
	t.Parallel() // it waits most of its time
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		for name, c := range map[string]struct {
			how           passage
			stopped, dies bool
			taken         bool
		}{
			"executed":                    {how: loseAnswer, taken: true},
			"not executed":                {how: swallow},
			"executed after it continues": {how: disconnect, stopped: true, taken: true},
			"never sent, and continues":   {how: swallow, stopped: true},
			"stopped, and killed":         {how: disconnect, stopped: true, dies: true, taken: true},
		} {
			t.Run(name, func(t *testing.T) {
				b := newBench(t, q, "lost")
				b.vm.write(1)
				before := b.world(b.vm.own, b.vm.dir)
				g := b.r.hold("transaction", 1)
				create := b.create(b.vm.name, "x", "--quiesce", "none")
				g.await(b.host)
				id := b.operation(b.vm.name)
				if c.stopped {
					b.vm.signal(syscall.SIGSTOP)
				}
				g.release(c.how)
				if c.stopped {
					b.eventually(eventLimit, "the answer is lost", func() error {
						if !strings.Contains(b.log.String(), "outcome is unknown") {
							return fmt.Errorf("not yet")
						}
						return nil
					})
					if err := b.cancel(id); err == nil || !strings.Contains(err.Error(), "cannot be cancelled") {
						t.Errorf("cancel: %v", err)
					}
				}
				switch {
				case c.dies:
					b.vm.kill()
				case c.stopped:
					b.vm.signal(syscall.SIGCONT)
				}
				if r := create.end(); (r.code == 0) != c.taken {
					t.Errorf("exit code %d: %s", r.code, r.stderr)
				}
				if c.dies {
					b.restart()
				}
				if !c.taken {
					b.unchanged(b.vm, "x", before, name)
				} else {
					b.whole(b.vm, "x", 1, 1, name)
				}
				b.next("y")
			})
		}
	})
}

// signal sends QEMU a signal.
func (s *still) signal(sig syscall.Signal) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		s.t.Fatal(err)
	}
}

// TestQEMUTheDaemonStopsAtEveryStep stops the daemon as an administrator does,
// at each moment of a snapshot.
func TestQEMUTheDaemonStopsAtEveryStep(t *testing.T) {
	t.Parallel() // it waits most of its time
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		b := newBench(t, q, "stops")
		for i, m := range moments {
			if m.past {
				b = newBench(t, q, "stops-past")
			}
			b.stopsRound(m, i)
			if t.Failed() {
				t.FailNow()
			}
		}
	})
}

func (b *bench) stopsRound(m moment, round int) {
	b.t.Helper()
	atCut, newest, name := 2*round+1, 2*round+2, fmt.Sprintf("s%d", round)
	b.await(b.vm.name, "paused")
	b.vm.write(atCut)
	before := b.world(b.vm.own, b.vm.dir)
	c, _, resume := b.stopAt(b.r, m, b.vm.name, name, "--quiesce", "none")
	if err := b.daemon.Process.Signal(syscall.SIGTERM); err != nil {
		b.t.Fatal(err)
	}
	resume(pass)
	select {
	case <-b.exited:
	case <-time.After(eventLimit):
		b.t.Fatalf("%s: the daemon does not stop:\n%s", m, b.log)
	}
	b.start()
	r := c.end()
	if m.past && r.code != 0 {
		b.t.Errorf("%s: exit code %d: %s", m, r.code, r.stderr)
	}
	if r.code == 0 { // before the cut too, when it was faster than the signal
		b.vm.write(newest)
		b.whole(b.vm, name, atCut, newest, m.String())
	} else {
		b.unchanged(b.vm, name, before, m.String())
	}
}
