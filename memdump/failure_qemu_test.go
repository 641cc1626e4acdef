package memdump

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

// smallDisk mounts a file system of so many bytes in memory.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// TestQEMUDiskFull saves into a file that has no space. Where that could freeze
// the guest it is not begun; elsewhere the guest runs on.
func TestQEMUDiskFull(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := startSavedGuest(t, q, testvm.Config{})
		if err := g.StartCounter(g.ctx()); err != nil {
			t.Fatal(err)
		}
		if err := g.Dirty(g.ctx(), 64<<20, 100<<20); err != nil {
			t.Fatal(err)
		}
		dir := smallDisk(t, "16M")
		for _, strategy := range []Strategy{Background, Precopy, Stopped} {
			before := g.settings()
			full, err := os.Create(filepath.Join(dir, string(strategy)))
			if err != nil {
				t.Fatal(err)
			}
			c := g.config(strategy)
			c.Target = full
			s, err := Prepare(g.ctx(), c)
			if strategy == Background && q.Name == "7.2" {
				if !errors.Is(err, ErrUnsafeTarget) {
					t.Errorf("a save that could freeze the guest: %v", err)
				}
				if err := full.Close(); err != nil {
					t.Error(err)
				}
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			_, err = s.Cut(g.ctx(), g.cutDisks, nil)
			if err == nil {
				err = s.Wait(g.ctx(), nil)
			}
			if !errors.Is(err, ErrFailed) {
				t.Errorf("%s: %v", strategy, err)
			}
			if !strings.Contains(err.Error(), "No space left") {
				t.Errorf("%s: the error does not name the cause: %v", strategy, err)
			}
			g.wantStatus(monitor.RunStateRunning)
			g.counts(5)
			if err := s.Cancel(g.ctx(), nil); err != nil {
				t.Error(err)
			}
			g.closed(s, before)
			if err := errors.Join(full.Close(), os.Remove(full.Name())); err != nil {
				t.Error(err)
			}
		}
	})
}

// TestQEMUAdopt has a save go on whose agent is gone, and another take it over.
func TestQEMUAdopt(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := startSavedGuest(t, q, testvm.Config{MemoryMiB: 512})
		if err := g.StartCounter(g.ctx()); err != nil {
			t.Fatal(err)
		}
		if err := g.Dirty(g.ctx(), 200<<20, 20<<20); err != nil {
			t.Fatal(err)
		}
		g.ownersSettings()
		before := g.settings()
		c := g.config(Background)
		var noted Settings
		c.Note = func(s Settings) error { noted = s; return nil }
		s := g.prepare(c)
		if _, err := s.Cut(g.ctx(), g.cutDisks, nil); err != nil {
			t.Fatal(err)
		}
		g.dial()
		adopted, err := Adopt(g.ctx(), g.session, noted, Background)
		if err != nil {
			t.Fatal(err)
		}
		if err := adopted.Wait(g.ctx(), nil); err != nil {
			t.Fatal(err)
		}
		g.closed(adopted, before)

		// An agent that died before its precopy save came to the cut.
		c = g.config(Precopy)
		c.Note = func(s Settings) error { noted = s; return nil }
		s = g.prepare(c)
		reached := make(chan struct{})
		dead := errors.New("dead")
		ctx, kill := context.WithCancelCause(g.ctx())
		_, err = s.Cut(ctx, func(context.Context) error {
			close(reached)
			_ = g.session.Close()
			kill(dead)
			return dead
		}, nil)
		<-reached
		if !errors.Is(err, dead) || !errors.Is(err, ErrResumed) { // by a guard, were it one
			t.Errorf("the agent's last words: %v", err)
		}
		g.session = nil
		g.dial()
		if adopted, err = Adopt(g.ctx(), g.session, noted, Precopy); err != nil {
			t.Fatal(err)
		}
		if err := adopted.Cancel(g.ctx(), nil); err != nil {
			t.Error(err)
		}
		g.wantStatus(monitor.RunStateRunning)
		g.closed(adopted, before)
		g.counts(5)
	})
}

// TestQEMUNotConverging saves by precopy what changes faster than it can be
// saved.
func TestQEMUNotConverging(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := startSavedGuest(t, q, testvm.Config{MemoryMiB: 320})
		if err := g.Dirty(g.ctx(), 64<<20, 4<<30); err != nil {
			t.Fatal(err)
		}
		c := g.config(Precopy)
		c.MaxPause = time.Millisecond
		before := g.settings()
		s := g.prepare(c)
		// Whatever else the machine does, the guest is faster than this.
		if err := g.session.Execute(g.ctx(), "migrate-set-parameters", map[string]int64{parMaxBandwidth: 256 << 20}, nil); err != nil {
			t.Fatal(err)
		}
		passes := 0
		if _, err := s.Cut(g.ctx(), noCut, func(p Progress) { passes = max(passes, p.Pass) }); !errors.Is(err, ErrNotConverging) {
			t.Errorf("after %d passes: %v", passes, err)
		}
		g.wantStatus(monitor.RunStateRunning)
		g.closed(s, before)

		// With no limit the pause becomes as long as it has to be.
		s = g.prepare(g.config(Precopy))
		pause, err := s.Cut(g.ctx(), noCut, func(p Progress) { passes = max(passes, p.Pass) })
		if err != nil {
			t.Errorf("after %d passes: %v", passes, err)
		}
		t.Logf("pause %s", pause.Length)
		g.closed(s, before)
	})
}

// guardedCut saves under a real guard, and then loses its session in the
// pause: the guard lets the guest run.
func (g *savedGuest) guardedCut(t *testing.T) {
	for _, strategy := range []Strategy{Background, Precopy, Stopped} {
		before := g.settings()
		c := g.config(strategy)
		guard := g.guarded()
		c.Guard = guard
		s := g.prepare(c)
		pause, err := s.Cut(g.ctx(), g.cutDisks, nil)
		if err == nil {
			err = s.Wait(g.ctx(), nil)
		}
		if err := errors.Join(err, guard.Close()); err != nil || pause.ByGuard {
			t.Fatalf("%s: %+v, %v", strategy, pause, err)
		}
		g.closed(s, before)

		c = g.config(strategy)
		guard = g.guarded()
		c.Guard = guard
		s = g.prepare(c)
		noted := s.Settings()
		pause, err = s.Cut(g.ctx(), func(context.Context) error { return g.session.Close() }, nil)
		if !errors.Is(err, ErrResumed) || !pause.ByGuard {
			t.Errorf("%s: %+v, %v", strategy, pause, err)
		}
		if err := guard.Close(); err != nil {
			t.Error(err)
		}
		g.dial()
		g.wantStatus(monitor.RunStateRunning)
		adopted, err := Adopt(g.ctx(), g.session, noted, strategy)
		if err == nil {
			err = adopted.Cancel(g.ctx(), nil)
		}
		if err != nil {
			t.Error(err)
		}
		g.closed(adopted, before)
		if _, err := g.Exec(g.ctx(), "true"); err != nil {
			t.Error(err)
		}
	}
}

// guarded starts a guard.
func (g *savedGuest) guarded() *PauseGuard {
	g.t.Helper()
	start, err := startTime(g.PID())
	if err != nil {
		g.t.Fatal(err)
	}
	guard, err := StartGuard(g.ctx(), GuardConfig{
		Command: guardCommand(), Session: g.session, Sockets: []string{g.QMPSocket()}, VM: g.Name, PID: g.PID(), StartTime: start,
	})
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { _ = guard.Close() })
	return guard
}
