package e2e

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

// torment is a kind of operation on a VM with the snapshot "one", whose disks
// hold 1. The operation begins when they hold old, and is to be killed.
type torment struct {
	name  string
	ready func(b *bench, old int)              // nil: there is nothing to do first
	args  func(vm string, old int) []string    // of vmsnap
	ends  func(b *bench, old int, when string) // verifies what it came to
}

// trial is what the disks hold in a preview of "one" that was written to.
const trial = 254

var torments = []torment{
	{
		name: "snapshot",
		args: func(vm string, old int) []string {
			return []string{"snapshot", "create", vm, fmt.Sprint("s", old), "--quiesce", "none"}
		},
		ends: func(b *bench, old int, when string) {
			b.vm.holds(old, when)
			name := fmt.Sprint(b.vm.name, "/s", old)
			if b.run("snapshot", "show", name).code == 0 {
				for _, d := range b.snapshot(name).Disks {
					b.vm.imageHolds(d, old, when)
				}
			}
		},
	}, {
		name: "restore",
		args: func(vm string, _ int) []string { return []string{"snapshot", "restore", vm + "/one"} },
		ends: func(b *bench, old int, when string) { b.oneOf(when, old, 1) },
	}, {
		name: "preview",
		args: func(vm string, _ int) []string {
			return []string{"snapshot", "preview", vm + "/one", "--discard-running-state"}
		},
		ends: func(b *bench, old int, when string) { b.leavesPreview(old, 1, when) },
	}, {
		name:  "preview undo",
		ready: (*bench).opensPreview,
		args:  func(vm string, _ int) []string { return []string{"preview", "undo", vm} },
		ends:  func(b *bench, old int, when string) { b.leavesPreview(old, trial, when) },
	}, {
		name:  "preview commit",
		ready: (*bench).opensPreview,
		args:  func(vm string, _ int) []string { return []string{"preview", "commit", vm} },
		ends: func(b *bench, _ int, when string) {
			b.vm.holds(trial, when)
			if b.previews() {
				b.must("preview", "commit", b.vm.name)
			}
			b.vm.holds(trial, when+", kept")
		},
	}, {
		name: "delete",
		ready: func(b *bench, old int) {
			b.must("snapshot", "create", b.vm.name, fmt.Sprint("d", old), "--quiesce", "none")
			b.vm.write(newer)
		},
		args: func(vm string, old int) []string {
			return []string{"snapshot", "delete", fmt.Sprint(vm, "/d", old)}
		},
		ends: func(b *bench, old int, when string) {
			b.vm.holds(newer, when)
			name := fmt.Sprint(b.vm.name, "/d", old)
			if r := b.run("snapshot", "show", name, "-o", "json"); r.code == 0 && strings.Contains(r.stdout, `"state": "valid"`) {
				for _, d := range b.snapshot(name).Disks {
					b.vm.imageHolds(d, old, when+": it is offered still")
				}
			}
		},
	},
}

// newer is what the disks hold since the snapshot that is deleted.
const newer = 253

// opensPreview opens a preview of "one" and writes to it.
func (b *bench) opensPreview(int) {
	b.t.Helper()
	b.must("snapshot", "preview", b.vm.name+"/one", "--discard-running-state")
	b.vm.write(trial)
}

func (b *bench) previews() bool {
	b.t.Helper()
	return b.run("preview", "show", b.vm.name).code == 0
}

// leavesPreview verifies that the disks hold previewed if a preview is open, and
// old if none is or once it is undone.
func (b *bench) leavesPreview(old, previewed int, when string) {
	b.t.Helper()
	if !b.previews() {
		b.vm.holds(old, when+", no preview")
		return
	}
	b.vm.holds(previewed, when+", in the preview")
	b.must("preview", "undo", b.vm.name)
	b.vm.holds(old, when+", undone")
}

// TestQEMUTortureOperations kills the daemon, QEMU, or both, in operations of each kind:
// the daemon before each command that changes something in QEMU and behind it,
// and all of them at random moments. Each time the disks hold what the operation
// began with or what it leads to, the guest runs if QEMU does, and nothing is
// left over. Without -torture.rounds there is one kill for each QEMU.
func TestQEMUTortureOperations(t *testing.T) {
	seed := seedOf(t)
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		random := rand.New(rand.NewPCG(seed, uint64(len(q.Name))))
		chosen := random.IntN(len(torments))
		for i, kind := range torments {
			if !thorough() && i != chosen {
				continue
			}
			t.Run(kind.name, func(t *testing.T) {
				b := newBench(t, q, "torment")
				b.vm.write(1)
				b.must("snapshot", "create", b.vm.name, "one", "--quiesce", "none")
				b.tormentAll(kind, random)
			})
		}
	})
}

func (b *bench) tormentAll(kind torment, random *rand.Rand) {
	b.t.Helper()
	round := 1
	strike := func(p point) (struck bool) {
		round++
		struck = b.torment(kind, p, round%250+2)
		if b.t.Failed() {
			b.t.FailNow()
		}
		return struck
	}
	if !thorough() {
		strike(atCommands(1 + random.IntN(10))[random.IntN(2)])
		return
	}
	for n, struck := 1, true; struck; n++ {
		for _, p := range atCommands(n) {
			struck = strike(p)
		}
	}
	commands := round
	for range *tortureRounds / len(torments) {
		strike(atRandom(random))
	}
	b.t.Logf("%d rounds at commands, %d at random", commands-1, round-commands)
}

// torment is one operation that is killed.
func (b *bench) torment(kind torment, p point, old int) (struck bool) {
	b.t.Helper()
	when := fmt.Sprintf("%s of state %d, %s", kind.name, old, p)
	if st, err := b.vm.own.QueryStatus(b.ctx()); err != nil {
		b.t.Fatal(err)
	} else if st.Status != monitor.RunStateRunning {
		b.letRun()
	}
	b.vm.write(old)
	if kind.ready != nil {
		kind.ready(b, old)
	}
	struck = b.strike(p, when, kind.args(b.vm.name, old)...)
	if struck && !p.qemu {
		b.runs(when)
	}
	kind.ends(b, old, when)
	b.launchesActive(b.vm, when)
	b.noOrphans(b.vm, when)
	b.vm.check(when)
	if left := b.journal(); len(left) > 0 {
		b.t.Errorf("%s: the journal holds %v", when, left)
	}
	for _, d := range b.snapshot(b.vm.name + "/one").Disks { // it is there, or this fails
		b.vm.imageHolds(d, 1, when+": an acknowledged snapshot")
	}
	tally.add("operations of a VM whose state is the one before or the one after", 1)
	return struck
}
