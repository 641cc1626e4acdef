package testvm_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// soon is a deadline for what a guest that is well does at once.
func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestQEMUExec(t *testing.T) {
	testvm.OnOneQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q})
		out, err := g.Exec(soon(t), "echo hello; cat /proc/uptime >&2")
		if err != nil || out != "hello\n" {
			t.Errorf("Exec = %q, %v", out, err)
		}
		_, err = g.Exec(soon(t), "echo sorry >&2; exit 3")
		var exit *testvm.ExitError
		if !errors.As(err, &exit) || exit.Code != 3 || exit.Stderr != "sorry\n" {
			t.Errorf("a command that exits with 3: %v", err)
		}
		if _, err = g.Exec(soon(t), "kill -9 $$"); !errors.As(err, &exit) || exit.Code != 137 {
			t.Errorf("a command that is killed: %v", err)
		}
		for _, d := range g.Disks() {
			if _, err := g.Exec(soon(t), "grep -q ' "+testvm.Mountpoint(d.Name)+" ext4 rw' /proc/mounts"); err != nil {
				t.Errorf("disk %s is not mounted: %v", d.Name, err)
			}
		}
	})
}

func TestQEMURestartKeepsWhatIsDurable(t *testing.T) {
	testvm.OnOneQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q})
		want := bytes.Repeat([]byte("content\n"), 1<<15)
		if err := g.WriteFile(soon(t), "/mnt/data/file", want); err != nil {
			t.Fatal(err)
		}
		sum, err := g.Sha256(soon(t), "/mnt/data/file")
		if err != nil {
			t.Fatal(err)
		}
		line, first := cmdline(t, g.PID()), g.PID()
		if got := strings.Join(g.Args(), "\x00") + "\x00"; got != line {
			t.Errorf("Args are not what QEMU runs with:\n%q\n%q", got, line)
		}
		if err := g.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		if again := cmdline(t, g.PID()); again != line || g.PID() == first {
			t.Errorf("restarted as %d by another command line:\n%q\n%q", g.PID(), again, line)
		}
		got, err := g.ReadFile(soon(t), "/mnt/data/file")
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("after the restart the file has %d bytes, %v", len(got), err)
		}
		if again, err := g.Sha256(soon(t), "/mnt/data/file"); err != nil || again != sum {
			t.Errorf("after the restart the hash is %s, %v; it was %s", again, err, sum)
		}
	})
}

func cmdline(t *testing.T, pid int) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
