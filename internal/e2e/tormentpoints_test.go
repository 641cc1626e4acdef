package e2e

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"syscall"
	"time"
)

// harmless are the commands that change nothing, beside those that begin with
// "query-".
var harmless = []string{"qmp_capabilities", "qom-get", "qom-list", "qom-list-properties", "device-list-properties"}

// changes reports whether a command to QEMU changes anything.
func changes(line string) bool {
	var c struct {
		Execute string `json:"execute"`
	}
	if json.Unmarshal([]byte(line), &c) != nil || c.Execute == "" || strings.HasPrefix(c.Execute, "query-") {
		return false
	}
	for _, h := range harmless {
		if c.Execute == h {
			return false
		}
	}
	return true
}

// point is where an operation is killed: at its n-th command that changes
// something, or, with n 0, after some time.
type point struct {
	n        int
	executed bool // QEMU executes the command, and the daemon does not learn of it
	after    time.Duration
	daemon   bool // which of the two is killed
	qemu     bool
}

func (p point) String() string {
	who := []string{}
	if p.daemon {
		who = append(who, "the daemon")
	}
	if p.qemu {
		who = append(who, "QEMU")
	}
	when := fmt.Sprintf("after %s", p.after)
	if p.n > 0 {
		when = fmt.Sprintf("before command %d", p.n)
		if p.executed {
			when = fmt.Sprintf("behind command %d", p.n)
		}
	}
	return strings.Join(who, " and ") + " killed " + when
}

// atCommands returns the points of one command: the daemon is killed before QEMU
// has it, and when QEMU has executed it.
func atCommands(n int) []point {
	return []point{{n: n, daemon: true}, {n: n, executed: true, daemon: true}}
}

// atRandom returns a random moment.
func atRandom(random *rand.Rand) point {
	p := point{after: time.Duration(random.IntN(150_000)) * time.Microsecond, daemon: random.IntN(3) > 0}
	p.qemu = !p.daemon || random.IntN(3) == 0
	return p
}

// strike runs a command, and kills at the point unless it has ended before. It
// returns when recovery has ended, and says whether there was anything to kill.
func (b *bench) strike(p point, when string, args ...string) (struck bool) {
	b.t.Helper()
	var reached <-chan struct{}
	var late <-chan time.Time
	var g *gate
	if p.n > 0 {
		g = b.r.holdChange(p.n)
		reached = g.reached
		defer b.r.drop(g)
	}
	c := b.meanwhile(args...)
	if p.n == 0 {
		late = time.After(p.after)
	}
	select {
	case <-reached:
	case <-late:
	case <-c.ended:
		return false
	case <-time.After(eventLimit):
		b.t.Fatalf("%s: neither there nor ended\nvmsnapd's log:\n%s", when, b.log)
	}
	if p.daemon {
		b.signal(syscall.SIGKILL)
		tally.add("kills of the daemon", 1)
	}
	if p.qemu {
		b.vm.kill()
		tally.add("kills of QEMU", 1)
	}
	if g != nil && p.executed {
		g.release(pass)
	} else if g != nil {
		g.release(swallow)
	}
	killed := time.Now()
	if p.daemon {
		b.start()
	}
	b.eventually(eventLimit, when+": recovery ends", b.idle)
	tally.took("from a kill to the end of recovery", time.Since(killed))
	c.end()
	if p.qemu {
		b.await(b.vm.name, "stopped")
		b.restart()
	} else {
		b.await(b.vm.name, "running")
	}
	return true
}
