package memdump

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

// TestQEMUMemoryAndDisksAreOfOneInstant saves a guest that counts in memory and
// on two disks while it changes its memory, by each strategy, and has a fresh
// QEMU run on from there.
func TestQEMUMemoryAndDisksAreOfOneInstant(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := startSavedGuest(t, q, testvm.Config{})
		if err := g.StartCounter(g.ctx()); err != nil {
			t.Fatal(err)
		}
		if err := g.Dirty(g.ctx(), 32<<20, 50<<20); err != nil {
			t.Fatal(err)
		}
		strategies := []Strategy{Background, Precopy, Stopped, Background}
		if g.probe().Inexact != "" {
			strategies = []Strategy{Background, Stopped, Background}
		}
		for _, strategy := range strategies {
			g.ownersSettings()
			before := g.settings()
			c := g.config(strategy)
			var noted Settings
			c.Note = func(s Settings) error { noted = s; return nil }
			s := g.prepare(c)
			if noted.FD == "" || len(noted.Capabilities) < 4 || !noted.Running {
				t.Errorf("%s: noted %+v", strategy, noted)
			}
			first := g.counts(1)
			var seen []Progress
			progress := func(p Progress) { seen = append(seen, p) }
			pause, err := s.Cut(g.ctx(), g.cutDisks, progress)
			if err != nil {
				t.Fatal(err)
			}
			g.wantStatus(monitor.RunStateRunning)
			if err := s.Wait(g.ctx(), progress); err != nil {
				t.Fatal(err)
			}
			g.closed(s, before)
			g.counts(10)
			if n := len(seen); n == 0 || seen[n-1].Remaining != 0 || seen[n-1].Written == 0 || seen[n-1].Total < 192<<20 {
				t.Errorf("%s: progress %+v", strategy, seen)
			}
			if pause.Length <= 0 || pause.Length > 5*time.Second || pause.ByGuard || time.Since(pause.Began) < pause.Length {
				t.Errorf("%s: pause %+v", strategy, pause)
			}
			calls := []string{"arm", "disarm"}
			if strategy == Precopy {
				calls = []string{"arm", "arm", "disarm"}
			}
			c.Guard.(*countingGuard).want(t, calls...)
			t.Logf("%s: pause %v, %+v", strategy, pause.Length, seen[len(seen)-1])

			g.load(c.Target)
			if loaded := g.counts(20); loaded < first {
				t.Errorf("%s: the counter goes on at %d; it stood at %d before the cut", strategy, loaded, first)
			}
		}
	})
}

// TestQEMUPrecopyOfAnEmulatedGuest is refused where the memory would not be whole.
func TestQEMUPrecopyOfAnEmulatedGuest(t *testing.T) {
	eachStill(t, func(t *testing.T, q *still) {
		if err := q.Cont(q.ctx()); err != nil {
			t.Fatal(err)
		}
		f := q.probe()
		_, err := Choose(f, Precopy)
		var unsuitable *UnsuitableError
		if lossy := !f.Version.AtLeast(9, 0); errors.As(err, &unsuitable) != lossy || !lossy && err != nil {
			t.Errorf("%s: %v", f.Version, err)
		}
	})
}

// TestQEMUWhatComesBetween has one guest for each QEMU, which is saved by each
// strategy while something comes between.
func TestQEMUWhatComesBetween(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := startSavedGuest(t, q, testvm.Config{})
		for _, story := range []struct {
			name string
			run  func(g *savedGuest, t *testing.T)
		}{
			{"the cut fails", (*savedGuest).cutFails},
			{"the guard resumes", (*savedGuest).guardResumed},
			{"a guarded cut", (*savedGuest).guardedCut},
		} {
			t.Run(story.name, func(t *testing.T) {
				g.t = t
				story.run(g, t)
			})
			g.t = t
			if t.Failed() {
				t.FailNow() // the guest may be paused
			}
		}
	})
}

// cutFails has the disks refuse: the guest runs on, everything is as
// before, and it can be saved again.
func (g *savedGuest) cutFails(t *testing.T) {
	refusal := errors.New("no such disk")
	for _, strategy := range []Strategy{Background, Precopy, Stopped} {
		before := g.settings()
		c := g.config(strategy)
		s := g.prepare(c)
		var during monitor.Status
		_, err := s.Cut(g.ctx(), func(ctx context.Context) (err error) {
			during, err = g.session.QueryStatus(ctx)
			return errors.Join(refusal, err)
		}, nil)
		if !errors.Is(err, refusal) || errors.Is(err, ErrStillPaused) {
			t.Errorf("%s: %v", strategy, err)
		}
		if during.Running {
			t.Errorf("%s: the guest runs during the cut (%s)", strategy, during.Status)
		}
		g.wantStatus(monitor.RunStateRunning)
		if err := s.Cancel(g.ctx(), nil); err != nil {
			t.Error(err)
		}
		g.closed(s, before)
		c.Guard.(*countingGuard).mu.Lock()
		if calls := c.Guard.(*countingGuard).calls; calls[len(calls)-1] != "disarm" {
			t.Errorf("%s: the guard was told to %v", strategy, calls)
		}
		c.Guard.(*countingGuard).mu.Unlock()
		if _, err := g.Exec(g.ctx(), "true"); err != nil {
			t.Error(err)
		}
	}
}

// TestQEMUCancel ends saves that are under way.
func TestQEMUCancel(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := startSavedGuest(t, q, testvm.Config{MemoryMiB: 512})
		if err := g.Dirty(g.ctx(), 300<<20, 100<<20); err != nil {
			t.Fatal(err)
		}
		before := g.settings()
		s := g.prepare(g.config(Background))
		if _, err := s.Cut(g.ctx(), g.cutDisks, nil); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(g.ctx()); !errors.Is(err, ErrBusy) {
			t.Errorf("closed while it is under way: %v", err)
		}
		if _, err := Prepare(g.ctx(), Config{Session: g.session, Strategy: Background, Facts: Facts{Running: true, Status: monitor.RunStateRunning}}); !errors.Is(err, ErrBusy) {
			t.Errorf("prepared while another is under way: %v", err)
		}
		if err := s.Cancel(g.ctx(), nil); err != nil {
			t.Fatal(err)
		}
		m, err := g.session.QueryMigrate(g.ctx())
		want := monitor.MigrationCancelled
		if q.Name == "7.2" {
			want = monitor.MigrationCompleted // anything else would freeze the guest
		}
		if err != nil || m.Status != want {
			t.Errorf("the migration is %s, %v; want %s", m.Status, err, want)
		}
		g.closed(s, before)
		if _, err := g.Exec(g.ctx(), "true"); err != nil {
			t.Error(err)
		}

		for _, strategy := range []Strategy{Precopy, Stopped} {
			s := g.prepare(g.config(strategy))
			ctx, cancel := context.WithCancelCause(g.ctx())
			mine := errors.New("mine")
			_, err := s.Cut(ctx, g.cutDisks, func(Progress) { cancel(mine) })
			if !errors.Is(err, mine) {
				t.Errorf("%s: %v", strategy, err)
			}
			g.wantStatus(monitor.RunStateRunning)
			if err := s.Cancel(g.ctx(), nil); err != nil {
				t.Error(err)
			}
			g.closed(s, before)
			if _, err := g.Exec(g.ctx(), "true"); err != nil {
				t.Error(err)
			}
		}
	})
}

// guardResumed has the guard say that it has resumed the VM: the memory
// is worth nothing then.
func (g *savedGuest) guardResumed(t *testing.T) {
	for _, strategy := range []Strategy{Background, Precopy, Stopped} {
		before := g.settings()
		c := g.config(strategy)
		c.Guard = &countingGuard{acts: true}
		s := g.prepare(c)
		pause, err := s.Cut(g.ctx(), g.cutDisks, nil)
		if !errors.Is(err, ErrResumed) || !pause.ByGuard {
			t.Errorf("%s: %+v, %v", strategy, pause, err)
		}
		if err := s.Cancel(g.ctx(), nil); err != nil {
			t.Error(err)
		}
		g.closed(s, before)

		// Another client lets the guest run within the cut. QEMU does not
		// allow it while it waits before its switchover.
		if strategy != Precopy {
			c = g.config(strategy)
			s = g.prepare(c)
			pause, err = s.Cut(g.ctx(), func(ctx context.Context) error { return g.session.Cont(ctx) }, nil)
			if !errors.Is(err, ErrResumed) || pause.ByGuard {
				t.Errorf("%s: resumed by another: %+v, %v", strategy, pause, err)
			}
			if err := s.Cancel(g.ctx(), nil); err != nil {
				t.Error(err)
			}
			g.closed(s, before)
			g.wantStatus(monitor.RunStateRunning)
		}

		c = g.config(strategy)
		c.Guard = &countingGuard{refuses: ErrPauseGuard}
		s = g.prepare(c)
		if _, err := s.Cut(g.ctx(), g.cutDisks, nil); !errors.Is(err, ErrPauseGuard) {
			t.Errorf("%s: not guarded: %v", strategy, err)
		}
		g.closed(s, before)
	}
}

// TestQEMUPausedVMStaysPaused saves a VM that its owner has paused.
func TestQEMUPausedVMStaysPaused(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := startSavedGuest(t, q, testvm.Config{})
		if err := g.StartCounter(g.ctx()); err != nil {
			t.Fatal(err)
		}
		g.counts(10)
		if err := g.session.Stop(g.ctx()); err != nil {
			t.Fatal(err)
		}
		before := g.settings()
		choice, err := Choose(g.probe(), "")
		if err != nil || choice.Strategy != Stopped {
			t.Fatalf("%+v, %v", choice, err)
		}
		left := monitor.RunStatePaused
		if q.Name == "7.2" {
			left = monitor.RunStatePostMigrate
		}
		if warned := len(choice.Warnings) > 0; warned != (left == monitor.RunStatePostMigrate) {
			t.Errorf("warnings %+v", choice.Warnings)
		}
		c := g.config(Stopped)
		s := g.prepare(c)
		pause, err := s.Cut(g.ctx(), g.cutDisks, nil)
		if err != nil || pause.Length != 0 {
			t.Fatalf("%+v, %v", pause, err)
		}
		if err := s.Wait(g.ctx(), nil); err != nil {
			t.Fatal(err)
		}
		g.closed(s, before)
		g.wantStatus(left)
		c.Guard.(*countingGuard).want(t)
		if left == monitor.RunStatePostMigrate {
			var unsuitable *UnsuitableError
			if _, err := Choose(g.probe(), ""); !errors.As(err, &unsuitable) || !strings.Contains(err.Error(), "resume it first") {
				t.Errorf("a second save: %v", err)
			}
		}
		if err := g.session.Cont(g.ctx()); err != nil {
			t.Fatal(err)
		}
		g.counts(10)
		g.load(c.Target)
		g.counts(20)
	})
}
