package freeze

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/qga/qgatest"
)

// abandon leaves a frozen guest behind: agent and guard are killed, or the
// guard is stopped.
func abandon(t *testing.T, s *qgatest.Server, r Request, guard unix.Signal) (dir string, lease Lease) {
	t.Helper()
	dir = t.TempDir()
	agent := startAgent(t, dir, r)
	agent.await(t, "started")
	agent.await(t, "frozen")
	leases, err := Leases(dir)
	if err != nil || len(leases) != 1 {
		t.Fatalf("leases %+v, error %v", leases, err)
	}
	stop(t, leases[0].Guard)
	agent.signal(t, unix.SIGKILL)
	if err := agent.Wait(); err == nil {
		t.Fatal("the agent was not killed")
	}
	if !s.Frozen() {
		t.Fatal("not frozen")
	}
	if err := unix.Kill(leases[0].Guard.PID, guard); err != nil {
		t.Fatal(err)
	}
	return dir, leases[0]
}

func TestRecover(t *testing.T) {
	for name, sig := range map[string]unix.Signal{"guard killed": unix.SIGKILL, "guard stopped": unix.SIGSTOP} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := qgatest.New(t)
			dir, lease := abandon(t, s, request(t, s), sig)
			recovered, err := Recover(within(t), guards(dir))
			if err != nil || len(recovered) != 1 {
				t.Fatalf("recovered %+v, error %v", recovered, err)
			}
			got := recovered[0]
			if !got.Resolved() || got.Outcome.End != ByRecovery || got.Lease.ID != lease.ID {
				t.Errorf("recovered %+v", got)
			}
			if lease.Guard.Alive() {
				t.Error("the old guard lives")
			}
			checkThawed(t, s, dir)
			if recovered, err := Recover(within(t), guards(dir)); err != nil || len(recovered) > 0 {
				t.Errorf("second time: %+v, error %v", recovered, err)
			}
		})
	}
}

// A guard that goes on by itself when its agent is gone is left to finish.
func TestRecoverLeavesGuardToFinish(t *testing.T) {
	s := qgatest.New(t)
	dir, lease := abandon(t, s, request(t, s), unix.SIGCONT)
	recovered, err := Recover(within(t), guards(dir))
	if err != nil || len(recovered) > 1 || len(recovered) == 1 && recovered[0].Outcome.End != AgentGone {
		t.Errorf("recovered %+v, error %v", recovered, err)
	}
	lease.Guard.awaitEnd(killTimeout)
	checkThawed(t, s, dir)
}

// The guest agent cannot answer yet: the lease stays, attempts go on, and end
// it later, though nobody asks again.
func TestRecoverUnresolved(t *testing.T) {
	s := qgatest.New(t)
	dir, _ := abandon(t, s, request(t, s), unix.SIGKILL)
	gate := qgatest.NewGate()
	s.Once(qgatest.Sync, gate.Hold)
	recovered, err := Recover(within(t), guards(dir))
	if err != nil || len(recovered) != 1 {
		t.Fatalf("recovered %+v, error %v", recovered, err)
	}
	got := recovered[0]
	if got.Resolved() || !errors.Is(got.Err, ErrUnresolved) || got.Guard == nil {
		t.Fatalf("recovered %+v", got)
	}
	lease := awaitUnresolved(t, dir)
	if lease.Guard != got.Guard.Process() {
		t.Errorf("the lease names guard %+v, want %+v", lease.Guard, got.Guard.Process())
	}
	gate.Release()
	if o := outcome(t, s, got.Guard); o.End != ByRecovery {
		t.Errorf("outcome %+v", o)
	}
}

func TestRecoverWithoutGuest(t *testing.T) {
	tests := []struct {
		name   string
		change func(*Lease)
	}{
		{"QEMU has ended", func(l *Lease) { l.Request.QEMU.StartTime++ }},
		{"the host was booted", func(l *Lease) { l.Boot = "another" }},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := qgatest.New(t)
			dir := t.TempDir()
			l := orphan(t, s)
			test.change(&l)
			if err := l.write(dir); err != nil {
				t.Fatal(err)
			}
			recovered, err := Recover(within(t), guards(dir))
			if err != nil || len(recovered) != 1 || recovered[0].Outcome.End != VMGone || recovered[0].Guard != nil {
				t.Errorf("recovered %+v, error %v", recovered, err)
			}
			checkThawed(t, s, dir)
			if len(s.Events()) > 0 {
				t.Errorf("the guest was asked: %v", s.Events())
			}
		})
	}
}

// orphan is a lease of an agent and a guard that have ended.
func orphan(t *testing.T, s *qgatest.Server) Lease {
	t.Helper()
	boot, err := bootID()
	if err != nil {
		t.Fatal(err)
	}
	dead, kill := standIn(t)
	kill()
	l := sampleLease(newID())
	l.Request, l.Boot, l.Owner, l.Guard = request(t, s), boot, dead, dead
	return l
}

// A lease of an agent that is alive is not taken from it.
func TestRecoverHeld(t *testing.T) {
	s := qgatest.New(t)
	dir := t.TempDir()
	agent := startAgent(t, dir, request(t, s))
	agent.await(t, "started")
	agent.await(t, "frozen")
	recovered, err := Recover(within(t), guards(dir))
	if err != nil || len(recovered) != 1 || !errors.Is(recovered[0].Err, ErrHeld) {
		t.Errorf("recovered %+v, error %v, want %v", recovered, err, ErrHeld)
	}
	if !s.Frozen() {
		t.Error("thawed")
	}
	agent.signal(t, unix.SIGKILL)
	if err := s.AwaitFrozen(within(t), false); err != nil {
		t.Error(err)
	}
}

// One bad file keeps no other guest frozen.
func TestRecoverBesideBadLease(t *testing.T) {
	s := qgatest.New(t)
	dir := t.TempDir()
	bad := filepath.Join(dir, newID()+".json")
	if err := os.WriteFile(bad, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.SetFrozen(true)
	if err := orphan(t, s).write(dir); err != nil {
		t.Fatal(err)
	}
	recovered, err := Recover(within(t), guards(dir))
	if err == nil || len(recovered) != 1 || !recovered[0].Resolved() {
		t.Errorf("recovered %+v, error %v, want one and an error", recovered, err)
	}
	if s.Frozen() {
		t.Error("the guest is frozen")
	}
}

func TestRecoverWithoutExecutable(t *testing.T) {
	s := qgatest.New(t)
	dir := t.TempDir()
	s.SetFrozen(true)
	if err := orphan(t, s).write(dir); err != nil {
		t.Fatal(err)
	}
	cfg := guards(dir)
	cfg.Executable = []string{"/nonexistent"}
	recovered, err := Recover(within(t), cfg)
	if err != nil || len(recovered) != 1 || !errors.Is(recovered[0].Err, ErrUnresolved) || !errors.Is(recovered[0].Err, ErrGuard) {
		t.Errorf("recovered %+v, error %v", recovered, err)
	}
	if leases, err := Leases(dir); err != nil || len(leases) != 1 {
		t.Errorf("leases %+v, error %v, want it kept", leases, err)
	}
}
