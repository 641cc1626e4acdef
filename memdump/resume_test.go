package memdump

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
	"github.com/vmsnap/vmsnap/monitor/monitortest"
)

func TestResume(t *testing.T) {
	running, paused := monitor.RunStateRunning, monitor.RunStatePaused
	tests := map[string]struct {
		status     monitor.RunState
		migration  monitor.MigrationStatus
		background bool
		resumed    bool
		cancels    int
		then       monitor.RunState
	}{
		"running":                    {status: running},
		"asleep by its own will":     {status: monitor.RunStateSuspended, then: monitor.RunStateSuspended},
		"paused":                     {status: paused, resumed: true},
		"reset while paused":         {status: monitor.RunStatePrelaunch, resumed: true},
		"saved":                      {status: monitor.RunStatePostMigrate, migration: monitor.MigrationCompleted, resumed: true},
		"before switchover":          {status: monitor.RunStateFinishMigrate, migration: monitor.MigrationPreSwitch, resumed: true, cancels: 1},
		"being switched over":        {status: monitor.RunStateFinishMigrate, migration: monitor.MigrationDevice, resumed: true, cancels: 1},
		"running towards switchover": {status: running, migration: monitor.MigrationActive, cancels: 1},
		"beginning":                  {status: running, migration: monitor.MigrationSetup, cancels: 1},
		"saved while paused":         {status: paused, migration: monitor.MigrationActive, resumed: true, cancels: 1},
		"in a background save":       {status: running, migration: monitor.MigrationActive, background: true},
		"paused in a background save": {
			status: paused, migration: monitor.MigrationActive, background: true, resumed: true},
		"failed": {status: paused, migration: monitor.MigrationFailed, resumed: true},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			v := newScriptedVM(t)
			v.put(test.status, test.migration, test.background)
			if test.then == "" {
				test.then = running
			}
			resumed, err := Resume(guardContext(t), v.dialed(t))
			if err != nil || resumed != test.resumed {
				t.Errorf("resumed %t, error %v, want %t", resumed, err, test.resumed)
			}
			v.mu.Lock()
			defer v.mu.Unlock()
			if v.cancels != test.cancels || v.status != test.then {
				t.Errorf("cancelled %d times, is %s; want %d, %s", v.cancels, v.status, test.cancels, test.then)
			}
		})
	}
}

func TestResumeLeavesAlone(t *testing.T) {
	for _, status := range []monitor.RunState{
		monitor.RunStateInMigrate, monitor.RunStateIOError, monitor.RunStateShutdown, monitor.RunStateGuestPanicked,
		monitor.RunStateInternalError, monitor.RunStateWatchdog, monitor.RunStateDebug, "colo",
	} {
		t.Run(string(status), func(t *testing.T) {
			v := newScriptedVM(t)
			v.put(status, "", false)
			resumed, err := Resume(guardContext(t), v.dialed(t))
			var state *StateError
			if resumed || !errors.As(err, &state) || state.State != status || v.state() != status {
				t.Errorf("resumed %t, error %v, is %s", resumed, err, v.state())
			}
		})
	}
}

// QEMU takes its time to cancel, and the VM runs only after it.
func TestResumeWaits(t *testing.T) {
	v := newScriptedVM(t)
	v.put(monitor.RunStateFinishMigrate, monitor.MigrationPreSwitch, false)
	v.answer("migrate_cancel", func() any { v.cancels++; v.migration = monitor.MigrationCancelling; return nil })
	s := v.dialed(t)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Resume(ctx, s); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	done := make(chan error, 1)
	go func() { _, err := Resume(guardContext(t), s); done <- err }()
	v.Await("query-migrate")
	v.put(monitor.RunStateRunning, monitor.MigrationCancelled, false)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestResumeRefused(t *testing.T) {
	v := newScriptedVM(t)
	v.put(monitor.RunStatePaused, "", false)
	v.Handle("cont", func(monitortest.Request) monitortest.Reply {
		return monitortest.Fail("GenericError", "Resetting the Virtual Machine is required")
	})
	var refused *monitor.CommandError
	if _, err := Resume(guardContext(t), v.dialed(t)); !errors.As(err, &refused) {
		t.Errorf("error %v", err)
	}
}

// The words of the pipe come from another process of ours, but a guard that is
// confused by them would leave a guest paused.
func FuzzGuardWords(f *testing.F) {
	for _, seed := range []string{"arm 1000\nbeat\ndisarm\n", "arm -1\n", "arm 99999999999999999999\n\n\narm\n", "yield"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		p := &wordPipe{fd: -1, unread: data}
		for n := 0; ; n++ {
			word, ok := p.word()
			if !ok {
				break
			}
			if limit, ok := parseArm(word); ok && limit <= 0 {
				t.Fatalf("%q is a limit of %s", word, limit)
			}
			if n > len(data) {
				t.Fatal("words without an end")
			}
		}
	})
}

// Recovery resumes what agent and guard have both left.
func TestQEMUResume(t *testing.T) {
	versions, err := testvm.Versions()
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range versions {
		t.Run("qemu-"+q.Name, func(t *testing.T) {
			m := startGuardedQEMU(t, q)
			ctx := guardContext(t)
			for _, want := range []bool{true, false} { // -S is a pause, too
				if resumed, err := Resume(ctx, m.Session); err != nil || resumed != want {
					t.Fatalf("resumed %t, error %v", resumed, err)
				}
				m.wantStatus(monitor.RunStateRunning)
			}
			if err := m.Stop(ctx); err != nil {
				t.Fatal(err)
			}
			if err := m.SystemReset(ctx); err != nil {
				t.Fatal(err)
			}
			m.await("reset", time.Now(), func() bool { return m.status().Status == monitor.RunStatePrelaunch })
			if resumed, err := Resume(ctx, m.Session); err != nil || !resumed {
				t.Fatalf("resumed %t, error %v", resumed, err)
			}
			m.wantStatus(monitor.RunStateRunning)
		})
	}
}
