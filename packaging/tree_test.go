package packaging

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// Deadlines, far beyond what a busy machine takes.
const (
	bootDeadline    = 2 * time.Minute // 4 s
	commandDeadline = 2 * time.Minute // dpkg, and a daemon that stops
	changeDeadline  = time.Minute     // what systemd and the daemon do by themselves
)

// cache is where `make deps` puts things.
func cache(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("VMSNAP_CACHE")
	if dir == "" {
		dir = "../.cache"
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// tree is a Debian that runs under systemd, with namespaces and a root file
// system of its own that is thrown away.
type tree struct {
	t       *testing.T
	dir     string // the same inside and outside
	console string // a log
	leader  int    // its PID 1, as it is seen from outside
}

// boot boots the tree. packages is there as /packages.
func boot(t *testing.T, packages string) *tree {
	t.Helper()
	dir, err := os.MkdirTemp("/srv", "vmsnap-test-") // images stand in such places, and the path is short
	if err != nil {
		t.Fatal(err)
	}
	tr := &tree{t: t, dir: dir, console: filepath.Join(t.TempDir(), "console")}
	root, images := filepath.Join(cache(t), "tree"), cache(t)
	if _, err := os.Stat(root); err != nil {
		t.Fatalf("%v: run `make deps`", err)
	}
	cmd := exec.Command("systemd-nspawn", "--quiet", "--boot", "--directory="+root, "--volatile=overlay",
		"--register=no", "--keep-unit", "--private-network", "--link-journal=no", "--machine=vmsnap-test",
		"--bind="+dir, "--bind-ro="+packages+":/packages", "--bind-ro="+images)
	cmd.Env = append(os.Environ(), "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1")
	log, err := os.Create(tr.console)
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started, ended := make(chan error), make(chan struct{})
	go func() {
		// The kernel takes the thread that started a process for its parent.
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
		}
		close(ended)
	}()
	if err := errors.Join(<-started, log.Close()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			tr.showLogs()
		}
		if tr.leader > 0 {
			_ = syscall.Kill(tr.leader, syscall.SIGKILL) // and everything in there
		}
		_ = cmd.Process.Kill()
		<-ended
		if err := testvm.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	tr.awaitBoot(cmd.Process.Pid, ended)
	return tr
}

func (tr *tree) awaitBoot(pid int, ended <-chan struct{}) {
	tr.t.Helper()
	tr.eventually(bootDeadline, "the tree boots", func() error {
		select {
		case <-ended:
			console, _ := os.ReadFile(tr.console)
			tr.t.Fatalf("systemd-nspawn ended:\n%s", console)
		default:
		}
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
		if err != nil {
			return err
		}
		if tr.leader, err = strconv.Atoi(strings.TrimSpace(string(children))); err != nil {
			return err
		}
		out, err := tr.try("systemctl", "is-system-running", "--wait")
		if strings.TrimSpace(out) != "running" {
			return fmt.Errorf("%s: %w", out, err)
		}
		return nil
	})
}

func (tr *tree) showLogs() {
	for _, args := range [][]string{
		{"journalctl", "--no-pager", "-o", "short-precise", "-n", "120"}, {"systemctl", "status", "--no-pager", "vmsnapd.service"},
	} {
		out, err := tr.try(args...)
		tr.t.Logf("%v (%v):\n%s", args, err, out)
	}
}

// enter is the beginning of a command line that runs a program in the tree.
func (tr *tree) enter() []string {
	return []string{"nsenter", "--target", strconv.Itoa(tr.leader), "--all", "--"}
}

// try runs a program in the tree, and returns what it printed.
func (tr *tree) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), commandDeadline)
	defer cancel()
	args = append(tr.enter(), args...)
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive"}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return out.String(), err
}

// run runs a program in the tree, which must succeed.
func (tr *tree) run(args ...string) string {
	tr.t.Helper()
	out, err := tr.try(args...)
	if err != nil {
		tr.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(out)
}

// fails runs a program in the tree, which must fail with these words.
func (tr *tree) fails(words string, args ...string) {
	tr.t.Helper()
	if out, err := tr.try(args...); err == nil || !strings.Contains(out, words) {
		tr.t.Fatalf("%s: %v, and %q is not in\n%s", strings.Join(args, " "), err, words, out)
	}
}

// sh runs a shell script in the tree, which must succeed.
func (tr *tree) sh(script string) string {
	tr.t.Helper()
	return tr.run("sh", "-euc", script)
}

// write writes a file in the tree.
func (tr *tree) write(path, text string) {
	tr.t.Helper()
	tr.run("sh", "-euc", `mkdir -p "$(dirname "$1")" && printf %s "$2" >"$1"`, "sh", path, text)
}

// show returns a property of a unit.
func (tr *tree) show(unit, property string) string {
	tr.t.Helper()
	return tr.run("systemctl", "show", "--value", "--property="+property, unit)
}

// eventually waits for what comes by itself and is announced nowhere.
func (tr *tree) eventually(limit time.Duration, what string, look func() error) {
	tr.t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := look()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			tr.t.Fatalf("not within %s: %s: %v", limit, what, err)
		}
		<-time.After(50 * time.Millisecond)
	}
}
