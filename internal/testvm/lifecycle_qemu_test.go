package testvm_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

func TestQEMUShutdownIsClean(t *testing.T) {
	testvm.OnOneQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q, Disks: []testvm.Disk{{Name: "root", Format: testvm.Raw}}})
		if _, err := g.Exec(soon(t), "echo x >/mnt/root/file"); err != nil { // not made durable
			t.Fatal(err)
		}
		if err := g.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		if g.Running() {
			t.Error("QEMU still runs")
		}
		// Nothing to replay and nothing to repair.
		out, err := exec.Command("dumpe2fs", "-h", g.Disk("root").Path).CombinedOutput()
		if err != nil || strings.Contains(string(out), "needs_recovery") {
			t.Errorf("the file system was not unmounted: %v\n%s", err, out)
		}
		if out, err := exec.Command("e2fsck", "-fn", g.Disk("root").Path).CombinedOutput(); err != nil {
			t.Errorf("e2fsck: %v\n%s", err, out)
		}
		if err := g.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got, err := g.ReadFile(soon(t), "/mnt/root/file"); err != nil || string(got) != "x\n" {
			t.Errorf("after the shutdown the file holds %q, %v", got, err)
		}
	})
}

func TestQEMUPowerButtonAndReset(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q, ExtraQMP: 2, NoQMP: true})
		qmp := dialQMP(t, g.ExtraQMPSockets()[1])
		pid := g.PID()
		qmp.call("system_reset")
		if err := g.AwaitBoot(t.Context(), 2); err != nil {
			t.Fatal(err)
		}
		if g.PID() != pid || !g.Running() {
			t.Error("the reset ended QEMU")
		}
		if _, err := g.Exec(soon(t), "true"); err != nil {
			t.Error(err)
		}
		qmp.call("system_powerdown")
		if err := g.Wait(soon(t)); err != nil {
			t.Errorf("after the power button: %v", err)
		}
	})
}

func TestQEMUNoReboot(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q, NoReboot: true, NoGuestAgent: true})
		if running, err := g.AgentRunning(soon(t)); err != nil || running {
			t.Errorf("the guest without an agent has one: %v, %v", running, err)
		}
		if _, err := os.Stat(g.AgentSocket()); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the agent's socket: %v", err)
		}
		if _, err := g.Exec(soon(t), "reboot -f"); err == nil {
			t.Error("a rebooting guest answered")
		}
		if err := g.Wait(soon(t)); err != nil {
			t.Errorf("a reboot under -no-reboot: %v", err)
		}
	})
}

func TestQEMULaunchFailureLeavesNothingAndSaysWhy(t *testing.T) {
	testvm.OnOneQEMU(t, func(t *testing.T, q testvm.QEMU) {
		uuid := fmt.Sprintf("7e57ab1e-0000-4000-8000-%04d%08x", len(q.Name), os.Getpid())
		for _, c := range []struct {
			name string
			args []string
			want string
		}{
			{"no such option", []string{"-no-such-option"}, "no-such-option"},
			{"a kernel that panics", []string{"-append", "console=ttyS0 panic=-1 rdinit=/no/such/init", "-no-reboot"}, "Kernel panic"},
			{"a user space that fails", []string{"-append", "console=ttyS0 testvm.mounts=root", "-device", "virtio-blk-pci,drive=corrupt",
				"-drive", "if=none,id=corrupt,format=raw,file=" + corruptRoot(t)}, "mount /dev/vda at /mnt/root"},
		} {
			_, err := testvm.Launch(t.Context(), testvm.Config{
				QEMU: q, UUID: uuid, Dir: shortDir(t), Disks: []testvm.Disk{}, ExtraArgs: c.args,
			})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: %v", c.name, err)
			}
			if left := processes(t, uuid); len(left) != 0 {
				t.Errorf("%s: left processes %v", c.name, left)
			}
		}
	})
}

// corruptRoot makes a raw image with the magic number and the label of an ext4
// file system, and nothing behind them.
func corruptRoot(t *testing.T) string {
	t.Helper()
	b := make([]byte, 1<<20)
	b[1024+0x38], b[1024+0x39] = 0x53, 0xef
	copy(b[1024+0x78:], "root")
	path := filepath.Join(t.TempDir(), "corrupt.raw")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "vm-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := testvm.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// processes returns the ids of the processes with a string on their command line.
func processes(t *testing.T, text string) []string {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var pids []string
	for _, file := range files {
		line, err := os.ReadFile(file)
		if err == nil && strings.Contains(string(line), text) {
			pids = append(pids, filepath.Base(filepath.Dir(file)))
		}
	}
	return pids
}

// victimVariable makes the test binary launch a guest in the given directory,
// print its process id, and wait to be killed.
const victimVariable = "TESTVM_VICTIM_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(victimVariable); dir != "" {
		os.Exit(victim(dir))
	}
	os.Exit(m.Run())
}

func victim(dir string) int {
	versions, err := testvm.Versions()
	if err != nil {
		fmt.Println(err)
		return 1
	}
	for _, q := range versions {
		g, err := testvm.Launch(context.Background(), testvm.Config{QEMU: q, Dir: filepath.Join(dir, q.Name), Disks: []testvm.Disk{}})
		if err != nil {
			fmt.Println(err)
			return 1
		}
		fmt.Println(g.PID())
	}
	select {}
}

// A test binary that is killed takes its guests along.
func TestQEMUGuestsDieWithTheirProcess(t *testing.T) {
	versions, err := testvm.Versions()
	if err != nil {
		t.Fatal(err)
	}
	dir := shortDir(t)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), victimVariable+"="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var guests []int // pidfds
	lines := bufio.NewScanner(out)
	for len(guests) < len(versions) && lines.Scan() {
		var pid int
		if _, err := fmt.Sscan(lines.Text(), &pid); err != nil {
			t.Fatalf("the victim said: %s", lines.Text())
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			t.Fatal(err)
		}
		guests = append(guests, fd)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("the victim was not killed")
	}
	for _, fd := range guests {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if n, err := unix.Poll(poll, int((10 * time.Second).Milliseconds())); n != 1 {
			t.Errorf("a guest outlives its process: %v", err)
		}
	}
}
