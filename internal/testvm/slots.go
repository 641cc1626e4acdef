package testvm

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// slotMemoryMiB is what a test's guests may take together: two of the default
// size, with what QEMU itself needs.
const slotMemoryMiB = 1024

// slotInterval is the time between looks for a free slot. The kernel can wait
// for one lock, not for any of several.
const slotInterval = 50 * time.Millisecond

// slots returns how many tests with guests may run at a time on this machine:
// half as many again as there are cores, if memory suffices. A TCG guest that
// works takes a core, and tests wait for something else much of their time.
func slots() (int, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0, fmt.Errorf("sysinfo: %w", err)
	}
	memory := int(uint64(info.Totalram) * uint64(info.Unit) >> 20)
	return max(1, min(runtime.NumCPU()*3/2, memory/slotMemoryMiB)), nil
}

// acquireSlot waits for a slot and returns what gives it back. A slot is a lock
// on a file, so that test binaries that run beside each other share the slots
// and a killed one gives its own back.
func acquireSlot(ctx context.Context) (release func(), err error) {
	cache, err := cacheDir()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(cache, "slots")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	n, err := slots()
	if err != nil {
		return nil, err
	}
	ticker := time.NewTicker(slotInterval)
	defer ticker.Stop()
	for {
		for i := range n {
			release, err := lockFile(filepath.Join(dir, fmt.Sprint(i)))
			if release != nil || err != nil {
				return release, err
			}
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-ticker.C:
		}
	}
}

// lockFile locks a file; release is nil if it is locked by another.
func lockFile(path string) (release func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		return func() { _ = f.Close() }, nil // which unlocks it
	}
	_ = f.Close()
	if err == unix.EWOULDBLOCK {
		return nil, nil
	}
	return nil, fmt.Errorf("lock %s: %w", path, err)
}

// held are the names of the tests that hold a slot.
var held struct {
	sync.Mutex
	names map[string]bool
}

// takeSlot gives the test a slot until its end, unless it or a test above it
// has one: a test may have several guests.
func takeSlot(t testing.TB) {
	t.Helper()
	name := t.Name()
	if holdsSlot(name) {
		return
	}
	release, err := acquireSlot(t.Context())
	if err != nil {
		t.Fatalf("wait for a turn to run a guest: %v", err)
	}
	held.Lock()
	if held.names == nil {
		held.names = map[string]bool{}
	}
	held.names[name] = true
	held.Unlock()
	t.Cleanup(func() {
		held.Lock()
		delete(held.names, name)
		held.Unlock()
		release()
	})
}

func holdsSlot(name string) bool {
	held.Lock()
	defer held.Unlock()
	for {
		if held.names[name] {
			return true
		}
		i := strings.LastIndexByte(name, '/')
		if i < 0 {
			return false
		}
		name = name[:i]
	}
}
