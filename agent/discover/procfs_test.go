package discover

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

func TestParseStat(t *testing.T) {
	const tail = " 77 4242 4242 0 -1 4194368 1 0 0 0 0 0 0 0 20 0 1 0 123456789 1 1"
	for _, comm := range []string{"qemu-system-x86", "a) S 1 (b", "", "x y", "\n)"} {
		s, err := parseStat([]byte("4242 (" + comm + ") T" + tail))
		if err != nil {
			t.Errorf("%q: %v", comm, err)
		}
		want := taskStat{comm: comm, state: 'T', parent: 77, flags: 4194368, startTime: 123456789}
		if s != want {
			t.Errorf("%q: got %+v, want %+v", comm, s, want)
		}
	}
	for _, bad := range []string{"", "1 (x", ") (", "1 (x) S 1 2", "1 (x) S" + strings.Replace(tail, "123456789", "z", 1)} {
		if s, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q: got %+v, want an error", bad, s)
		}
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("1 (a) b) S 1 1 1 0 -1 64 1 0 0 0 0 0 0 0 20 0 1 0 5 1 1"))
	f.Fuzz(func(_ *testing.T, data []byte) { _, _ = parseStat(data) })
}

func TestSame(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	s, err := readStat(pid)
	if err != nil {
		t.Fatal(err)
	}
	if !Same(pid, s.startTime) {
		t.Error("a live process is not itself")
	}
	if Same(pid, s.startTime+1) || Same(pid, s.startTime-1) {
		t.Error("another process with that pid is taken for it")
	}
	started, err := startedAt(s.startTime)
	if err != nil || time.Since(started) < 0 || time.Since(started) > time.Minute {
		t.Errorf("started at %v, %v", started, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	awaitZombie(t, pid)
	if Same(pid, s.startTime) {
		t.Error("a zombie is taken for a live process")
	}
	if err := cmd.Wait(); err == nil {
		t.Error("killed without an error")
	}
	if Same(pid, s.startTime) {
		t.Error("a process that is gone is taken for a live one")
	}
	if _, err := Inspect(pid); !errors.Is(err, ErrNotQEMU) && !errors.Is(err, ErrGone) {
		t.Errorf("inspect: %v", err)
	}
}

// awaitZombie waits for a killed child's end without reaping it.
func awaitZombie(t *testing.T, pid int) {
	t.Helper()
	fd := pidfd(t, pid)
	if !readable(t, fd, 10*time.Second) {
		t.Fatalf("process %d does not end", pid)
	}
}

func TestIsBystander(t *testing.T) {
	self := os.Getpid() // a parent that is no QEMU
	tests := []struct {
		name       string
		stat       taskStat
		daemonized bool
		want       bool
	}{
		{"executed", taskStat{comm: "qemu-system-x86", parent: self}, false, false},
		{"forked by it", taskStat{comm: "qemu-system-x86", parent: self, flags: flagForkNoExec}, false, true},
		{"launcher", taskStat{comm: "qemu-system-x86", parent: self}, true, true},
		{"daemon", taskStat{comm: "qemu-system-x86", parent: self, flags: flagForkNoExec}, true, false},
		{"teardown", taskStat{comm: "cleanup/42", parent: self, flags: flagForkNoExec}, true, true},
	}
	for _, tt := range tests {
		if got := isBystander(tt.stat, tt.daemonized); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestIsQEMUName(t *testing.T) {
	tests := map[string]bool{
		"qemu-system-x86_64": true, "qemu-system-x86_64-microvm": true, "qemu-system-aarch64": true,
		"qemu-system-x86": true, "qemu-kvm": true, "kvm": true, ".qemu-system-x86_64-wrapped": true,
		"qemu-img": false, "qemu-nbd": false, "qemu-storage-daemon": false, "qemu-x86_64": false,
		"qemu-ga": false, "kvm-nx-lpage-re": false, "": false, "virtqemud": false,
	}
	for name, want := range tests {
		if got := IsQEMUName(name); got != want {
			t.Errorf("%q: %v, want %v", name, got, want)
		}
	}
}

func TestArgumentBound(t *testing.T) {
	// One argument may have 128 KiB: some dozen stay below the bound.
	long := strings.Repeat("x", 100<<10)
	args := []string{"-c", "echo ready; read x", "sh"}
	for range 12 {
		args = append(args, long)
	}
	cmd := exec.Command("sh", args...)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = stdin.Close()
		_ = cmd.Wait()
	})
	// Before it has run, it may have no arguments yet.
	if _, err := stdout.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	got, err := readArguments(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if want := len(args) + 1; len(got) != want {
		t.Errorf("%d arguments, want %d", len(got), want)
	}
	if got[len(got)-1] != long {
		t.Errorf("the last argument has %d bytes, want %d", len(got[len(got)-1]), len(long))
	}
}
