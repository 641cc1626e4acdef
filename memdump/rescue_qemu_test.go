package memdump

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

// stuckGuest is a guest whose background saves are made to go wrong by another
// client than ours: nothing of ours would let them.
type stuckGuest struct {
	*savedGuest
	writers *testvm.Writers
	start   uint64
}

func startStuckGuest(t *testing.T, q testvm.QEMU) *stuckGuest {
	t.Helper()
	g := &stuckGuest{savedGuest: startSavedGuest(t, q, testvm.Config{MemoryMiB: 512})}
	if err := g.Dirty(g.ctx(), 200<<20, 50<<20); err != nil {
		t.Fatal(err)
	}
	var err error
	if g.start, err = startTime(g.PID()); err != nil {
		t.Fatal(err)
	}
	g.capability(true)
	return g
}

func (g *stuckGuest) startWriters() {
	g.t.Helper()
	var err error
	if g.writers, err = g.StartWriters(g.ctx()); err != nil {
		g.t.Fatal(err)
	}
}

func (g *stuckGuest) suspect() Suspect {
	return Suspect{PID: g.PID(), StartTime: g.start, Migration: g.session.QueryMigrate}
}

// silent is a suspect whose monitor is another client's.
func (g *stuckGuest) silent() Suspect {
	s := g.suspect()
	s.Migration = func(context.Context) (monitor.Migration, error) {
		return monitor.Migration{}, fmt.Errorf("monitor: %w", monitor.ErrBusy)
	}
	return s
}

func (g *stuckGuest) capability(on bool) {
	g.t.Helper()
	if err := setCapabilities(g.ctx(), g.session, map[string]bool{capBackground: on}); err != nil {
		g.t.Fatal(err)
	}
}

// migrate begins a background save.
func (g *stuckGuest) migrate(target *os.File) {
	g.t.Helper()
	if err := g.session.ExecuteWithFile(g.ctx(), "getfd", map[string]string{"fdname": "target"}, nil, target); err != nil {
		g.t.Fatal(err)
	}
	if err := g.session.Execute(g.ctx(), "migrate", map[string]string{"uri": "fd:target"}, nil); err != nil {
		g.t.Fatal(err)
	}
}

func (g *stuckGuest) await(what string, met func(monitor.Migration) bool) {
	g.t.Helper()
	for ctx := g.ctx(); ; {
		m, err := g.session.QueryMigrate(ctx)
		if err != nil {
			g.t.Fatalf("await %s: %v", what, err)
		}
		if met(m) {
			return
		}
		<-time.After(2 * time.Millisecond) // no event without the capability
	}
}

func (g *stuckGuest) awaitStatus(want monitor.MigrationStatus) {
	g.t.Helper()
	g.await(string(want), func(m monitor.Migration) bool {
		if !underWay(m.Status) && m.Status != want {
			g.t.Fatalf("the save is %s, not %s", m.Status, want)
		}
		return m.Status == want
	})
}

// awaitTracked returns when pages are saved, and so writes tracked.
func (g *stuckGuest) awaitTracked() {
	g.t.Helper()
	g.await("pages", func(m monitor.Migration) bool { return m.RAM.Normal+m.RAM.Duplicate > 0 })
}

// awaitEnd returns when a save has gone wrong. Before QEMU 8.1 the main loop may
// stand still from then on, if a request of the guest was in flight.
func (g *stuckGuest) awaitEnd(want monitor.MigrationStatus) {
	g.t.Helper()
	for answers := true; answers; {
		var m monitor.Migration
		m, answers = g.answers()
		if answers && !underWay(m.Status) {
			if m.Status != want {
				g.t.Fatalf("the save is %s, not %s", m.Status, want)
			}
			return
		}
	}
	if !mayHang(versionOf(g.session)) {
		g.t.Fatal("QEMU does not answer")
	}
}

// answers tells whether the main loop answers within a second.
func (g *stuckGuest) answers() (monitor.Migration, bool) {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(g.ctx(), time.Second)
	defer cancel()
	m, err := g.session.QueryMigrate(ctx)
	if err != nil && !errors.Is(err, monitor.ErrUnresponsive) {
		g.t.Fatal(err)
	}
	return m, err == nil
}

// full has a save fail on a full file system.
func (g *stuckGuest) full() {
	g.t.Helper()
	dir := filepath.Join(g.dir, "full")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		g.t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=16m"); err != nil {
		g.t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "memory"))
	if err != nil {
		g.t.Fatal(err)
	}
	g.migrate(f)
	g.awaitEnd(monitor.MigrationFailed)
	if err := errors.Join(f.Close(), unix.Unmount(dir, unix.MNT_DETACH)); err != nil {
		g.t.Fatal(err)
	}
}

// cancelled has a save cancelled halfway.
func (g *stuckGuest) cancelled() {
	g.t.Helper()
	g.migrate(g.target(1))
	g.awaitTracked()
	if err := g.session.Execute(g.ctx(), "migrate_cancel", nil, nil); err != nil {
		g.t.Fatal(err)
	}
	g.awaitEnd(monitor.MigrationCancelled)
}

// wantStandsStill verifies that the guest does nothing for a second.
func (g *stuckGuest) wantStandsStill() {
	g.t.Helper()
	for began := time.Now(); time.Since(began) < 20*time.Second; <-time.After(20 * time.Millisecond) {
		if gap := g.writers.Gaps().Heartbeat; gap.Length() > time.Second && time.Since(gap.To) < 100*time.Millisecond {
			return
		}
	}
	g.t.Fatal("the guest runs on")
}

// wantRuns verifies that the guest computes, and writes to its disks.
func (g *stuckGuest) wantRuns() {
	g.t.Helper()
	began := time.Now()
	if err := g.writers.AwaitWrites(g.ctx(), 5); err != nil {
		g.t.Fatalf("the guest's disks stand still: %v", err)
	}
	took := time.Since(began)
	g.writers.Reset()
	if out, err := g.Exec(g.ctx(), "echo alive"); err != nil || out != "alive\n" {
		g.t.Fatalf("the guest does not answer: %q, %v", out, err)
	}
	g.wantStatus(monitor.RunStateRunning)
	g.t.Logf("the guest wrote to its disks %v after it was looked at", took)
}

func (g *stuckGuest) wantStuck(s Suspect) StuckResult {
	g.t.Helper()
	r, err := Stuck(g.ctx(), s)
	if err != nil || !r.Stuck || r.Reason == "" || r.Protected < 512<<20 {
		g.t.Errorf("stuck: %+v, %v", r, err)
	}
	return r
}

// wantHealthy verifies that the VM is found well and cannot be rescued.
func (g *stuckGuest) wantHealthy(s Suspect, reason string) {
	g.t.Helper()
	if r, err := Stuck(g.ctx(), s); err != nil || r.Stuck || !strings.Contains(r.Reason, reason) {
		g.t.Errorf("stuck: %+v, %v; want %q", r, err, reason)
	}
	if r, err := Rescue(g.ctx(), s); !errors.Is(err, ErrNotStuck) || !strings.Contains(err.Error(), reason) {
		g.t.Errorf("rescue: %+v, %v; want %q", r, err, reason)
	}
}

func (g *stuckGuest) wantUndecided(s Suspect, reason string) {
	g.t.Helper()
	if r, err := Stuck(g.ctx(), s); !errors.Is(err, ErrUndecided) || r.Stuck || !strings.Contains(err.Error(), reason) {
		g.t.Errorf("stuck: %+v, %v; want %q", r, err, reason)
	}
	if r, err := Rescue(g.ctx(), s); !errors.Is(err, ErrUndecided) {
		g.t.Errorf("rescue: %+v, %v", r, err)
	}
}

// rescued rescues the guest and sees it run.
func (g *stuckGuest) rescued(s Suspect) {
	g.t.Helper()
	began := time.Now()
	r, err := Rescue(g.ctx(), s)
	if err != nil {
		g.t.Fatalf("rescue: %+v, %v", r, err)
	}
	g.t.Logf("%+v, rescued in %v", r, time.Since(began))
	g.wantRuns()
	g.wantHealthy(g.suspect(), "not protected")
}

// A save that has failed or was cancelled freezes the guest of QEMU 7.2 for
// good, which is recognised and ended, over and over; the guest of QEMU 10 runs
// on, and is left alone. The next save is a good one on both.
func TestQEMUStuckGuest(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := startStuckGuest(t, q)
		g.startWriters()
		g.wantHealthy(g.suspect(), "not protected")
		for name, fail := range map[string]func(){"full": g.full, "cancelled": g.cancelled} {
			t.Log(name)
			fail()
			if !mayHang(versionOf(g.session)) {
				g.wantHealthy(g.suspect(), "not protected")
				g.wantHealthy(g.silent(), "not protected")
				g.wantRuns()
				continue
			}
			g.wantStandsStill()
			other := g.suspect()
			other.StartTime++
			if r, err := Rescue(g.ctx(), other); !errors.Is(err, ErrQEMUEnded) {
				t.Errorf("another process of this number: %+v, %v", r, err)
			}
			if r := g.wantStuck(g.suspect()); r.Blocked == 0 {
				t.Errorf("nothing waits: %+v", r)
			}
			g.wantStandsStill() // looking has changed nothing
			g.rescued(g.suspect())
		}
		if mayHang(versionOf(g.session)) {
			g.stuckMonitor()
		}
		g.capability(false)
		g.saveBackground()
		g.wantHealthy(g.suspect(), "not protected")
		g.wantRuns()
	})
}

// stuckMonitor has the main loop run into the protection, so that it answers
// nothing. That is recognised by what the threads do, unless the process was
// stopped.
func (g *stuckGuest) stuckMonitor() {
	g.t.Helper()
	g.full()
	g.wantStandsStill()
	if r := g.wantStuck(g.silent()); !r.Silent {
		g.t.Errorf("another client has the monitor: %+v", r)
	}
	// What comes for the guest by virtio is written to its memory.
	echoed := make(chan error, 1)
	ctx := g.ctx()
	go func() {
		_, err := g.Exec(ctx, "echo alive")
		echoed <- err
	}()
	for answers := true; answers; {
		_, answers = g.answers()
	}
	if err := unix.Kill(g.PID(), unix.SIGSTOP); err != nil {
		g.t.Fatal(err)
	}
	g.wantUndecided(g.suspect(), "stopped")
	if err := unix.Kill(g.PID(), unix.SIGCONT); err != nil {
		g.t.Fatal(err)
	}
	if r := g.wantStuck(g.suspect()); !r.Silent || r.Blocked < 2 {
		g.t.Errorf("the main loop is stuck: %+v", r)
	}
	g.rescued(g.suspect())
	if err := <-echoed; err != nil {
		g.t.Errorf("what was sent before: %v", err)
	}
}

// A save that goes on is left alone, also when its target takes nothing: then
// the guest has to wait, and QEMU mostly cannot be asked. Should the guest be
// rescued all the same, the save fails: no memory is saved that is not of the
// cut.
func TestQEMUSaveUnderWay(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := startStuckGuest(t, q)
		target := g.migrateToPipe()
		stop := target.drip()
		g.awaitTracked()
		g.wantHealthy(g.suspect(), "under way (active)")
		stop()
		g.awaitBlocked()
		g.wantUndecided(g.silent(), "may be writing")
		target.drain()
		g.awaitStatus(monitor.MigrationCompleted)
		g.wantHealthy(g.suspect(), "not protected")

		target = g.migrateToPipe()
		g.awaitBlocked()
		pidfd, err := openProcess(g.PID(), g.start)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(liftProtection(pidfd, g.PID()), unix.Close(pidfd)); err != nil {
			t.Fatal(err)
		}
		g.startWriters()
		g.wantRuns()
		target.drain()
		g.awaitStatus(monitor.MigrationFailed)
		g.wantRuns()
		g.wantHealthy(g.suspect(), "not protected")
	})
}

// pipeTarget is the end of a pipe that a save is read from. QEMU waits when
// nobody reads.
type pipeTarget struct {
	t *testing.T
	*os.File
}

func (g *stuckGuest) migrateToPipe() *pipeTarget {
	g.t.Helper()
	reader, writer, err := os.Pipe()
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { _ = reader.Close() })
	g.migrate(writer)
	if err := writer.Close(); err != nil {
		g.t.Fatal(err)
	}
	return &pipeTarget{g.t, reader}
}

// drip reads slowly until it is stopped.
func (p *pipeTarget) drip() (stop func()) {
	stopping, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		b := make([]byte, 64<<10)
		for {
			if _, err := p.Read(b); err != nil {
				p.t.Errorf("the save ended before its time: %v", err)
				return
			}
			select {
			case <-tick.C:
			case <-stopping:
				return
			}
		}
	}()
	return func() { close(stopping); <-stopped }
}

// drain reads the rest.
func (p *pipeTarget) drain() {
	p.t.Helper()
	if _, err := io.Copy(io.Discard, p); err != nil {
		p.t.Fatal(err)
	}
}

// awaitBlocked returns when the guest waits to be let write.
func (g *stuckGuest) awaitBlocked() {
	g.t.Helper()
	var before string
	for ctx := g.ctx(); ; {
		all, err := threads(g.PID())
		if err != nil || ctx.Err() != nil {
			g.t.Fatalf("await a guest that waits: %v, %v", err, ctx.Err())
		}
		now := ""
		for _, th := range all {
			if th.faulting {
				now += fmt.Sprint(th.tid, " ", th.switches, ",")
			}
		}
		if now != "" && now == before { // not just until the next page is saved
			return
		}
		before = now
		<-time.After(200 * time.Millisecond) // nothing tells of a fault
	}
}

// A QEMU that has ended is not taken for a healthy one, nor is one that ends
// while it is watched.
func TestQEMUStuckEnds(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := startStuckGuest(t, q)
		target := g.migrateToPipe()
		g.awaitBlocked()
		s := g.suspect()
		s.Migration = func(context.Context) (monitor.Migration, error) {
			g.Kill()
			return monitor.Migration{Status: monitor.MigrationFailed}, nil
		}
		for range 2 {
			if r, err := Stuck(g.ctx(), s); !errors.Is(err, ErrQEMUEnded) || r.Stuck {
				t.Errorf("stuck: %+v, %v", r, err)
			}
		}
		if r, err := Rescue(g.ctx(), s); !errors.Is(err, ErrQEMUEnded) {
			t.Errorf("rescue: %+v, %v", r, err)
		}
		target.drain()
	})
}
