package memdump

import (
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

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

// loseFirst loses the first answer to a command, which is carried out.
func (v *scriptedVM) loseFirst(command string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.lost = command
}
