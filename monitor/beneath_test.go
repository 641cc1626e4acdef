package monitor

import (
	"net"
	"os"
	"path/filepath"
	"testing"
)

// Where openat2 is forbidden, links of another process's root still lead
// nowhere else.
func TestOpenBeneath(t *testing.T) {
	root := t.TempDir()
	outside := filepath.Join(t.TempDir(), "s")
	for _, path := range []string{filepath.Join(root, "s"), outside} {
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
	}
	for name, to := range map[string]string{"absolute": outside, "relative": "s", "above": "../" + filepath.Base(filepath.Dir(outside)) + "/s"} {
		if err := os.Symlink(to, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	for name, ok := range map[string]bool{"s": true, "absolute": false, "above": false, "../s": false, "none": false} {
		f, err := openBeneath(root, name)
		opened := false
		if err == nil {
			fi, statErr := f.Stat()
			opened = statErr == nil && fi.Mode()&os.ModeSocket != 0
			_ = f.Close()
		}
		if opened != ok {
			t.Errorf("%s: opened a socket: %t, want %t (%v)", name, opened, ok, err)
		}
	}
}
