package testvm_test

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

func TestQEMUCounterCounts(t *testing.T) {
	testvm.OnOneQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q})
		if _, err := g.Count(soon(t)); err == nil {
			t.Error("a counter that was never started counts")
		}
		if err := g.StartCounter(soon(t)); err != nil {
			t.Fatal(err)
		}
		// More than once around the ring.
		last := awaitCount(t, g, 300)
		g.Kill()
		if err := g.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := g.StartCounter(soon(t)); err != nil {
			t.Fatal(err)
		}
		if n := awaitCount(t, g, 1); n < last {
			t.Errorf("the counter stood at %d and goes on at %d", last, n)
		}
	})
}

// TestQEMUCounterFindsDisksOfAnotherInstant changes a disk under the guest, as a
// cut does that is not of memory's instant.
func TestQEMUCounterFindsDisksOfAnotherInstant(t *testing.T) {
	testvm.OnOneQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q, Disks: []testvm.Disk{{Name: "root"}, {Name: "data", Format: testvm.Raw}}})
		if err := g.StartCounter(soon(t)); err != nil {
			t.Fatal(err)
		}
		awaitCount(t, g, 10)
		qmp := dialQMP(t, g.QMPSocket())
		qmp.call("stop")
		before, err := os.ReadFile(g.Disk("data").Path)
		if err != nil {
			t.Fatal(err)
		}
		qmp.call("cont")
		awaitCount(t, g, 10)
		qmp.call("stop")
		if err := os.WriteFile(g.Disk("data").Path, before, 0o600); err != nil {
			t.Fatal(err)
		}
		qmp.call("cont")
		for {
			if _, err := g.Count(soon(t)); err != nil {
				if !strings.Contains(err.Error(), "not of one instant") {
					t.Error(err)
				}
				return
			}
		}
	})
}

// awaitCount waits until the counter has counted n further, and returns where
// it stands.
func awaitCount(t *testing.T, g *testvm.Guest, n uint64) uint64 {
	t.Helper()
	first, err := g.Count(soon(t))
	for now := first; ; {
		if err != nil {
			t.Fatal(err)
		}
		if now >= first+n {
			return now
		}
		now, err = g.Count(soon(t))
	}
}

func TestQEMUDirtyMakesMemoryResident(t *testing.T) {
	testvm.OnOneQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q, MemoryMiB: 512})
		before := resident(t, g.PID())
		const size = 256 << 20
		if err := g.Dirty(soon(t), size, 50<<20); err != nil {
			t.Fatal(err)
		}
		if grown := resident(t, g.PID()) - before; grown < size/10*9 {
			t.Errorf("QEMU has grown by %d bytes for a working set of %d", grown, int64(size))
		}
		if err := g.Dirty(soon(t), 0, 0); err != nil {
			t.Error(err)
		}
		if err := g.Dirty(soon(t), 0, 1); err == nil {
			t.Error("no memory is changed at a rate")
		}
	})
}

// resident returns how much memory a process has touched, in bytes.
func resident(t *testing.T, pid int) int64 {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "statm"))
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.ParseInt(strings.Fields(string(b))[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return pages * int64(os.Getpagesize())
}
