package memdump

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/monitor"
	"github.com/vmsnap/vmsnap/monitor/monitortest"
)

// scriptedVM is QEMU's run state and migration, without a QEMU.
type scriptedVM struct {
	*monitortest.Server
	vm guardedVM

	mu         sync.Mutex
	status     monitor.RunState
	migration  monitor.MigrationStatus
	background bool
	cancels    int
	lost       string        // the command whose next answer is lost
	ran        chan struct{} // closed when the VM runs, replaced when it pauses
}

// newScriptedVM runs. Its QEMU process is a stand-in.
func newScriptedVM(t *testing.T, opts ...monitortest.Option) *scriptedVM {
	t.Helper()
	qemu := exec.Command("sleep", "infinity")
	if err := qemu.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = qemu.Process.Kill(); _ = qemu.Wait() })
	v := &scriptedVM{
		Server: monitortest.NewServer(t, opts...), status: monitor.RunStateRunning,
		migration: monitor.MigrationNone, ran: make(chan struct{}),
	}
	start, err := startTime(qemu.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	v.vm = guardedVM{Socket: v.Path(), PID: qemu.Process.Pid, StartTime: start, Resumed: filepath.Join(t.TempDir(), "resumed")}
	v.answer("query-version", func() any { return monitortest.QEMU100 })
	v.answer("stop", func() any { v.set(monitor.RunStatePaused); return nil })
	v.answer("cont", func() any { v.set(monitor.RunStateRunning); return nil })
	v.answer("query-status", func() any {
		return monitor.Status{Running: v.status == monitor.RunStateRunning, Status: v.status}
	})
	v.answer("query-migrate", func() any { return monitor.Migration{Status: v.migration} })
	v.answer("query-migrate-capabilities", func() any {
		return []map[string]any{{"capability": "events", "state": true}, {"capability": "background-snapshot", "state": v.background}}
	})
	v.answer("migrate_cancel", func() any {
		v.cancels++
		v.migration = monitor.MigrationCancelled
		if v.status == monitor.RunStateFinishMigrate {
			v.set(monitor.RunStateRunning)
		}
		return nil
	})
	return v
}

func (v *scriptedVM) answer(command string, f func() any) {
	v.Handle(command, func(monitortest.Request) monitortest.Reply {
		v.mu.Lock()
		defer v.mu.Unlock()
		result := f()
		if v.lost == command {
			v.lost = ""
			return monitortest.Silence()
		}
		return monitortest.Return(result)
	})
}

// set changes the run state, under the lock.
func (v *scriptedVM) set(s monitor.RunState) {
	if s == monitor.RunStateRunning && v.status != s {
		close(v.ran)
		v.ran = make(chan struct{})
	}
	v.status = s
}

// put changes all of it.
func (v *scriptedVM) put(s monitor.RunState, m monitor.MigrationStatus, background bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.set(s)
	v.migration, v.background = m, background
}

func (v *scriptedVM) state() monitor.RunState {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.status
}

// resumes returns a channel that is closed when the VM runs again.
func (v *scriptedVM) resumes() <-chan struct{} {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.ran
}

// wantResumed waits until the VM runs again, for as long as a guest may stand
// still.
func (v *scriptedVM) wantResumed(t *testing.T, ran <-chan struct{}) {
	t.Helper()
	began := time.Now()
	select {
	case <-ran:
		t.Logf("the VM ran after %s", time.Since(began))
	case <-time.After(mayStandStill):
		t.Fatalf("the VM is %s; commands %v", v.state(), v.Commands())
	}
}

// dialed connects as the agent does.
func (v *scriptedVM) dialed(t *testing.T) *monitor.Session {
	t.Helper()
	s, err := monitor.Dial(guardContext(t), v.vm.Socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func (v *scriptedVM) guarded(t *testing.T) (*monitor.Session, *PauseGuard) {
	t.Helper()
	s := v.dialed(t)
	g, err := StartGuard(guardContext(t), v.vm.config(s))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	})
	return s, g
}

// pause arms and pauses.
func (v *scriptedVM) pause(t *testing.T, s *monitor.Session, g *PauseGuard) {
	t.Helper()
	if err := g.Arm(time.Minute); err != nil {
		t.Fatal(err)
	}
	if err := s.Stop(guardContext(t)); err != nil {
		t.Fatal(err)
	}
}

func wantDisarmed(t *testing.T, g *PauseGuard, acted bool) {
	t.Helper()
	if got, err := g.Disarm(); got != acted || err != nil {
		t.Errorf("acted %t, error %v, want %t", got, err, acted)
	}
}

// Where all goes well the guard says nothing to QEMU, however often it is used.
func TestGuardOfAHealthyPause(t *testing.T) {
	v := newScriptedVM(t)
	s, g := v.guarded(t)
	ctx := guardContext(t)
	for range 3 {
		v.pause(t, s, g)
		if err := g.Arm(time.Hour); err != nil { // a new limit
			t.Fatal(err)
		}
		if err := s.Cont(ctx); err != nil {
			t.Fatal(err)
		}
		wantDisarmed(t, g, false)
	}
	wantDisarmed(t, g, false)
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	if err := g.Close(); err != nil {
		t.Errorf("closed again: %v", err)
	}
	if g.cmd.ProcessState == nil || !g.cmd.ProcessState.Success() {
		t.Errorf("the guard: %v", g.cmd.ProcessState)
	}
	if err := g.Arm(time.Minute); !errors.Is(err, ErrPauseGuard) {
		t.Errorf("armed after its end: %v", err)
	}
	if st, err := s.QueryStatus(ctx); err != nil || !st.Running {
		t.Errorf("the session: %+v, %v", st, err)
	}
	want := "qmp_capabilities stop cont stop cont stop cont query-status"
	if got := strings.Join(v.Commands(), " "); got != want {
		t.Errorf("commands %s, want %s", got, want)
	}
}

// A new limit takes the place of the old one.
func TestGuardRearmed(t *testing.T) {
	v := newScriptedVM(t)
	s, g := v.guarded(t)
	if err := g.Arm(time.Hour); err != nil {
		t.Fatal(err)
	}
	if err := s.Stop(guardContext(t)); err != nil {
		t.Fatal(err)
	}
	ran := v.resumes()
	if err := g.Arm(50 * time.Millisecond); err != nil {
		t.Fatal(err)
	}
	v.wantResumed(t, ran)
	wantDisarmed(t, g, true)
}

func TestGuardClosedWhileArmed(t *testing.T) {
	v := newScriptedVM(t)
	s, g := v.guarded(t)
	v.pause(t, s, g)
	ran := v.resumes()
	if err := g.Close(); err != nil {
		t.Error(err)
	}
	v.wantResumed(t, ran)
	if !errors.Is(s.Err(), monitor.ErrGone) {
		t.Errorf("the session: %v", s.Err())
	}
	wantDisarmed(t, g, true)
	if _, err := os.Stat(v.vm.Resumed); err != nil {
		t.Error(err)
	}
}

// The connection breaks and QEMU lives: there is another one to be had.
func TestGuardWithoutTheConnection(t *testing.T) {
	t.Run("agent alive", func(t *testing.T) {
		v := newScriptedVM(t)
		s, g := v.guarded(t)
		v.pause(t, s, g)
		ran := v.resumes()
		v.HangUp()
		v.wantResumed(t, ran)
		wantDisarmed(t, g, true)
	})
	t.Run("agent stopped", func(t *testing.T) {
		v := newScriptedVM(t)
		a := startPausingAgent(t, v.vm)
		a.do("arm 1m", "stop")
		ran := v.resumes()
		halt(t, a.cmd.Process.Pid)
		v.HangUp()
		v.wantResumed(t, ran)
		a.signal(unix.SIGCONT)
		if got := a.ask("disarm"); got != "acted true, error <nil>" {
			t.Errorf("disarm: %s", got)
		}
	})
}

// An unguarded session that ends must not be kept from reconnecting.
func TestGuardLetsAnEndedSessionGo(t *testing.T) {
	v := newScriptedVM(t)
	s, g := v.guarded(t)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := v.dialed(t).Stop(guardContext(t)); err != nil {
		t.Error(err)
	}
	if err := g.Arm(time.Minute); !errors.Is(err, ErrPauseGuard) || !errors.Is(err, monitor.ErrClosed) {
		t.Errorf("armed without a session: %v", err)
	}
	if err := g.Close(); err != nil {
		t.Error(err)
	}
	if v.state() != monitor.RunStatePaused {
		t.Error("the guard resumed what it was not armed for")
	}
}

// The agent wakes up, or was not quite stopped, and reads away what QEMU
// answers the guard.
func TestGuardWhoseRepliesAreStolen(t *testing.T) {
	for _, stolen := range []string{"query-version", "query-status", "cont", "query-migrate"} {
		t.Run(stolen, func(t *testing.T) {
			t.Parallel()
			v := newScriptedVM(t)
			s := v.dialed(t)
			v.loseFirst(stolen)
			g := &PauseGuard{cfg: v.vm.config(s), ended: make(chan struct{})}
			if err := g.launch(); err != nil {
				t.Fatal(err)
			}
			if err := g.greet(guardContext(t)); err != nil {
				t.Fatal(err)
			}
			v.put(monitor.RunStatePaused, "", false)
			ran := v.resumes()
			file, err := s.File()
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = file.Close() }()
			s.HandOver() // would read replies away, too
			// No beat follows, and nobody yields.
			if err := g.say(wordArm + " 60000000000"); err != nil {
				t.Fatal(err)
			}
			v.wantResumed(t, ran)
			v.AwaitClient(2)
			if n, err := unix.Read(int(file.Fd()), make([]byte, 1)); n != 0 || err != nil {
				t.Errorf("the connection is not shut down: %d, %v", n, err)
			}
			if err := errors.Join(g.cmd.Wait(), g.pipe.Close()); err != nil {
				t.Error(err)
			}
			if v.state() != monitor.RunStateRunning {
				t.Errorf("the VM is %s", v.state())
			}
		})
	}
}

// loseFirst loses the first answer to a command, which is carried out.
func (v *scriptedVM) loseFirst(command string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.lost = command
}

// Half a reply was read when the agent died, and events came since.
func TestGuardInTheMiddleOfAReply(t *testing.T) {
	v := newScriptedVM(t, monitortest.WithSplitWrites())
	v.Handle("query-half", func(r monitortest.Request) monitortest.Reply {
		return monitortest.Raw([]byte(`{"return": {"name": "{\"return\": {}, `))
	})
	a := startPausingAgent(t, v.vm)
	a.do("arm 1m", "stop")
	ran := v.resumes()
	a.ask("send query-half")
	v.Await("query-half")
	a.signal(unix.SIGKILL)
	v.Write([]byte(`x"}, "id": "some"}` + "\r\n"))
	v.Flood("BLOCK_JOB", 20)
	v.wantResumed(t, ran)
	a.awaitGuardEnd()
}

// A main loop that hangs is waited for; the guard has the first place in line.
func TestGuardOfAHungQEMU(t *testing.T) {
	v := newScriptedVM(t)
	a := startPausingAgent(t, v.vm)
	hung := make(chan struct{})
	v.Handle("query-slow", func(r monitortest.Request) monitortest.Reply {
		select {
		case <-hung:
		case <-r.Done():
		}
		return monitortest.Return(nil)
	})
	a.do("arm 1m", "stop")
	ran := v.resumes()
	a.ask("send query-slow")
	v.Await("query-slow")
	a.signal(unix.SIGKILL)
	if processEnds(t, a.guard, 500*time.Millisecond) {
		t.Fatal("the guard gave up")
	}
	close(hung)
	v.wantResumed(t, ran)
	a.awaitGuardEnd()
	v.AwaitClient(1)
}

func TestGuardKilled(t *testing.T) {
	v := newScriptedVM(t)
	s, g := v.guarded(t)
	v.pause(t, s, g)
	if err := g.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-g.ended
	if err := s.Cont(guardContext(t)); err != nil {
		t.Error(err)
	}
	wantDisarmed(t, g, false)
	if err := g.Arm(time.Minute); !errors.Is(err, ErrPauseGuard) {
		t.Errorf("armed without a guard: %v", err)
	}
}

// awaitHeard returns when the guard has read what it was told.
func awaitHeard(t *testing.T, g *PauseGuard) {
	t.Helper()
	raw, err := g.pipe.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for unread := 1; unread > 0; {
		err := raw.Control(func(fd uintptr) {
			if unread, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ); err != nil {
				t.Error(err)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// A guard that was stopped itself learns first what it missed.
func TestGuardStopped(t *testing.T) {
	tests := map[string]time.Duration{
		"for a while": silence + 300*time.Millisecond,
		"for good":    guardTestLimit, // Disarm kills it
	}
	for name, long := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v := newScriptedVM(t)
			s, g := v.guarded(t)
			v.pause(t, s, g)
			awaitHeard(t, g)
			halt(t, g.cmd.Process.Pid)
			wake := time.AfterFunc(long, func() { _ = g.cmd.Process.Signal(unix.SIGCONT) })
			defer wake.Stop()
			if err := s.Cont(guardContext(t)); err != nil {
				t.Fatal(err)
			}
			wantDisarmed(t, g, false)
			if s.Err() != nil {
				t.Errorf("the session: %v", s.Err())
			}
			for _, c := range v.Commands() {
				if c == "query-status" {
					t.Error("the guard acted")
				}
			}
		})
	}
}

func TestGuardDoesNotStart(t *testing.T) {
	tests := map[string]struct {
		change func(c *GuardConfig)
		want   error
	}{
		"no command":    {func(c *GuardConfig) { c.Command = nil }, ErrPauseGuard},
		"no program":    {func(c *GuardConfig) { c.Command = []string{"/nowhere"} }, os.ErrNotExist},
		"ends at once":  {func(c *GuardConfig) { c.Command = []string{"true"} }, ErrPauseGuard},
		"hangs":         {func(c *GuardConfig) { c.Command = []string{"sleep", "infinity"} }, context.DeadlineExceeded},
		"another QEMU":  {func(c *GuardConfig) { c.StartTime++ }, ErrPauseGuard},
		"no QEMU":       {func(c *GuardConfig) { c.PID = 1 << 22 }, ErrPauseGuard},
		"ended session": {func(c *GuardConfig) { _ = c.Session.Close() }, monitor.ErrClosed},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			v := newScriptedVM(t)
			c := v.vm.config(v.dialed(t))
			test.change(&c)
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_, err := StartGuard(ctx, c)
			if !errors.Is(err, ErrPauseGuard) || !errors.Is(err, test.want) {
				t.Errorf("error %v, want %v", err, test.want)
			}
		})
	}
}

func TestGuardWithoutALimit(t *testing.T) {
	_, g := newScriptedVM(t).guarded(t)
	if err := g.Arm(0); !errors.Is(err, ErrPauseGuard) {
		t.Error(err)
	}
}

// What arming and disarming add to a pause.
func BenchmarkGuard(b *testing.B) {
	srv := monitortest.NewServer(b)
	s, err := monitor.Dial(b.Context(), srv.Path())
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	start, err := startTime(os.Getpid())
	if err != nil {
		b.Fatal(err)
	}
	g, err := StartGuard(b.Context(), GuardConfig{Command: guardCommand(), Session: s, PID: os.Getpid(), StartTime: start})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = g.Close() }()
	var arming time.Duration
	for b.Loop() {
		began := time.Now()
		if err := g.Arm(time.Minute); err != nil {
			b.Fatal(err)
		}
		arming += time.Since(began)
		if _, err := g.Disarm(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(arming.Nanoseconds())/float64(b.N), "ns/arm")
}
