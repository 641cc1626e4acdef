package discover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// sourceHelper makes the test binary tell its watch's source and exit.
const sourceHelper = "DISCOVER_TEST_TELL_SOURCE"

func TestMain(m *testing.M) {
	if os.Getenv(sourceHelper) != "" {
		tellSource()
		return
	}
	os.Exit(m.Run())
}

func tellSource() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	w, err := Watch(ctx, Options{})
	if err != nil {
		fmt.Println("error:", err)
		return
	}
	source, reason := w.Source()
	fmt.Printf("%s: %s\n", source, reason)
}

func pidfd(t *testing.T, pid int) int {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

// readable waits until a descriptor can be read.
func readable(t *testing.T, fd int, within time.Duration) bool {
	t.Helper()
	for deadline := time.Now().Add(within); ; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(time.Until(deadline).Milliseconds()))
		if !errors.Is(err, unix.EINTR) {
			return err == nil && n == 1
		}
	}
}

// copyProgram copies a program under another name.
func copyProgram(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = in.Close() }()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(out, in)
	if err := errors.Join(err, out.Close()); err != nil {
		t.Fatal(err)
	}
}

// stubQEMU is a program that is called like a QEMU and does nothing but live.
func stubQEMU(t *testing.T) string {
	t.Helper()
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	stub := filepath.Join(t.TempDir(), "qemu-system-stub")
	copyProgram(t, sleep, stub)
	return stub
}

// start runs a program until the end of the test.
func start(t *testing.T, name string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stderr = os.Stderr
	startCmd(t, cmd)
	return cmd
}

func startCmd(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(cmd) })
}

// stop kills a program and waits for its end; it may be called twice.
func stop(cmd *exec.Cmd) {
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}

// watching is a watch whose events are looked at one after the other. Events
// of QEMUs that other people run on this host pass by.
type watching struct {
	*Watcher
	t      *testing.T
	cancel context.CancelFunc
}

func watch(t *testing.T, opts Options) *watching {
	t.Helper()
	opts.Report = func(err error) { t.Errorf("reported: %v", err) }
	ctx, cancel := context.WithCancel(t.Context())
	w, err := Watch(ctx, opts)
	if err != nil {
		t.Fatal(err)
	}
	wt := &watching{w, t, cancel}
	t.Cleanup(wt.end)
	wt.next("the initial list", 10*time.Second, func(e Event) bool { return e.Kind == Listed })
	return wt
}

// end ends the watch and waits until it has given up everything.
func (w *watching) end() {
	w.cancel()
	for range w.Events() {
	}
}

// next returns the next event that fits.
func (w *watching) next(what string, within time.Duration, fits func(Event) bool) Event {
	w.t.Helper()
	timeout := time.NewTimer(within)
	defer timeout.Stop()
	for {
		select {
		case e, open := <-w.Events():
			if !open {
				w.t.Fatalf("%s: the watch has ended", what)
			}
			if fits(e) {
				return e
			}
		case <-timeout.C:
			w.t.Fatalf("%s: not seen within %v", what, within)
		}
	}
}

func (w *watching) started(pid int) Process {
	w.t.Helper()
	return w.next(fmt.Sprintf("start of %d", pid), time.Second, func(e Event) bool {
		return e.Kind == Started && e.Process.PID == pid
	}).Process
}

func (w *watching) exited(pid int) Process {
	w.t.Helper()
	return w.next(fmt.Sprintf("exit of %d", pid), time.Second, func(e Event) bool {
		return e.Kind == Exited && e.Process.PID == pid
	}).Process
}
