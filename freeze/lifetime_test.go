package freeze

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/qga/qgatest"
)

// Without its lease timer a guard would wait here until the test gives up.
func TestLeaseExpires(t *testing.T) {
	s := qgatest.New(t)
	r := request(t, s)
	r.Lease = 300 * time.Millisecond
	g := startGuard(t, s, r)
	frozen, err := g.Freeze(within(t))
	if err != nil {
		t.Fatal(err)
	}
	got := outcome(t, s, g)
	if got.End != LeaseExpired || got.Verified || got.Window < r.Lease {
		t.Errorf("outcome %+v", got)
	}
	checkThawTime(t, s, frozen.Deadline)
	thawed, err := g.Thaw(within(t))
	if err != nil || thawed.Verified || !strings.Contains(thawed.Reason, "lease") || thawed.Window != got.Window {
		t.Errorf("thaw afterwards: %+v, error %v", thawed, err)
	}
}

// checkThawTime checks that the first thaw came when it was due.
func checkThawTime(t *testing.T, s *qgatest.Server, due time.Time) {
	t.Helper()
	const slack = 5 * time.Second // a loaded machine
	for _, e := range s.Events() {
		if e.Command == qgatest.Thaw {
			if late := e.At.Sub(due); late < -50*time.Millisecond || late > slack {
				t.Errorf("the thaw came %s after it was due", late)
			}
			return
		}
	}
	t.Error("no thaw was sent")
}

// Without the end of the pipe as a signal, the guest would stay frozen for the
// whole lease, which is longer than the test.
func TestAgentKilled(t *testing.T) {
	s := qgatest.New(t)
	r := request(t, s)
	r.Lease = time.Hour
	dir := t.TempDir()
	agent := startAgent(t, dir, r)
	agent.await(t, "started")
	agent.await(t, "frozen")
	if !s.Frozen() {
		t.Fatal("not frozen")
	}
	killed := time.Now()
	agent.signal(t, unix.SIGKILL)
	if err := s.AwaitFrozen(within(t), false); err != nil {
		t.Fatal(err)
	}
	checkThawTime(t, s, killed)
	awaitNoLease(t, s, dir)
}

// awaitNoLease waits for a guard whose agent is gone to finish.
func awaitNoLease(t *testing.T, s *qgatest.Server, dir string) {
	t.Helper()
	leases, err := Leases(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range leases {
		l.Guard.awaitEnd(20 * time.Second)
	}
	checkThawed(t, s, dir)
}

func TestAgentStopped(t *testing.T) {
	s := qgatest.New(t)
	r := request(t, s)
	r.Lease = 500 * time.Millisecond
	dir := t.TempDir()
	agent := startAgent(t, dir, r)
	agent.await(t, "started")
	agent.await(t, "frozen")
	agent.signal(t, unix.SIGSTOP)
	if err := s.AwaitFrozen(within(t), false); err != nil {
		t.Fatal(err)
	}
	awaitNoLease(t, s, dir)
}

// The agent dies while a hook in the guest holds up the freeze. It freezes long
// after that, and is thawed all the same.
func TestAgentKilledInFreeze(t *testing.T) {
	s := qgatest.New(t)
	gate := qgatest.NewGate()
	s.Once(qgatest.Freeze, gate.Hold)
	dir := t.TempDir()
	agent := startAgent(t, dir, request(t, s))
	agent.await(t, "started")
	<-gate.Entered()
	agent.signal(t, unix.SIGKILL)
	awaitUnresolved(t, dir)
	gate.Release()
	if err := s.Await(within(t), qgatest.Thaw, 1); err != nil {
		t.Fatal(err)
	}
	awaitNoLease(t, s, dir)
}

func awaitUnresolved(t *testing.T, dir string) Lease {
	t.Helper()
	ctx := within(t)
	for {
		leases, err := Leases(dir)
		if err != nil {
			t.Fatal(err)
		}
		if len(leases) == 1 && leases[0].State == LeaseUnresolved {
			return leases[0]
		}
		select {
		case <-time.After(20 * time.Millisecond): // a file tells of no event
		case <-ctx.Done():
			t.Fatalf("leases %+v, want one unresolved", leases)
		}
	}
}

// A hook holds up the freeze for longer than the timeout: the agent is told at
// once, and the freeze is undone when it comes.
func TestFreezeTimeout(t *testing.T) {
	s := qgatest.New(t)
	gate := qgatest.NewGate()
	s.Once(qgatest.Freeze, gate.Hold)
	r := request(t, s)
	r.FreezeTimeout = 200 * time.Millisecond
	g := startGuard(t, s, r)
	if _, err := g.Freeze(within(t)); !errors.Is(err, ErrFreezeTimeout) {
		t.Fatalf("error %v, want %v", err, ErrFreezeTimeout)
	}
	select {
	case <-g.Unresolved():
	case <-within(t).Done():
		t.Fatal("no alarm")
	}
	awaitUnresolved(t, g.cfg.Dir)
	if _, err := g.Thaw(within(t)); !errors.Is(err, ErrUnresolved) {
		t.Errorf("thaw: %v, want %v", err, ErrUnresolved)
	}
	if err := g.Close(); !errors.Is(err, ErrUnresolved) {
		t.Errorf("close: %v, want %v", err, ErrUnresolved)
	}
	gate.Release()
	if got := outcome(t, s, g); got.End != FreezeFailed {
		t.Errorf("outcome %+v", got)
	}
	if s.Count(qgatest.Thaw) == 0 {
		t.Error("no thaw was sent")
	}
}

func TestFreezeCancelled(t *testing.T) {
	s := qgatest.New(t)
	gate := qgatest.NewGate()
	s.Once(qgatest.Freeze, gate.Hold)
	g := startGuard(t, s, request(t, s))
	ctx, cancel := context.WithCancel(within(t))
	go func() {
		<-gate.Entered()
		cancel()
	}()
	if _, err := g.Freeze(ctx); !errors.Is(err, ErrAborted) || !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want %v", err, ErrAborted)
	}
	<-g.Unresolved() // it has begun to thaw
	gate.Release()
	if got := outcome(t, s, g); got.End != FreezeFailed {
		t.Errorf("outcome %+v", got)
	}
}

func TestVMEndsWhileFrozen(t *testing.T) {
	s := qgatest.New(t)
	r := request(t, s)
	var kill func()
	r.QEMU, kill = standIn(t)
	g := startGuard(t, s, r)
	if _, err := g.Freeze(within(t)); err != nil {
		t.Fatal(err)
	}
	kill()
	s.Stop()
	_, thawErr := g.Thaw(within(t))
	if thawErr != nil && !errors.Is(thawErr, ErrUnresolved) {
		t.Error(thawErr)
	}
	s.SetFrozen(false) // no guest, nothing frozen
	if got := outcome(t, s, g); got.End != VMGone {
		t.Errorf("outcome %+v, want %s", got, VMGone)
	}
}

// A guard that is killed while the agent lives is followed by one that thaws.
func TestGuardKilled(t *testing.T) {
	s := qgatest.New(t)
	g := startGuard(t, s, request(t, s))
	if _, err := g.Freeze(within(t)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(g.Process().PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if got := outcome(t, s, g); got.End != ByRecovery {
		t.Errorf("outcome %+v, want %s", got, ByRecovery)
	}
	thawed, err := g.Thaw(within(t))
	if err != nil || thawed.Verified {
		t.Errorf("thaw afterwards: %+v, error %v", thawed, err)
	}
}

func TestGuardKilledBeforeFreeze(t *testing.T) {
	s := qgatest.New(t)
	g := startGuard(t, s, request(t, s))
	if err := unix.Kill(g.Process().PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if got := outcome(t, s, g); got.End != Unused {
		t.Errorf("outcome %+v", got)
	}
	if _, err := g.Freeze(within(t)); !errors.Is(err, ErrGuard) {
		t.Errorf("error %v, want %v", err, ErrGuard)
	}
}

// When no guard can be kept running the lease file is what remains, and the
// agent is told.
func TestGuardLost(t *testing.T) {
	s := qgatest.New(t)
	cfg := guards(t.TempDir())
	cfg.Executable[0] = filepath.Join(t.TempDir(), "vmsnapd")
	if err := os.Symlink(os.Args[0], cfg.Executable[0]); err != nil {
		t.Fatal(err)
	}
	g, err := Start(within(t), cfg, request(t, s))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := g.Freeze(within(t)); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(cfg.Executable[0]); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(g.Process().PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if got := g.Outcome(); got.End != Lost || got.Reason == "" {
		t.Errorf("outcome %+v, want %s", got, Lost)
	}
	<-g.Unresolved()
	if err := g.Close(); !errors.Is(err, ErrUnresolved) {
		t.Errorf("close: %v, want %v", err, ErrUnresolved)
	}
	recovered, err := Recover(within(t), guards(g.cfg.Dir))
	if err != nil || len(recovered) != 1 || recovered[0].Outcome.End != ByRecovery {
		t.Errorf("recovered %+v, error %v", recovered, err)
	}
	checkThawed(t, s, g.cfg.Dir)
}

// A guard that is stopped cannot thaw at its lease's end. The agent sees that it
// is overdue, without having asked it for anything.
func TestGuardStopped(t *testing.T) {
	t.Parallel() // the guard is given its time
	s := qgatest.New(t)
	r := request(t, s)
	r.Lease = 2 * time.Second
	g := startGuard(t, s, r)
	if _, err := g.Freeze(within(t)); err != nil {
		t.Fatal(err)
	}
	stop(t, g.Process())
	if got := outcome(t, s, g); got.End != ByRecovery {
		t.Errorf("outcome %+v", got)
	}
}
