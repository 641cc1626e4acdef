package freeze

import (
	"errors"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/qga"
)

// realGuest is a guest whose writes are watched from outside: they say whether
// it is frozen, whatever its agent says.
type realGuest struct {
	*testvm.Guest
	writers *testvm.Writers
	request Request
	dir     string // of leases
}

func startGuest(t *testing.T, c testvm.Config) *realGuest {
	t.Helper()
	g := testvm.Start(t, c)
	qemu, err := ProcessOf(g.PID())
	if err != nil {
		t.Fatal(err)
	}
	w, err := g.StartWriters(within(t))
	if err != nil {
		t.Fatal(err)
	}
	return &realGuest{
		Guest: g, writers: w, dir: t.TempDir(),
		request: Request{
			VM: g.Name, VMID: g.UUID, Operation: "op1", AgentSocket: g.AgentSocket(), QEMU: qemu,
			FreezeTimeout: 20 * time.Second, Lease: time.Minute,
		},
	}
}

func (g *realGuest) guard(t *testing.T) *Guard {
	t.Helper()
	guard, err := Start(within(t), guards(g.dir), g.request)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = guard.Close() })
	return guard
}

func (g *realGuest) exec(t *testing.T, command string) {
	t.Helper()
	if _, err := g.Exec(within(t), command); err != nil {
		t.Fatal(err)
	}
}

// checkFrozen looks for writes during some time, in which there would be
// hundreds.
func (g *realGuest) checkFrozen(t *testing.T) {
	t.Helper()
	before := g.writers.Completed()
	g.exec(t, "sleep 0.3")
	for disk, n := range g.writers.Completed() {
		// One write may have been on its way when the guest froze.
		if n > before[disk]+1 {
			t.Errorf("disk %s completed writes %d to %d while frozen", disk, before[disk]+1, n)
		}
	}
}

// checkThawed ends every test: the guest writes, says that it is thawed, and no
// lease is left.
func (g *realGuest) checkThawed(t *testing.T) {
	t.Helper()
	if err := g.writers.AwaitWrites(within(t), 10); err != nil {
		t.Fatal(err)
	}
	leases, err := Leases(g.dir)
	for _, l := range leases {
		l.Guard.awaitEnd(20 * time.Second)
	}
	if err == nil {
		leases, err = Leases(g.dir)
	}
	if err != nil || len(leases) > 0 {
		t.Errorf("leases %+v, error %v, want none", leases, err)
	}
	c, err := qga.Dial(within(t), g.AgentSocket(), qga.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if state, err := c.FreezeStatus(within(t)); err != nil || state != qga.Thawed {
		t.Errorf("the guest says %s, error %v", state, err)
	}
}

// TestQEMUGuest has one guest for each QEMU frozen in every way, and thawed.
func TestQEMUGuest(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := startGuest(t, testvm.Config{QEMU: q, FreezeHook: hangingHook})
		for _, story := range []struct {
			name string
			run  func(g *realGuest, t *testing.T)
		}{
			{"freezes and thaws", (*realGuest).freezesAndThaws},
			{"one mount point", (*realGuest).freezesOneMountpoint},
			{"thawed inside", (*realGuest).thawedInside},
			{"agent killed", (*realGuest).agentKilled},
			{"agent stopped", (*realGuest).agentStopped},
			{"guest agent killed", (*realGuest).guestAgentKilled},
			{"hook hangs", (*realGuest).hookHangs},
			{"recovered", (*realGuest).recovered},
		} {
			t.Run(story.name, func(t *testing.T) {
				again := *g
				again.dir = t.TempDir()
				story.run(&again, t)
			})
			if t.Failed() {
				t.FailNow() // the guest may be frozen
			}
		}
	})
}

func (g *realGuest) freezesAndThaws(t *testing.T) {
	guard := g.guard(t)
	if list := guard.Filesystems(); len(list) != 2 {
		t.Errorf("file systems %+v, want 2", list)
	}
	frozen, err := guard.Freeze(within(t))
	if err != nil || frozen.Count != 2 || frozen.Total != 2 {
		t.Fatalf("frozen %+v, error %v, want 2 of 2", frozen, err)
	}
	g.checkFrozen(t)
	thawed, err := guard.Thaw(within(t))
	if err != nil || !thawed.Verified || thawed.Window < 300*time.Millisecond {
		t.Errorf("thawed %+v, error %v", thawed, err)
	}
	t.Logf("window %s, of which held %s", thawed.Window, time.Since(frozen.At))
	if o := guard.Outcome(); o.End != OnRequest || !o.Verified {
		t.Errorf("outcome %+v", o)
	}
	g.checkThawed(t)
}

func (g *realGuest) freezesOneMountpoint(t *testing.T) {
	g.request.Mountpoints = []string{testvm.Mountpoint("data")}
	guard := g.guard(t)
	frozen, err := guard.Freeze(within(t))
	if err != nil || frozen.Count != 1 || frozen.Total != 2 {
		t.Fatalf("frozen %+v, error %v, want 1 of 2", frozen, err)
	}
	before := g.writers.Completed()
	g.exec(t, "sleep 0.3")
	after := g.writers.Completed()
	if after["data"] > before["data"]+1 || after["root"] < before["root"]+2 {
		t.Errorf("writes %v became %v, want root alone to go on", before, after)
	}
	if thawed, err := guard.Thaw(within(t)); err != nil || !thawed.Verified {
		t.Errorf("thawed %+v, error %v", thawed, err)
	}
	g.checkThawed(t)

	g.request.Mountpoints = []string{"/nowhere"}
	none := g.guard(t)
	if _, err := none.Freeze(within(t)); !errors.Is(err, ErrNothingFrozen) {
		t.Errorf("error %v, want %v", err, ErrNothingFrozen)
	}
	<-none.Done()
	g.checkThawed(t)
}

// Something in the guest thaws a file system behind its agent's back, which
// still says frozen.
func (g *realGuest) thawedInside(t *testing.T) {
	guard := g.guard(t)
	if _, err := guard.Freeze(within(t)); err != nil {
		t.Fatal(err)
	}
	g.exec(t, "busybox fsfreeze --unfreeze "+testvm.Mountpoint("data"))
	thawed, err := guard.Thaw(within(t))
	if err != nil || thawed.Verified || !strings.Contains(thawed.Reason, "only 1") {
		t.Errorf("thawed %+v, error %v, want not verified", thawed, err)
	}
	g.checkThawed(t)
}

func (g *realGuest) agentKilled(t *testing.T) {
	agent := startAgent(t, g.dir, g.request)
	agent.await(t, "started")
	agent.await(t, "frozen")
	g.checkFrozen(t)
	killed := time.Now()
	agent.signal(t, unix.SIGKILL)
	if err := g.writers.AwaitWrites(within(t), 1); err != nil {
		t.Fatal(err)
	}
	after := time.Since(killed)
	t.Logf("the guest wrote again %s after the agent was killed", after)
	if after > 10*time.Second {
		t.Errorf("the guest wrote again only %s after the agent was killed", after)
	}
	g.checkThawed(t)
}

func (g *realGuest) agentStopped(t *testing.T) {
	g.request.Lease = 2 * time.Second
	agent := startAgent(t, g.dir, g.request)
	agent.await(t, "started")
	agent.await(t, "frozen")
	frozen := time.Now()
	agent.signal(t, unix.SIGSTOP)
	g.checkFrozen(t)
	if err := g.writers.AwaitWrites(within(t), 1); err != nil {
		t.Fatal(err)
	}
	if after := time.Since(frozen); after < g.request.Lease-100*time.Millisecond || after > g.request.Lease+10*time.Second {
		t.Errorf("the guest wrote again after %s under a lease of %s", after, g.request.Lease)
	}
	g.checkThawed(t)
}

// The guest's agent is killed while frozen. The guest stays frozen, and nobody
// can thaw it, until its agent is there again.
func (g *realGuest) guestAgentKilled(t *testing.T) {
	g.request.Lease = 500 * time.Millisecond
	guard := g.guard(t)
	if _, err := guard.Freeze(within(t)); err != nil {
		t.Fatal(err)
	}
	if err := g.SignalAgent(within(t), "KILL"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-guard.Unresolved():
	case <-within(t).Done():
		t.Fatal("no alarm")
	}
	awaitUnresolved(t, g.dir)
	g.checkFrozen(t)
	if err := g.RestartAgent(within(t)); err != nil {
		t.Fatal(err)
	}
	if o := guard.Outcome(); o.End != LeaseExpired || o.Verified {
		t.Errorf("outcome %+v", o)
	}
	g.checkThawed(t)
}

// hangingHook makes a freeze wait for as long as a file is there.
const hangingHook = `#!/bin/sh
if [ "$1" = freeze ]; then
	while [ -e /run/hang ]; do sleep 0.05; done
fi
`

// A hook in the guest holds up the freeze beyond its timeout. The freeze that
// comes when the hook ends is undone.
func (g *realGuest) hookHangs(t *testing.T) {
	g.exec(t, "touch /run/hang")
	g.request.FreezeTimeout = time.Second
	guard := g.guard(t)
	if _, err := guard.Freeze(within(t)); !errors.Is(err, ErrFreezeTimeout) {
		t.Fatalf("error %v, want %v", err, ErrFreezeTimeout)
	}
	<-guard.Unresolved()
	awaitUnresolved(t, g.dir)
	if err := g.writers.AwaitWrites(within(t), 10); err != nil {
		t.Fatal(err)
	}
	g.writers.Reset()
	g.exec(t, "rm /run/hang")
	if o := guard.Outcome(); o.End != FreezeFailed {
		t.Errorf("outcome %+v", o)
	}
	g.checkThawed(t)
	for disk, gap := range g.writers.Gaps().Writes {
		t.Logf("%s stood still for %s", disk, gap.Length())
	}
}

// Agent and guard are both lost in mid-freeze, and so is the guest's agent for
// a while: recovery says so, and ends it when it can.
func (g *realGuest) recovered(t *testing.T) {
	for _, guard := range []unix.Signal{unix.SIGKILL, unix.SIGSTOP} {
		g.abandon(t, guard)
		g.checkFrozen(t)
		recovered, err := Recover(within(t), guards(g.dir))
		if err != nil || len(recovered) != 1 || recovered[0].Outcome.End != ByRecovery {
			t.Fatalf("recovered %+v, error %v", recovered, err)
		}
		g.checkThawed(t)
	}
	g.abandon(t, unix.SIGKILL)
	if err := g.SignalAgent(within(t), "STOP"); err != nil {
		t.Fatal(err)
	}
	recovered, err := Recover(within(t), guards(g.dir))
	if err != nil || len(recovered) != 1 || !errors.Is(recovered[0].Err, ErrUnresolved) {
		t.Fatalf("recovered %+v, error %v, want unresolved", recovered, err)
	}
	g.checkFrozen(t)
	if err := g.SignalAgent(within(t), "CONT"); err != nil {
		t.Fatal(err)
	}
	if o := recovered[0].Guard.Outcome(); o.End != ByRecovery {
		t.Errorf("outcome %+v", o)
	}
	g.checkThawed(t)
}

// abandon freezes the guest, kills the agent and hits its guard.
func (g *realGuest) abandon(t *testing.T, guard unix.Signal) {
	t.Helper()
	agent := startAgent(t, g.dir, g.request)
	agent.await(t, "started")
	agent.await(t, "frozen")
	leases, err := Leases(g.dir)
	if err != nil || len(leases) != 1 {
		t.Fatalf("leases %+v, error %v", leases, err)
	}
	stop(t, leases[0].Guard)
	agent.signal(t, unix.SIGKILL)
	if err := agent.Wait(); err == nil {
		t.Fatal("the agent was not killed")
	}
	if err := unix.Kill(leases[0].Guard.PID, guard); err != nil {
		t.Fatal(err)
	}
}

func TestQEMUKilledWhileFrozen(t *testing.T) {
	g := startGuest(t, testvm.Config{})
	guard := g.guard(t)
	if _, err := guard.Freeze(within(t)); err != nil {
		t.Fatal(err)
	}
	g.Kill()
	if _, err := guard.Thaw(within(t)); err != nil && !errors.Is(err, ErrUnresolved) {
		t.Error(err)
	}
	if o := guard.Outcome(); o.End != VMGone {
		t.Errorf("outcome %+v, want %s", o, VMGone)
	}
	if leases, err := Leases(g.dir); err != nil || len(leases) > 0 {
		t.Errorf("leases %+v, error %v", leases, err)
	}
}
