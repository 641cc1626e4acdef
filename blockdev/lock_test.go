package blockdev

import (
	"errors"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// qemuOpens says whether qemu-io can open an image.
func qemuOpens(t *testing.T, path string, flags ...string) bool {
	t.Helper()
	out, err := exec.Command("qemu-io", append(flags, "-f", "qcow2", "-c", "info", path)...).CombinedOutput()
	if err == nil {
		return true
	}
	if !strings.Contains(string(out), "lock") {
		t.Fatalf("qemu-io: %v\n%s", err, out)
	}
	return false
}

func TestLocksAreQEMUs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.qcow2")
	img(t, "create", "-q", "-f", "qcow2", path, "1M")

	readers, err := LockNoWriters(path)
	if err != nil {
		t.Fatal(err)
	}
	if qemuOpens(t, path) {
		t.Error("QEMU opened for writing an image that was locked against writers")
	}
	if !qemuOpens(t, path, "-r") {
		t.Error("a lock against writers kept a reader out")
	}
	if err := readers.Close(); err != nil {
		t.Fatal(err)
	}
	if !qemuOpens(t, path) {
		t.Error("a lock outlived its Close")
	}
}

func TestLocksSeeQEMU(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.qcow2")
	img(t, "create", "-q", "-f", "qcow2", path, "1M")
	cmd := exec.Command("qemu-io", "-f", "qcow2", path)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = in.Close(); _ = cmd.Wait() }()
	if _, err := out.Read(make([]byte, 1)); err != nil { // its prompt: the image is open
		t.Fatal(err)
	}
	if _, err := LockNoWriters(path); !errors.Is(err, ErrLocked) {
		t.Errorf("lock against writers beside a writer: %v", err)
	}
}
