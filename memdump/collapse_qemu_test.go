package memdump

import (
	"context"
	"errors"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// saveBackground saves the guest's memory in the background, to its end.
func (g *savedGuest) saveBackground() {
	g.t.Helper()
	s := g.prepare(g.config(Background))
	cut := func(context.Context) error { return nil }
	if _, err := s.Cut(g.ctx(), cut, nil); err != nil {
		g.t.Fatal(err)
	}
	if err := s.Wait(g.ctx(), nil); err != nil {
		g.t.Fatal(err)
	}
	if err := s.Close(g.ctx()); err != nil {
		g.t.Fatal(err)
	}
}

func (g *savedGuest) hugePages() HugePages {
	g.t.Helper()
	h, err := QueryHugePages(g.PID())
	if err != nil {
		g.t.Fatal(err)
	}
	return h
}

func (g *savedGuest) resident() uint64 {
	g.t.Helper()
	use, err := residentMemory(g.PID())
	if err != nil {
		g.t.Fatal(err)
	}
	return use.resident
}

// The kernel is at work here, and not QEMU, whatever its version.

// A guest that works on its memory gets its huge pages back after each of
// several saves, within the share of a core that is allowed, without taking
// more memory and without standing still.
func TestQEMUCollapse(t *testing.T) {
	testvm.OnOneQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := startSavedGuest(t, q, testvm.Config{MemoryMiB: 768})
		const filled = 480 << 20
		if err := g.Dirty(g.ctx(), filled, 100<<20); err != nil {
			t.Fatal(err)
		}
		w, err := g.StartWriters(g.ctx())
		if err != nil {
			t.Fatal(err)
		}
		first := g.hugePages()
		if first.Bytes() < filled {
			t.Fatalf("%d MiB in huge pages, of %d that the guest has filled", first.Bytes()>>20, filled>>20)
		}
		for _, share := range []float64{1, 0, 0.1} {
			g.saveBackground()
			resident := g.resident()
			w.Reset()
			r, err := Collapse(g.ctx(), g.PID(), CollapseOptions{Before: first, Share: share})
			if err != nil {
				t.Fatal(err)
			}
			gap := w.Gaps().Heartbeat.Length()
			t.Logf("share %v: %d MiB before, %d found, %d after, left %+v; CPU %v in %v; longest gap of the guest %v",
				share, r.Before>>20, r.Found>>20, r.After>>20, r.Left, r.CPU, r.Elapsed, gap)
			if r.Found > r.Before/2 {
				t.Errorf("the save has left %d MiB of %d in huge pages", r.Found>>20, r.Before>>20)
			}
			if r.After < r.Before/100*90 || r.After > r.Before {
				t.Errorf("%d MiB in huge pages, %d before", r.After>>20, r.Before>>20)
			}
			if now := g.hugePages().Bytes(); now != r.After {
				t.Errorf("%d bytes in huge pages now, not %d", now, r.After)
			}
			if share == 0 {
				share = DefaultCollapseShare
			}
			if most := time.Duration(share*float64(r.Elapsed)) + collapseDebt + 100*time.Millisecond; r.CPU > most {
				t.Errorf("%v of CPU in %v, more than %v of a core", r.CPU, r.Elapsed, share)
			}
			// The guest works on, and QEMU may touch some of its own memory.
			if grown := g.resident(); grown > resident+16<<20 {
				t.Errorf("QEMU has %d MiB more in memory", (grown-resident)>>20)
			}
			if gap > 2*time.Second { // tests of others hold the cores for that long, not collapsing
				t.Errorf("the guest stood still for %v", gap)
			}
		}
		w.Reset()
		r, err := Collapse(g.ctx(), g.PID(), CollapseOptions{Before: first})
		if err != nil || r.Left != (LeftChunks{}) || r.After != r.Found {
			t.Errorf("once more: %+v, %v", r, err)
		}
	})
}

// withoutCapabilities runs f in a thread that lacks some capabilities, and ends
// the thread.
func withoutCapabilities(t *testing.T, missing []int, f func() error) error {
	t.Helper()
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // for good
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var sets [2]unix.CapUserData
		if err := unix.Capget(&header, &sets[0]); err != nil {
			t.Errorf("capabilities: %v", err)
		}
		for _, c := range missing {
			sets[c/32].Effective &^= 1 << (c % 32)
		}
		if err := unix.Capset(&header, &sets[0]); err != nil {
			t.Errorf("drop capabilities %d: %v", missing, err)
		}
		result <- f()
	}()
	return <-result
}

// What a guest never had it does not get; and Collapse ends with its context,
// and with QEMU.
func TestQEMUCollapseEnds(t *testing.T) {
	testvm.OnOneQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := startSavedGuest(t, q, testvm.Config{MemoryMiB: 512})
		const filled = 256 << 20
		if err := g.Dirty(g.ctx(), filled, 0); err != nil {
			t.Fatal(err)
		}
		before := g.hugePages()
		g.saveBackground()

		split := g.hugePages().Bytes()
		none := HugePages{StartTime: before.StartTime}
		if r, err := Collapse(g.ctx(), g.PID(), CollapseOptions{Before: none}); err != nil || r != (CollapseResult{}) {
			t.Errorf("nothing before: %+v, %v", r, err)
		}
		other := before
		other.StartTime++
		if r, err := Collapse(g.ctx(), g.PID(), CollapseOptions{Before: other}); !errors.Is(err, ErrQEMUEnded) {
			t.Errorf("another process of this number: %+v, %v", r, err)
		}
		if now := g.hugePages().Bytes(); now > before.Bytes()/2 { // the guest may get some by itself
			t.Errorf("%d bytes in huge pages, %d before nothing was asked for", now, split)
		}

		for name, missing := range map[string][]int{
			"the right to slow others down": {unix.CAP_SYS_NICE},
			// Newer kernels let those of performance monitoring read as well.
			"the right to read": {unix.CAP_SYS_PTRACE, unix.CAP_PERFMON, unix.CAP_SYS_ADMIN},
		} {
			err := withoutCapabilities(t, missing, func() error {
				_, err := Collapse(g.ctx(), g.PID(), CollapseOptions{Before: before})
				return err
			})
			if !errors.Is(err, ErrCannotCollapse) {
				t.Errorf("without %s: %v", name, err)
			}
		}
		if now := g.hugePages().Bytes(); now > before.Bytes()/2 {
			t.Errorf("%d bytes in huge pages, %d before what was refused", now, split)
		}

		cause := errors.New("another save begins")
		ctx, cancel := context.WithCancelCause(g.ctx())
		time.AfterFunc(100*time.Millisecond, func() { cancel(cause) })
		slow := CollapseOptions{Before: before, Share: 0.001}
		began := time.Now()
		r, err := Collapse(ctx, g.PID(), slow)
		if !errors.Is(err, cause) || time.Since(began) > 10*time.Second { // of minutes
			t.Errorf("cancelled: %v after %v", err, time.Since(began))
		}
		if r.After <= r.Found || r.After >= r.Before {
			t.Errorf("cancelled: %+v", r)
		}

		time.AfterFunc(100*time.Millisecond, g.Kill)
		if _, err := Collapse(g.ctx(), g.PID(), CollapseOptions{Before: before, Share: 0.01}); !errors.Is(err, ErrQEMUEnded) {
			t.Errorf("QEMU was killed: %v", err)
		}
		if _, err := Collapse(g.ctx(), g.PID(), slow); !errors.Is(err, ErrQEMUEnded) {
			t.Errorf("QEMU is gone: %v", err)
		}
	})
}
