package e2e

import (
	"fmt"
	"syscall"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// TestQEMUPreviewCommitDies kills the daemon, QEMU, or both while a preview is kept:
// at each link that is set up, and at the changes of files. The VM has the trial
// state, whatever died, and once the preview is kept the state before is a snapshot,
// both in the catalog and in its manifests.
func TestQEMUPreviewCommitDies(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "commitdies-"+q.Name, "root.qcow2", "data.qcow2")
		vm.kill()
		vm.args = append(vm.args, "-netdev", "user,id=lan", "-device", "virtio-net-pci,netdev=lan", "-nic", "user,model=e1000,id=wan")
		vm.start()
		b := &bench{vm: vm, r: newRelay(t, vm.dir+"/q1")}
		b.host = newHostOf(t, map[string]string{vm.name: vm.uuid})
		b.await(vm.name, "paused")
		vm.write(1)
		b.must("snapshot", "create", vm.name, "one", "--quiesce", "none")
		c := &commitKills{bench: b, sound: fmt.Sprint(b.findings(vm.name))}
		first, stride := share(t, q)
		round := 0
		for nth := 1; nth <= 2; nth++ { // there are two devices
			for _, how := range []string{"the daemon dies", "QEMU dies", "the daemon dies before it is sent", "both die"} {
				if round++; thorough() || round%(2*stride) == first%(2*stride) {
					c.atLink(nth, how)
				}
			}
		}
		calls := []string{"fsync", "renameat", "unlinkat"}
		c.atChange(killPoint{calls: calls}) // counts them
		counts := b.called()
		for _, call := range calls {
			step := 1
			if !thorough() {
				step = max(counts[call]/2, 1)
			}
			for n := first; n <= counts[call]; n += step {
				c.atChange(killPoint{calls: []string{call}, n: n})
			}
		}
		t.Logf("of %v: killed at %d changes of files, %d previews were kept by recovery", counts, c.killed, c.kept)
		if c.killed == 0 || c.kept == 0 {
			t.Error("it was never killed, or recovery has never kept a preview")
		}
	})
}

// commitKills is a VM whose previews are kept, and what dies meanwhile.
type commitKills struct {
	*bench
	sound  string // what the doctor says of the VM when nothing has died
	rounds int
	killed int // at a change of a file
	kept   int // by recovery
}

// opens opens a preview of "one" of a VM that runs, whose disks hold old before and
// trial in it.
func (c *commitKills) opens() (old int) {
	c.t.Helper()
	c.letRun()
	c.rounds++
	old = c.rounds%200 + 10
	c.vm.write(old)
	c.opensPreview(old)
	return old
}

func (c *commitKills) atLink(nth int, how string) {
	c.t.Helper()
	old := c.opens()
	g := c.r.hold("set_link", nth)
	m := c.meanwhile("preview", "commit", c.vm.name)
	g.await(c.host)
	if how != "QEMU dies" {
		c.signal(syscall.SIGKILL)
	}
	if how == "QEMU dies" || how == "both die" {
		c.vm.kill()
	}
	if how == "the daemon dies before it is sent" {
		g.release(swallow)
	} else {
		g.release(pass)
	}
	if how != "QEMU dies" {
		c.start()
	}
	c.ends(fmt.Sprintf("at link %d %s", nth, how), old, how != "QEMU dies")
	m.end()
}

func (c *commitKills) atChange(p killPoint) {
	c.t.Helper()
	old := c.opens()
	tracer := c.killAt(p)
	m := c.meanwhile("preview", "commit", c.vm.name)
	killed := c.diedOr(tracer, func() error {
		select {
		case <-m.ended:
			return nil
		default:
			return fmt.Errorf("it is being kept")
		}
	})
	if killed {
		c.killed++
		c.start()
	}
	c.ends(p.String(), old, killed)
	m.end()
}

// ends verifies what became of a commit, and brings it to its end. recovers is
// whether another daemon has done so, if the commit had begun.
func (c *commitKills) ends(when string, old int, recovers bool) {
	c.t.Helper()
	c.eventually(eventLimit, when+": recovery ends", c.idle)
	if c.vm.cmd == nil {
		c.await(c.vm.name, "stopped")
		c.restart()
	}
	c.vm.holds(trial, when)
	switch open := c.previews(); {
	case open:
		c.must("preview", "commit", c.vm.name)
		c.vm.holds(trial, when+", kept after all")
	case recovers:
		c.kept++
	}
	before := c.newestBefore()
	for _, d := range c.snapshot(before).Disks {
		c.vm.imageHolds(d, old, when+": "+before)
	}
	c.launchesActive(c.vm, when)
	c.noOrphans(c.vm, when)
	c.vm.check(when)
	if left := c.journal(); len(left) > 0 {
		c.t.Errorf("%s: the journal holds %v", when, left)
	}
	if found := fmt.Sprint(c.findings(c.vm.name)); found != c.sound {
		c.t.Errorf("%s: the doctor finds %s, and before %s", when, found, c.sound)
	}
	c.must("snapshot", "create", c.vm.name, fmt.Sprint("after-", c.rounds), "--quiesce", "none") // its disks can be cut
	c.must("snapshot", "delete", before, fmt.Sprint(c.vm.name, "/after-", c.rounds))
	c.vm.holds(trial, when+", after a snapshot")
	if c.t.Failed() {
		c.t.FailNow()
	}
}
