package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

func TestQEMUMemory(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q, Disks: testvm.TwoDisks()})
		h := newHost(t, g)
		before := files(t, g.Dir)
		if out := h.must("snapshot", "create", g.Name, "live", "--memory", "--dry-run"); !strings.Contains(out, "background: ") || !strings.Contains(out, "pause") {
			t.Errorf("the plan: %s", out)
		}
		h.fails(14, "at most 1µs is allowed", "snapshot", "create", g.Name, "short", "--memory", "--max-pause", "1us")
		if after := files(t, g.Dir); strings.Join(after, " ") != strings.Join(before, " ") {
			t.Errorf("before %v, after %v", before, after)
		}
		h.must("snapshot", "create", g.Name, "live", "--memory", "--max-pause", "30s")
		thawed(t, g)
		path := h.memoryOf(g.Name + "/live")
		if s := h.snapshot(g.Name + "/live"); s.Consistency != "memory" || len(s.Warnings) > 0 || len(s.Disks) != 2 {
			t.Errorf("snapshot %+v", s)
		}
		for file, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o700} {
			if info, err := os.Stat(file); err != nil || info.Mode().Perm() != want {
				t.Errorf("%s: %v, error %v, want mode %o", file, info, err, want)
			}
		}
		h.must("snapshot", "verify", g.Name+"/live")
		alter(t, path)
		h.fails(1, "altered", "snapshot", "verify", g.Name+"/live")
		if m := h.scrape(); !strings.Contains(m, "vmsnap_guest_pause_seconds_count 1\n") {
			t.Errorf("the metrics do not count the pause:\n%s", m)
		}
		g.Kill()
		h.await(g.Name, "stopped")
		h.fails(14, "no memory to save", "snapshot", "create", g.Name, "off", "--memory")
	})
}

// alter changes one byte in the middle of a file.
func alter(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, info.Size()/2); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b, info.Size()/2); err != nil {
		t.Fatal(err)
	}
}
