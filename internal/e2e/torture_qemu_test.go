package e2e

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// quickRounds is what the tests of every change can afford.
const quickRounds = 4

var (
	tortureRounds = flag.Int("torture.rounds", quickRounds, "how often the torture tests kill on each QEMU; with more than the default, every loop over steps makes all its rounds")
	tortureSeed   = flag.Uint64("torture.seed", 0, "seed of the torture test; 0 takes one from the clock")
)

// thorough is whether loops make all their rounds.
func thorough() bool { return *tortureRounds > quickRounds }

// TestQEMUTorture kills the daemon, QEMU or both at random moments of a
// snapshot, starts them again in random order, and expects the newest content
// and nothing left over each time.
func TestQEMUTorture(t *testing.T) {
	seed := seedOf(t)
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		random := rand.New(rand.NewPCG(seed, 0))
		vm := newStill(t, q, "torture-"+q.Name, "root.qcow2", "data.qcow2")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		daemons, machines := 0, 0
		for round := range *tortureRounds {
			killDaemon, killVM := random.IntN(3) > 0, random.IntN(2) > 0
			delay := time.Duration(random.IntN(60_000)) * time.Microsecond
			when := fmt.Sprintf("round %d: daemon %v, QEMU %v after %s", round, killDaemon, killVM, delay)
			atCut := round*2%250 + 1
			newest := atCut + 1
			name := fmt.Sprintf("s%d", round)
			h.await(vm.name, "paused")
			vm.write(atCut)
			h.run("snapshot", "create", vm.name, name, "--quiesce", "none", "--detach")
			<-time.After(delay)
			if killDaemon {
				h.signal(syscall.SIGKILL)
				daemons++
			}
			if killVM {
				vm.kill()
				vm.start()
				vm.holds(atCut, when+", at once")
				machines++
			}
			vm.write(newest)
			if killDaemon {
				h.start()
			}
			h.await(vm.name, "paused")
			h.settled(vm, name, atCut, newest, when)
			vm.kill() // and whatever was recovered has to last
			vm.start()
			vm.holds(newest, when+", started again")
			if t.Failed() {
				t.FailNow()
			}
		}
		tally.add("kills of the daemon", daemons)
		tally.add("kills of QEMU", machines)
		t.Logf("%d rounds, daemon killed %d times, QEMU %d times", *tortureRounds, daemons, machines)
	})
}
