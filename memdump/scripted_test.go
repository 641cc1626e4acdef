package memdump

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/monitor"
	"github.com/vmsnap/vmsnap/monitor/monitortest"
)

// script is a scripted QEMU in the middle of its life.
type script struct {
	*monitortest.Server
	t       *testing.T
	session *monitor.Session

	mu       sync.Mutex
	running  bool
	status   monitor.RunState
	answers  []monitor.Migration // of query-migrate after migrate; the last one stays
	asked    int                 // how many of them were given
	migrated bool
}

// newScript starts a QEMU whose guest runs. After migrate it answers
// query-migrate with these, one after the other.
func newScript(t *testing.T, v monitortest.Version, answers ...monitor.Migration) *script {
	t.Helper()
	q := &script{Server: monitortest.NewServer(t, monitortest.WithVersion(v)), t: t, running: true, status: monitor.RunStateRunning, answers: answers}
	var err error
	if q.session, err = monitor.Dial(q.ctx(), q.Path()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = q.session.Close() })
	q.HandleReturn("query-migrate-capabilities", []map[string]any{
		{"capability": "events", "state": false}, {"capability": "background-snapshot", "state": false},
		{"capability": "pause-before-switchover", "state": false}, {"capability": "multifd", "state": true},
	})
	q.HandleReturn("query-migrate-parameters", map[string]any{"max-bandwidth": 134217728, "downtime-limit": 300, "tls-creds": "ca0", "mode": "normal"})
	q.HandleReturn("query-memory-size-summary", map[string]any{"base-memory": 1 << 20, "plugged-memory": 0})
	q.HandleReturn("human-monitor-command", "")
	q.HandleReturn("query-kvm", map[string]any{"enabled": true, "present": true})
	for _, command := range []string{"migrate-set-capabilities", "migrate-set-parameters", "getfd", "migrate_cancel", "migrate-continue"} {
		q.HandleReturn(command, nil)
	}
	q.Handle("closefd", func(monitortest.Request) monitortest.Reply {
		return monitortest.Fail("GenericError", "File descriptor named 'x' not found")
	})
	q.Handle("query-status", func(monitortest.Request) monitortest.Reply {
		q.mu.Lock()
		defer q.mu.Unlock()
		return monitortest.Return(map[string]any{"running": q.running, "status": q.status})
	})
	q.Handle("stop", q.turns(false, monitor.RunStatePaused, "STOP"))
	q.Handle("cont", q.turns(true, monitor.RunStateRunning, "RESUME"))
	q.Handle("migrate", func(monitortest.Request) monitortest.Reply {
		q.mu.Lock()
		defer q.mu.Unlock()
		q.migrated = true
		return monitortest.Return(nil)
	})
	q.Handle("query-migrate", func(monitortest.Request) monitortest.Reply { return monitortest.Return(q.next()) })
	return q
}

// turns is a handler that changes the run state.
func (q *script) turns(running bool, status monitor.RunState, event string) monitortest.Handler {
	return func(monitortest.Request) monitortest.Reply {
		q.mu.Lock()
		defer q.mu.Unlock()
		q.running, q.status = running, status
		return monitortest.Return(nil).AfterEvents(monitortest.Event{Name: event})
	}
}

// next is the next answer about the migration.
func (q *script) next() monitor.Migration {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.migrated || len(q.answers) == 0 {
		return monitor.Migration{}
	}
	m := q.answers[min(q.asked, len(q.answers)-1)]
	q.asked++
	return m
}

// state returns the run state.
func (q *script) state() monitor.RunState {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.status
}

// set changes the run state.
func (q *script) set(status monitor.RunState, running bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.status, q.running = status, running
}

// begin has a migration under way, with these answers about it from now on.
func (q *script) begin(answers ...monitor.Migration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.migrated, q.answers, q.asked = true, answers, 0
}

func (q *script) ctx() context.Context {
	q.t.Helper()
	ctx, cancel := context.WithTimeout(q.t.Context(), 20*time.Second)
	q.t.Cleanup(cancel)
	return ctx
}

// target makes a file with space reserved.
func (q *script) target(reserve int64) *os.File {
	q.t.Helper()
	f, err := os.Create(filepath.Join(q.t.TempDir(), "memory"))
	if err != nil {
		q.t.Fatal(err)
	}
	q.t.Cleanup(func() { _ = f.Close() })
	if reserve > 0 {
		if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, reserve); err != nil {
			q.t.Fatal(err)
		}
	}
	return f
}

func (q *script) config(strategy Strategy, guard Guard) Config {
	q.t.Helper()
	f := Facts{Version: versionOf(q.session), Status: monitor.RunStateRunning, Running: true, RAM: 1 << 20}
	return Config{Session: q.session, Strategy: strategy, Facts: f, ID: "x", Target: q.target(int64(f.Reserve())), Guard: guard}
}

func (q *script) prepare(c Config) *Save {
	q.t.Helper()
	s, err := Prepare(q.ctx(), c)
	if err != nil {
		q.t.Fatal(err)
	}
	return s
}

// after returns the commands that came after the first of this name.
func (q *script) after(command string) []string {
	q.t.Helper()
	all := q.Commands()
	i := slices.Index(all, command)
	if i < 0 {
		q.t.Fatalf("no %s among %v", command, all)
	}
	return all[i+1:]
}

func noCut(context.Context) error { return nil }

// migration is an answer.
func migration(status monitor.MigrationStatus, pages int64) monitor.Migration {
	m := monitor.Migration{Status: status}
	m.RAM.Normal = pages
	return m
}

// TestNoContBeforeTracking has a QEMU that says "active" for long before it
// tracks writes.
func TestNoContBeforeTracking(t *testing.T) {
	answers := slices.Concat(
		slices.Repeat([]monitor.Migration{migration(monitor.MigrationSetup, 0)}, 5),
		slices.Repeat([]monitor.Migration{migration(monitor.MigrationActive, 0)}, 200),
		[]monitor.Migration{migration(monitor.MigrationActive, 1)},
	)
	t.Run("QEMU leaves it paused", func(t *testing.T) {
		q := newScript(t, monitortest.QEMU100, answers...)
		guard := &countingGuard{}
		s := q.prepare(q.config(Background, guard))
		q.Handle("cont", func(r monitortest.Request) monitortest.Reply {
			q.mu.Lock()
			asked := q.asked
			q.mu.Unlock()
			if asked < len(answers)+1 { // the first that counts, and one more round trip
				t.Errorf("cont after %d of %d answers", asked, len(answers))
			}
			return q.turns(true, monitor.RunStateRunning, "RESUME")(r)
		})
		pause, err := s.Cut(q.ctx(), noCut, nil)
		if err != nil || pause.Length <= 0 {
			t.Errorf("%+v, %v", pause, err)
		}
		if !slices.Contains(q.after("migrate"), "cont") {
			t.Error("the VM was not resumed")
		}
		guard.want(t, "arm", "disarm")
	})
	t.Run("QEMU resumes it", func(t *testing.T) {
		q := newScript(t, monitortest.QEMU72, answers...)
		guard := &countingGuard{}
		s := q.prepare(q.config(Background, guard))
		q.Handle("query-migrate", func(monitortest.Request) monitortest.Reply {
			m := q.next()
			if m.RAM.Normal == 0 {
				return monitortest.Return(m)
			}
			q.mu.Lock()
			defer q.mu.Unlock()
			reply := monitortest.Return(m)
			if !q.running {
				q.running, q.status = true, monitor.RunStateRunning
				reply = reply.AfterEvents(monitortest.Event{Name: "RESUME"})
			}
			return reply
		})
		if _, err := s.Cut(q.ctx(), noCut, nil); err != nil {
			t.Error(err)
		}
		if slices.Contains(q.Commands(), "cont") {
			t.Error("a running VM was resumed")
		}
		guard.want(t, "arm", "disarm")
	})
}

// TestNothingIsSentInThePause holds the pause to what it needs.
func TestNothingIsSentInThePause(t *testing.T) {
	q := newScript(t, monitortest.QEMU100, migration(monitor.MigrationActive, 1))
	s := q.prepare(q.config(Background, &countingGuard{}))
	if _, err := s.Cut(q.ctx(), noCut, func(Progress) { t.Error("progress in a pause") }); err != nil {
		t.Fatal(err)
	}
	want := []string{"migrate", "query-migrate", "query-migrate", "query-status", "cont"}
	if got := q.after("stop"); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestBackgroundFailsEarly(t *testing.T) {
	for _, v := range []monitortest.Version{monitortest.QEMU72, monitortest.QEMU100} {
		failed := monitor.Migration{Status: monitor.MigrationFailed, ErrorDesc: "no space"}
		q := newScript(t, v, migration(monitor.MigrationSetup, 0), failed)
		guard := &countingGuard{}
		s := q.prepare(q.config(Background, guard))
		_, err := s.Cut(q.ctx(), noCut, nil)
		if !errors.Is(err, ErrFailed) || !strings.Contains(err.Error(), "no space") || errors.Is(err, ErrStillPaused) {
			t.Errorf("%v", err)
		}
		if state := q.state(); state != monitor.RunStateRunning {
			t.Errorf("the VM is %s", state)
		}
		guard.want(t, "arm", "disarm")
		if err := s.Cancel(q.ctx(), nil); err != nil {
			t.Error(err)
		}
		if slices.Contains(q.Commands(), "migrate_cancel") {
			t.Error("a save that has failed was cancelled")
		}
		if err := s.Close(q.ctx()); err != nil {
			t.Error(err)
		}
	}
}

// TestTrackingNeverComes has a QEMU that hangs before it tracks writes.
func TestTrackingNeverComes(t *testing.T) {
	q := newScript(t, monitortest.QEMU100, migration(monitor.MigrationActive, 0))
	c := q.config(Background, &countingGuard{})
	c.PauseLimit = 200 * time.Millisecond
	s := q.prepare(c)
	q.HandleReturn("query-migrate-capabilities", []map[string]any{{"capability": "background-snapshot", "state": true}})
	pause, err := s.Cut(q.ctx(), noCut, nil)
	if !errors.Is(err, context.DeadlineExceeded) || pause.Length < c.PauseLimit || q.state() != monitor.RunStateRunning {
		t.Errorf("%+v, %v, the VM is %s", pause, err, q.state())
	}
	c.Guard.(*countingGuard).want(t, "arm", "disarm")
}

func TestSessionEndsInThePause(t *testing.T) {
	q := newScript(t, monitortest.QEMU100)
	guard := &countingGuard{}
	s := q.prepare(q.config(Background, guard))
	q.Handle("migrate", func(monitortest.Request) monitortest.Reply { return monitortest.HangUp() })
	pause, err := s.Cut(q.ctx(), noCut, nil)
	if !errors.Is(err, monitor.ErrGone) || !errors.Is(err, ErrResumed) || !pause.ByGuard {
		t.Errorf("%+v, %v", pause, err)
	}
	guard.want(t, "arm") // it acts when the session ends

	q = newScript(t, monitortest.QEMU100)
	s = q.prepare(q.config(Background, nil))
	q.Handle("stop", func(monitortest.Request) monitortest.Reply { return monitortest.HangUp() })
	if _, err := s.Cut(q.ctx(), noCut, nil); !errors.Is(err, monitor.ErrGone) || !errors.Is(err, ErrStillPaused) {
		t.Error(err)
	}
}

// TestResumedByAnother has another client let the VM run during the cut.
func TestResumedByAnother(t *testing.T) {
	for _, v := range []monitortest.Version{monitortest.QEMU72, monitortest.QEMU100} {
		q := newScript(t, v, migration(monitor.MigrationActive, 1))
		s := q.prepare(q.config(Background, &countingGuard{}))
		q.Handle("migrate", func(monitortest.Request) monitortest.Reply {
			q.mu.Lock()
			defer q.mu.Unlock()
			q.migrated = true
			events := []monitortest.Event{{Name: "RESUME"}, {Name: "STOP"}}
			if v == monitortest.QEMU72 { // which resumes it once itself
				events = append(events, monitortest.Event{Name: "RESUME"})
				q.running, q.status = true, monitor.RunStateRunning
			}
			return monitortest.Return(nil).AfterEvents(events...)
		})
		if _, err := s.Cut(q.ctx(), noCut, nil); !errors.Is(err, ErrResumed) {
			t.Errorf("%d: %v", v.Major, err)
		}
		if state := q.state(); state != monitor.RunStateRunning {
			t.Errorf("the VM is %s", state)
		}
	}
}

// TestCancelByVersion must never cancel a background save before 8.1.
func TestCancelByVersion(t *testing.T) {
	for _, c := range []struct {
		version monitortest.Version
		cancel  bool
	}{
		{monitortest.QEMU72, false}, {monitortest.Version{Major: 6, Minor: 0}, false}, {monitortest.Version{Major: 8, Minor: 0, Micro: 9}, false},
		{monitortest.Version{Major: 8, Minor: 1}, true}, {monitortest.QEMU100, true},
	} {
		q := newScript(t, c.version, migration(monitor.MigrationActive, 1))
		s := q.prepare(q.config(Background, nil))
		if _, err := s.Cut(q.ctx(), noCut, nil); err != nil {
			t.Fatal(err)
		}
		q.Handle("migrate_cancel", func(monitortest.Request) monitortest.Reply {
			q.begin(migration(monitor.MigrationCancelled, 1))
			return monitortest.Return(nil)
		})
		active := migration(monitor.MigrationActive, 1)
		active.RAM.Total = 1 // without which there is no progress
		q.begin(active)
		looks := 0
		err := s.Cancel(q.ctx(), func(Progress) {
			if looks++; looks == 3 { // it comes to its end
				q.begin(migration(monitor.MigrationCompleted, 1))
			}
		})
		if err != nil {
			t.Errorf("%+v: %v", c.version, err)
		}
		if got := slices.Contains(q.Commands(), "migrate_cancel"); got != c.cancel {
			t.Errorf("%+v: migrate_cancel was sent: %v", c.version, got)
		}
		if m := q.next(); (m.Status == monitor.MigrationCompleted) == c.cancel {
			t.Errorf("%+v: ended as %s", c.version, m.Status)
		}
	}
}

// TestCancelOfAFailure tells of a save that may have frozen the guest.
func TestCancelOfAFailure(t *testing.T) {
	q := newScript(t, monitortest.QEMU72, migration(monitor.MigrationActive, 1))
	s := q.prepare(q.config(Background, nil))
	if _, err := s.Cut(q.ctx(), noCut, nil); err != nil {
		t.Fatal(err)
	}
	q.begin(migration(monitor.MigrationActive, 1), migration(monitor.MigrationFailed, 1))
	if err := s.Cancel(q.ctx(), nil); !errors.Is(err, ErrFailed) {
		t.Error(err)
	}
}

// TestNoteComesFirst verifies that settings are durable before any is changed.
func TestNoteComesFirst(t *testing.T) {
	q := newScript(t, monitortest.QEMU100)
	c := q.config(Precopy, nil)
	full := errors.New("the disk is full")
	c.Note = func(Settings) error { return full }
	if _, err := Prepare(q.ctx(), c); !errors.Is(err, full) {
		t.Error(err)
	}
	for _, command := range []string{"migrate-set-capabilities", "migrate-set-parameters", "getfd"} {
		if slices.Contains(q.Commands(), command) {
			t.Errorf("%s was sent", command)
		}
	}
	var noted Settings
	c.Note = func(s Settings) error {
		noted = s
		return nil
	}
	s := q.prepare(c)
	wantCaps := map[string]bool{"events": false, "pause-before-switchover": false, "multifd": true}
	wantPars := map[string]json.RawMessage{"max-bandwidth": json.RawMessage("134217728"), "downtime-limit": json.RawMessage("300"), "tls-creds": json.RawMessage(`"ca0"`)}
	want := Settings{Capabilities: wantCaps, Parameters: wantPars, FD: "vmsnap-x", Running: true}
	if diff := cmp.Diff(want, noted); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if diff := cmp.Diff(want, s.Settings()); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	// They survive a journal.
	b, err := json.Marshal(noted)
	if err != nil {
		t.Fatal(err)
	}
	var again Settings
	if err := json.Unmarshal(b, &again); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, again); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

// TestPrepareFails verifies that everything is put back.
func TestPrepareFails(t *testing.T) {
	for _, refused := range []string{"migrate-set-parameters", "getfd"} {
		q := newScript(t, monitortest.QEMU100)
		c := q.config(Precopy, nil)
		refusals := 0
		q.Handle(refused, func(monitortest.Request) monitortest.Reply {
			if refusals++; refusals == 1 {
				return monitortest.Fail("GenericError", "no")
			}
			return monitortest.Return(nil)
		})
		_, err := Prepare(q.ctx(), c)
		var command *monitor.CommandError
		if !errors.As(err, &command) || command.Command != refused {
			t.Error(err)
		}
		sets := q.after("query-migrate-parameters")
		if sets[len(sets)-1] != "closefd" || slices.Index(sets, "migrate-set-capabilities") == slices.Index(sets[1:], "migrate-set-capabilities")+1 {
			t.Errorf("%s: %v", refused, sets)
		}
	}
	// The run state has changed since the strategy was chosen.
	q := newScript(t, monitortest.QEMU100)
	c := q.config(Stopped, nil)
	q.set(monitor.RunStatePrelaunch, false)
	c.Facts.Status, c.Facts.Running = monitor.RunStatePaused, false
	var unsuitable *UnsuitableError
	if _, err := Prepare(q.ctx(), c); !errors.As(err, &unsuitable) {
		t.Error(err)
	}
}

func TestRestoreWhileBusy(t *testing.T) {
	q := newScript(t, monitortest.QEMU100)
	q.begin(migration(monitor.MigrationActive, 1))
	s := Settings{Capabilities: map[string]bool{"multifd": true}}
	if err := s.Restore(q.ctx(), q.session); !errors.Is(err, ErrBusy) {
		t.Error(err)
	}
	if slices.Contains(q.Commands(), "migrate-set-capabilities") {
		t.Error("settings were changed under a migration")
	}
}

// TestPrecopyObstacle: which QEMU misses changes of the memory, and of which guests.
func TestPrecopyObstacle(t *testing.T) {
	for _, c := range []struct {
		version  monitortest.Version
		kvm      bool
		obstacle bool
	}{
		{monitortest.QEMU72, false, true}, {monitortest.QEMU72, true, false},
		{monitortest.Version{Major: 8, Minor: 2, Micro: 10}, false, true},
		{monitortest.Version{Major: 9}, false, false}, {monitortest.QEMU100, true, false},
	} {
		q := newScript(t, c.version)
		q.HandleReturn("query-kvm", map[string]any{"enabled": c.kvm, "present": true})
		why, err := precopyObstacle(q.ctx(), q.session, versionOf(q.session))
		if err != nil || (why != "") != c.obstacle {
			t.Errorf("%+v: %q, %v", c, why, err)
		}
	}
}
