package testvm

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestKillLeftovers(t *testing.T) {
	uuid := newUUID()
	if err := killLeftovers(uuid); err != nil {
		t.Fatalf("with nothing left: %v", err)
	}
	cmd := exec.Command("sh", "-c", "echo up; read x", "sh", "-uuid", uuid, "-m", "1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = in.Close() }()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil { // its command line is there
		t.Fatal(err)
	}
	if err := killLeftovers(uuid); err == nil || !strings.Contains(err.Error(), "left behind") {
		t.Errorf("with a process left: %v", err)
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.String() != "signal: killed" {
		t.Errorf("the process left behind: %v", err)
	}
}

func TestRemoveAllTakesImmutableFiles(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "vm")
	if err := os.MkdirAll(filepath.Join(dir, "layers"), 0o700); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "layers", "a.qcow2")
	if err := os.WriteFile(file, nil, 0o400); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags|immutableFlag); err != nil {
		t.Fatalf("make %s immutable: %v", file, err)
	}
	if err := os.Remove(file); err == nil {
		t.Fatal("an immutable file was removed")
	}
	if err := RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory is still there: %v", err)
	}
	if err := RemoveAll(dir); err != nil {
		t.Errorf("of a directory that is not there: %v", err)
	}
}
