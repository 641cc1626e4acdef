package monitor_test

import (
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// TestMain makes the descriptors that the runtime keeps for its network poller
// before any test counts them.
func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "qmp")
	if err != nil {
		panic(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "warm.sock"))
	if err != nil {
		panic(err)
	}
	_ = l.Close()
	_ = os.RemoveAll(dir)
	os.Exit(m.Run())
}

// checkLeaks fails the test if goroutines or descriptors are left when all else
// of it has been cleaned up. Call it first.
func checkLeaks(t *testing.T) {
	t.Helper()
	before := descriptors(t)
	t.Cleanup(func() {
		// Goroutines end just after they have told that they are done.
		deadline := time.Now().Add(5 * time.Second)
		for {
			stacks, after := ours(), descriptors(t)
			if stacks == "" && len(after) <= len(before) {
				return
			}
			if time.Now().After(deadline) {
				t.Errorf("left over: descriptors %v, had %v; goroutines:\n%s", after, before, stacks)
				return
			}
			runtime.Gosched()
		}
	})
}

// descriptors lists what this process has open.
func descriptors(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var open []string
	for _, e := range entries {
		// The one that read the directory is closed by now.
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			open = append(open, e.Name()+"="+to)
		}
	}
	return open
}

// ours returns the stacks of goroutines, apart from the test's own, that run
// code of this package.
func ours() string {
	buf := make([]byte, 1<<20)
	var left []string
	for _, g := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if strings.Contains(g, "vmsnap/monitor") && !strings.Contains(g, "testing.tRunner") {
			left = append(left, g)
		}
	}
	return strings.Join(left, "\n\n")
}
