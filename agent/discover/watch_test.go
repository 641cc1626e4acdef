package discover

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// modes are the ways to notice a start. The scan interval is short here, since
// it is what a start waits for.
var modes = map[string]Options{
	SourceNetlink: {},
	SourceScan:    {NoNetlink: true, ScanInterval: 50 * time.Millisecond},
}

func TestWatchListsWhatRuns(t *testing.T) {
	cmd := start(t, stubQEMU(t), "60")
	ctx, cancel := context.WithCancel(t.Context())
	w, err := Watch(ctx, Options{})
	if err != nil {
		t.Fatal(err)
	}
	wt := &watching{w, t, cancel}
	t.Cleanup(wt.end)
	listed := false
	wt.next("the running stub", time.Second, func(e Event) bool {
		listed = listed || e.Kind == Listed
		return e.Kind == Started && e.Process.PID == cmd.Process.Pid
	})
	if listed {
		t.Error("it came after the end of the initial list")
	}
	if source, reason := w.Source(); source != SourceNetlink || reason != "" {
		t.Errorf("source %q (%s), want netlink", source, reason)
	}
}

func TestStormLosesNothing(t *testing.T) {
	for name, opts := range modes {
		t.Run(name, func(t *testing.T) {
			w, stub := watch(t, opts), stubQEMU(t)
			var wg sync.WaitGroup
			storm(t, &wg, 200)
			var pids []int
			for range 5 {
				pids = append(pids, start(t, stub, "60").Process.Pid)
			}
			wg.Wait()
			for _, pid := range pids {
				w.started(pid)
			}
		})
	}
}

// storm starts programs that end at once.
func storm(t *testing.T, wg *sync.WaitGroup, n int) {
	wg.Go(func() {
		for range n {
			if err := exec.Command("true").Run(); err != nil {
				t.Error(err)
				return
			}
		}
	})
}

func TestOverrunIsMadeUpFor(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	w := &Watcher{opts: Options{ScanInterval: time.Hour, Report: func(err error) { t.Error(err) }}, events: make(chan Event)}
	l, err := newLoop(ctx, w)
	if err != nil {
		t.Fatal(err)
	}
	fd := l.connector.fd
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 4096); err != nil {
		t.Fatal(err)
	}
	go l.run()
	wt := &watching{w, t, cancel}
	t.Cleanup(wt.end)
	wt.next("the initial list", 10*time.Second, func(e Event) bool { return e.Kind == Listed })

	stub := stubQEMU(t)
	first := start(t, stub, "60") // whose Started nobody reads, so that the loop stands still
	var wg sync.WaitGroup
	storm(t, &wg, 100)
	wg.Wait()
	second := start(t, stub, "61")
	if drops := netlinkDrops(t, fd); drops == "0" {
		t.Fatal("no event was lost: the test proves nothing")
	}
	wt.started(first.Process.Pid)
	wt.started(second.Process.Pid)
}

// netlinkDrops returns how many messages a netlink socket has lost.
func netlinkDrops(t *testing.T, fd int) string {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile("/proc/net/netlink")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		// … Drops Inode
		if f := strings.Fields(line); len(f) == 10 && f[9] == fmt.Sprint(st.Ino) {
			return f[8]
		}
	}
	t.Fatal("the socket is not listed")
	return ""
}

func TestExecInPlace(t *testing.T) {
	w, stub := watch(t, Options{}), stubQEMU(t)
	sh := filepath.Join(t.TempDir(), "qemu-system-sh")
	path, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	copyProgram(t, path, sh)
	cmd := exec.Command(sh, "-c", `read go && exec "$0" 62`, stub)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	startCmd(t, cmd)
	before := w.started(cmd.Process.Pid)
	if _, err := stdin.Write([]byte("go\n")); err != nil {
		t.Fatal(err)
	}
	if gone := w.exited(cmd.Process.Pid); gone.Binary != sh {
		t.Errorf("%s exited, want %s", gone.Binary, sh)
	}
	after := w.started(cmd.Process.Pid)
	if after.Binary != stub || after.StartTime != before.StartTime {
		t.Errorf("now %s started at %d, want %s at %d", after.Binary, after.StartTime, stub, before.StartTime)
	}
}

// A loop whose events are kept, for tests that call it step by step.
func steppedLoop(t *testing.T) (*loop, chan Event) {
	t.Helper()
	w := &Watcher{opts: Options{ScanInterval: time.Hour, NoNetlink: true, Report: func(error) {}}, events: make(chan Event, 100)}
	l, err := newLoop(t.Context(), w)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.release(); err != nil {
			t.Error(err)
		}
	})
	return l, w.events
}

func TestReusedPIDIsNotTracked(t *testing.T) {
	l, _ := steppedLoop(t)
	cmd := start(t, stubQEMU(t), "60")
	p := Process{PID: cmd.Process.Pid, StartTime: 1} // of the pid's former owner
	if l.track(&tracked{pid: p.PID, pidfd: -1, vm: true, process: p}) {
		t.Error("a process is tracked under the identity of another")
	}
	if len(l.byPID) != 0 || len(l.byFD) != 0 {
		t.Errorf("left behind: %v, %v", l.byPID, l.byFD)
	}
}

func TestReusedPIDIsExitAndStart(t *testing.T) {
	l, events := steppedLoop(t)
	cmd := start(t, stubQEMU(t), "60")
	pid := cmd.Process.Pid
	former := &tracked{pid: pid, pidfd: -1, vm: true, process: Process{PID: pid, StartTime: 1}}
	l.byPID[pid] = former
	now, err := monotonic()
	if err != nil {
		t.Fatal(err)
	}
	l.executed(execution{pid, now})
	if e := <-events; e.Kind != Exited || e.Process.StartTime != 1 {
		t.Errorf("first %v of %d, want the former owner's exit", e.Kind, e.Process.StartTime)
	}
	e := <-events
	if e.Kind != Started || e.Process.PID != pid || !Same(pid, e.Process.StartTime) {
		t.Errorf("then %v of %d, want the new owner's start", e.Kind, e.Process.StartTime)
	}
	l.executed(execution{pid, now}) // an old message about what was inspected since
	if len(events) != 0 {
		t.Errorf("an old message made %v", <-events)
	}
}

func TestExitWithoutPidfd(t *testing.T) {
	l, events := steppedLoop(t)
	l.openPidfd = func(int) (int, error) { return -1, unix.ENOSYS }
	cmd := start(t, stubQEMU(t), "60")
	l.look(cmd.Process.Pid)
	if e := <-events; e.Kind != Started {
		t.Fatalf("got %v, want its start", e.Kind)
	}
	stop(cmd)
	l.scan()
	for e := range events {
		if e.Kind == Exited && e.Process.PID == cmd.Process.Pid {
			return
		}
		if len(events) == 0 {
			t.Fatal("its exit is not seen")
		}
	}
}

func TestWatchLeavesNothing(t *testing.T) {
	start(t, stubQEMU(t), "60")
	watch(t, Options{}).end() // whatever is opened once for good
	fds, goroutines := openFiles(t), runtime.NumGoroutine()
	for _, opts := range modes {
		for range 10 {
			ctx, cancel := context.WithCancel(t.Context())
			w, err := Watch(ctx, opts)
			if err != nil {
				t.Fatal(err)
			}
			<-w.Events()
			cancel()
			for range w.Events() {
			}
		}
	}
	// Other tests' garbage may be closed meanwhile; twenty watches that kept
	// one file each would outweigh it.
	if n := openFiles(t); n > fds {
		t.Errorf("%d open files, were %d", n, fds)
	}
	// The channel is closed by the goroutine's last statement.
	for deadline := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > goroutines; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines, were %d", runtime.NumGoroutine(), goroutines)
		}
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestSourceWhereEventsAreNotServed(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "discover") // not t.TempDir, which others cannot enter
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "discover.test")
	copyProgram(t, self, program)
	tests := []struct {
		name string
		attr syscall.SysProcAttr
		want string
	}{
		{"initial namespaces", syscall.SysProcAttr{}, "netlink: \n"},
		{"network namespace", syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}, "scan: process connector: "},
		{"pid namespace", syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}, "scan: process connector: "},
		{"user namespace", syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER}, "scan: process connector: "},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cmd := exec.Command(program)
			cmd.Env = append(os.Environ(), sourceHelper+"=1")
			cmd.SysProcAttr = &tt.attr
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Run(); err != nil {
				t.Fatalf("%v: %s", err, &out)
			}
			if !strings.HasPrefix(out.String(), tt.want) {
				t.Errorf("got %q, want %q", &out, tt.want)
			}
			t.Logf("%s", &out)
		})
	}
}

func FuzzProcessEvent(f *testing.F) {
	f.Add(make([]byte, minMessage))
	f.Add([]byte("short"))
	f.Fuzz(func(t *testing.T, data []byte) {
		msg := checkMessage(data)
		if e, ok := parseExecution(msg); ok && len(data) < minMessage {
			t.Errorf("%+v from %d bytes", e, len(data))
		}
	})
}

func BenchmarkScan(b *testing.B) {
	for b.Loop() {
		if _, err := Scan(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}

func TestChroot(t *testing.T) {
	jail, stub := t.TempDir(), stubQEMU(t)
	out, err := exec.Command("ldd", stub).Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, field := range strings.Fields(string(out)) {
		if filepath.IsAbs(field) {
			if err := os.MkdirAll(filepath.Join(jail, filepath.Dir(field)), 0o755); err != nil {
				t.Fatal(err)
			}
			copyProgram(t, field, filepath.Join(jail, field))
		}
	}
	copyProgram(t, stub, filepath.Join(jail, "qemu-system-stub"))
	if err := os.Mkdir(filepath.Join(jail, "vm"), 0o755); err != nil {
		t.Fatal(err)
	}
	w := watch(t, Options{})
	cmd := exec.Command("/qemu-system-stub", "60")
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: jail}
	cmd.Dir = "/vm"
	startCmd(t, cmd)
	p := w.started(cmd.Process.Pid)
	if want := fmt.Sprintf("/proc/%d/root", p.PID); p.Root != want {
		t.Errorf("root %q, want %q", p.Root, want)
	}
	if p.Cwd != "/vm" {
		t.Errorf("working directory %q, want /vm", p.Cwd)
	}
}
