package e2e

import (
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

// booted is a guest behind relays, on its monitor and on its agent.
type booted struct {
	*host
	g     *testvm.Guest
	own   *monitor.Session
	qmp   *relay
	agent *relay
}

func newBooted(t *testing.T, q testvm.QEMU) *booted {
	t.Helper()
	g := testvm.Start(t, testvm.Config{QEMU: q, Disks: testvm.TwoDisks(), ExtraQMP: 1})
	own, err := monitor.Dial(t.Context(), g.ExtraQMPSockets()[0])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = own.Close() })
	b := &booted{g: g, own: own, qmp: newRelay(t, g.QMPSocket()), agent: newRelay(t, g.AgentSocket())}
	b.host = newHost(t, g)
	return b
}

func (b *booted) world() world {
	b.t.Helper()
	return b.host.world(b.own, b.g.Dir)
}

// asBefore verifies that nothing is left of a snapshot, and that the guest
// writes.
func (b *booted) asBefore(before world, when string) {
	b.t.Helper()
	b.released()
	thawed(b.t, b.g)
	if diff := cmp.Diff(before, b.world()); diff != "" {
		b.t.Errorf("%s: before (-) and after (+):\n%s\nvmsnapd's log:\n%s", when, diff, b.log)
	}
	b.fails(4, "", "snapshot", "show", b.g.Name+"/x")
}

// taken verifies that a snapshot holds what was there before its cut, and that
// the guest writes.
func (b *booted) taken(name, consistency, when string) {
	b.t.Helper()
	b.released()
	thawed(b.t, b.g)
	put(b.t, b.g, "after", name)
	s := b.snapshot(b.g.Name + "/" + name)
	if s.Consistency != consistency || len(s.Disks) != 2 {
		b.t.Errorf("%s: snapshot %+v, want %s", when, s, consistency)
	}
	for _, d := range s.Disks {
		checkImage(b.t, b.g.QEMU(), d.Path)
		image := raw(b.t, b.g.QEMU(), d)
		if consistency == "filesystem" {
			clean(b.t, image)
		} else {
			recovered(b.t, image)
		}
		if got := inImage(b.t, image, "before"); got != name {
			b.t.Errorf("%s: %s holds %q from before the cut", when, d.Device, got)
		}
		if got := inImage(b.t, image, "after"); got == name {
			b.t.Errorf("%s: %s holds a file from after the cut", when, d.Device)
		}
	}
	if left := b.journal(); len(left) > 0 {
		b.t.Errorf("%s: left over: %v", when, left)
	}
}

// released waits until no guard holds the guest any more. A guard that could
// not make sure of the thaw at once goes on by itself.
func (b *booted) released() {
	b.t.Helper()
	b.eventually(eventLimit, "the guest is thawed", func() error {
		if left := append(b.guards(), leases(b.t, b.host)...); len(left) > 0 {
			return fmt.Errorf("%v", left)
		}
		return nil
	})
}

func leases(t *testing.T, h *host) []string {
	t.Helper()
	left, err := filepath.Glob(h.path("state/leases/*"))
	if err != nil {
		t.Fatal(err)
	}
	return left
}

// start starts a snapshot and returns when it has come to a gate.
func (b *booted) begin(g *gate, name string, args ...string) (*creation, string) {
	b.t.Helper()
	put(b.t, b.g, "before", name)
	c := b.create(append([]string{b.g.Name, name}, args...)...)
	g.await(b.host)
	return c, b.operation(b.g.Name)
}

// TestQEMUAFrozenGuestIsNeverLeft ends a quiesced snapshot in every way, at
// each command to the guest agent, and asks the guest.
func TestQEMUAFrozenGuestIsNeverLeft(t *testing.T) {
	t.Parallel() // it waits most of its time
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		b := newBooted(t, q)
		b.cancelFreeze()
		b.cancelThaw()
		b.killGuard()
		b.refuseFrozen()
		b.loseFrozen()
		b.stopFrozen()
	})
}

// cancelFreeze cancels before the freeze is sent, and before its answer.
func (b *booted) cancelFreeze() {
	b.t.Helper()
	for _, how := range []passage{pass, swallow} {
		before := b.world()
		g := b.agent.hold("guest-fsfreeze-freeze", 1)
		c, id := b.begin(g, "x", "--quiesce", "require")
		b.awaitStep(id, "freeze")
		if err := b.cancel(id); err != nil {
			b.t.Error(err)
		}
		g.release(how)
		if r := c.end(); r.code != 130 {
			b.t.Errorf("exit code %d: %s", r.code, r.stderr)
		}
		b.asBefore(before, "cancelled in freeze")
	}
}

// cancelThaw cancels after the cut.
func (b *booted) cancelThaw() {
	b.t.Helper()
	g := b.agent.hold("guest-fsfreeze-thaw", 1)
	c, id := b.begin(g, "thawing", "--quiesce", "require")
	b.awaitStep(id, "thaw")
	if err := b.cancel(id); err == nil || !strings.Contains(err.Error(), "cannot be cancelled") {
		b.t.Errorf("cancel: %v", err)
	}
	g.release(pass)
	if r := c.end(); r.code != 0 {
		b.t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
	b.taken("thawing", "filesystem", "cancelled in thaw")
}

// killGuard kills the freeze guard while the guest is frozen, before the cut
// was sent and after.
func (b *booted) killGuard() {
	b.t.Helper()
	g := b.qmp.hold("transaction", 1)
	c, _ := b.begin(g, "unguarded", "--quiesce", "prefer")
	bench := &bench{host: b.host}
	if err := syscall.Kill(bench.guardPID("guard"), syscall.SIGKILL); err != nil {
		b.t.Fatal(err)
	}
	g.release(pass)
	if r := c.end(); r.code != 0 {
		b.t.Errorf("guard killed: exit code %d: %s", r.code, r.stderr)
	}
	b.taken("unguarded", b.snapshot(b.g.Name+"/unguarded").Consistency, "guard killed")
	b.t.Logf("guard killed while frozen: %+v", b.snapshot(b.g.Name+"/unguarded").Quiesce)
}

// refuseFrozen has QEMU refuse the transaction while the guest is frozen.
func (b *booted) refuseFrozen() {
	b.t.Helper()
	before := b.world()
	g := b.qmp.hold("transaction", 1)
	c, id := b.begin(g, "x", "--quiesce", "require")
	if err := b.own.Execute(b.ctx(), "blockdev-del", map[string]any{"node-name": "vmsnap-" + id + "-1"}, nil); err != nil {
		b.t.Fatal(err)
	}
	g.release(pass)
	if r := c.end(); r.code != 1 || !strings.Contains(r.stderr, "refused the cut") {
		b.t.Errorf("refused: exit code %d: %s", r.code, r.stderr)
	}
	b.asBefore(before, "refused")
}

// loseFrozen loses the answer to the transaction: nobody can say any more that
// the guest was frozen at the cut.
func (b *booted) loseFrozen() {
	b.t.Helper()
	before := b.world()
	g := b.qmp.hold("transaction", 1)
	c, _ := b.begin(g, "x", "--quiesce", "prefer")
	g.release(swallow)
	if r := c.end(); r.code == 0 {
		b.t.Errorf("lost: exit code %d: %s", r.code, r.stderr)
	}
	b.asBefore(before, "lost before QEMU")

	g = b.qmp.hold("transaction", 1)
	c, _ = b.begin(g, "lost", "--quiesce", "prefer")
	g.release(loseAnswer)
	if r := c.end(); r.code != 0 {
		b.t.Errorf("lost: exit code %d: %s", r.code, r.stderr)
	}
	b.taken("lost", "crash", "lost behind QEMU")
}

// stopFrozen stops QEMU, and with it the frozen guest and its agent, while the
// transaction is on its way.
func (b *booted) stopFrozen() {
	b.t.Helper()
	g := b.qmp.hold("transaction", 1)
	c, id := b.begin(g, "stopped", "--quiesce", "prefer")
	if err := syscall.Kill(b.g.PID(), syscall.SIGSTOP); err != nil {
		b.t.Fatal(err)
	}
	g.release(disconnect)
	b.eventually(eventLimit, "the answer is lost", func() error {
		if !strings.Contains(b.log.String(), "outcome is unknown; asking QEMU: operation="+id) {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	if err := syscall.Kill(b.g.PID(), syscall.SIGCONT); err != nil {
		b.t.Fatal(err)
	}
	if r := c.end(); r.code != 0 {
		b.t.Errorf("stopped: exit code %d: %s", r.code, r.stderr)
	}
	b.taken("stopped", "crash", "stopped")
}
