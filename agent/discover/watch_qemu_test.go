package discover

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// qemu is a QEMU to test with.
type qemu struct{ testvm.QEMU }

// forEachQEMU runs a test with each version, one after the other: no guest runs
// in these QEMUs, so that they need not wait for the turn of one.
func forEachQEMU(t *testing.T, test func(t *testing.T, q qemu)) {
	t.Helper()
	versions, err := testvm.Versions()
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range versions {
		t.Run(q.Name, func(t *testing.T) { test(t, qemu{q}) })
	}
}

// command runs it with the arguments that it needs and these.
func (q qemu) command(args ...string) *exec.Cmd {
	cmd := exec.Command(q.Binary, slices.Concat(q.Args, args)...)
	cmd.Stderr = os.Stderr
	return cmd
}

// start runs it until the end of the test.
func (q qemu) start(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := q.command(args...)
	startCmd(t, cmd)
	return cmd
}

const testUUID = "7f3a2b10-5c1d-4e8f-9a6b-112233445566"

// bareArgs start a QEMU without a machine that listens on a socket.
func bareArgs(name, socket string) []string {
	return []string{
		"-machine", "none", "-S", "-display", "none", "-nodefaults",
		"-name", name, "-uuid", testUUID, "-qmp", "unix:" + socket + ",server=on,wait=off",
	}
}

// inEachMode runs a test for every QEMU and every way to notice its start.
func inEachMode(t *testing.T, test func(t *testing.T, q qemu, w *watching)) {
	forEachQEMU(t, func(t *testing.T, q qemu) {
		for name, opts := range modes {
			t.Run(name, func(t *testing.T) { test(t, q, watch(t, opts)) })
		}
	})
}

func TestQEMUStartAndExit(t *testing.T) {
	inEachMode(t, func(t *testing.T, q qemu, w *watching) {
		dir := t.TempDir()
		args := bareArgs("web,process=other", "qmp") // a relative path
		cmd := q.command(args...)
		cmd.Dir = dir
		began := time.Now()
		startCmd(t, cmd)
		p := w.started(cmd.Process.Pid)
		t.Logf("started after %v", time.Since(began))
		if p.Name != "web" || p.UUID != testUUID || p.Machine != "none" || !p.StartPaused || p.Root != "" ||
			p.UID != os.Getuid() || p.Binary != q.Binary || p.Cwd != dir || p.Libvirt || p.Stopped {
			t.Errorf("described as %+v", p)
		}
		if diff := cmp.Diff([]Socket{{Path: filepath.Join(dir, "qmp")}}, p.QMP); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff(cmd.Args, p.Args); diff != "" {
			t.Error(diff)
		}
		if age := time.Since(p.Started); age < 0 || age > 10*time.Second {
			t.Errorf("started at %v", p.Started)
		}
		if !Same(p.PID, p.StartTime) {
			t.Error("it is not itself")
		}
		began = time.Now()
		stop(cmd)
		if gone := w.exited(p.PID); gone.StartTime != p.StartTime {
			t.Errorf("exit of start time %d, want %d", gone.StartTime, p.StartTime)
		}
		t.Logf("exited after %v", time.Since(began))
		if Same(p.PID, p.StartTime) {
			t.Error("it is still itself after its exit")
		}
	})
}

func TestQEMUDaemonize(t *testing.T) {
	inEachMode(t, func(t *testing.T, q qemu, w *watching) {
		dir := t.TempDir()
		pidFile := filepath.Join(dir, "pid")
		cmd := q.command(append(bareArgs("daemon", "qmp"), "-daemonize", "-pidfile", "pid")...)
		cmd.Dir = dir // which Cmd puts into PWD
		if err := cmd.Run(); err != nil {
			t.Fatal(err)
		}
		pid := pidIn(pidFile)
		process, err := os.FindProcess(pid)
		if pid == 0 || err != nil {
			t.Fatalf("pid file: %d, %v", pid, err)
		}
		t.Cleanup(func() { _ = process.Kill() })
		p := w.next("the daemon", time.Second, func(e Event) bool {
			if e.Process.PID == cmd.Process.Pid {
				t.Errorf("the launcher was reported: %v", e.Kind)
			}
			return e.Kind == Started && e.Process.Name == "daemon"
		}).Process
		if p.PID != pid || !p.Daemonized {
			t.Errorf("process %d (daemonized: %v) started, want %d", p.PID, p.Daemonized, pid)
		}
		if p.QMP[0].Path != filepath.Join(dir, "qmp") || p.PIDFile != pidFile {
			t.Errorf("socket %s and pid file %s, want them in %s", p.QMP[0].Path, p.PIDFile, dir)
		}
		greet(t, p, p.QMP[0])
		if err := process.Kill(); err != nil {
			t.Fatal(err)
		}
		w.exited(pid)
	})
}

func TestQEMUOtherMountNamespace(t *testing.T) {
	forEachQEMU(t, func(t *testing.T, q qemu) {
		dir := t.TempDir()
		w := watch(t, Options{})
		// The socket's directory exists in that namespace only, behind a link that
		// leads elsewhere in ours.
		script := `mount -t tmpfs none "$1" && mkdir "$1/run" && ln -s "$1/run" "$1/link" && shift && exec "$@"`
		args := append([]string{"-m", "--propagation", "private", "sh", "-ec", script, "sh", dir, q.Binary},
			slices.Concat(q.Args, bareArgs("elsewhere", dir+"/link/qmp"))...)
		cmd := start(t, "unshare", args...)
		p := w.started(cmd.Process.Pid)
		if want := fmt.Sprintf("/proc/%d/root", p.PID); p.Root != want {
			t.Errorf("root %q, want %q", p.Root, want)
		}
		if p.QMP[0].Path != dir+"/link/qmp" {
			t.Errorf("socket %q, want the name that QEMU uses", p.QMP[0].Path)
		}
		greet(t, p, p.QMP[0])
		if _, err := os.Stat(dir + "/run"); err == nil {
			t.Error("the socket is in our namespace too: the test proves nothing")
		}
	})
}

// A namespace that hides nothing of the VM is as good as none: services have one
// for other reasons, and so has vmsnapd.
func TestQEMUNamespaceOfTheSameTree(t *testing.T) {
	forEachQEMU(t, func(t *testing.T, q qemu) {
		dir := t.TempDir()
		hidden := filepath.Join(t.TempDir(), "hidden")
		if err := os.Mkdir(hidden, 0o700); err != nil {
			t.Fatal(err)
		}
		w := watch(t, Options{})
		script := `mount -t tmpfs none "$1" && shift && exec "$@"`
		args := append([]string{"-m", "--propagation", "private", "sh", "-ec", script, "sh", hidden, q.Binary},
			slices.Concat(q.Args, bareArgs("beside", dir+"/qmp"))...)
		p := w.started(start(t, "unshare", args...).Process.Pid)
		if p.Root != "" {
			t.Errorf("root %q", p.Root)
		}
		greet(t, p, p.QMP[0])
	})
}

func TestQEMUAbstractSockets(t *testing.T) {
	forEachQEMU(t, func(t *testing.T, q qemu) {
		w := watch(t, Options{})
		name := "vmsnap-test-" + strconv.Itoa(os.Getpid())
		cmd := q.start(t, "-machine", "none", "-S", "-display", "none", "-nodefaults",
			"-chardev", "socket,id=a,abstract=on,server=on,wait=off,path="+name, "-mon", "a,mode=control",
			"-chardev", "socket,id=b,abstract=on,tight=off,server=on,wait=off,path="+name, "-mon", "b,mode=control")
		p := w.started(cmd.Process.Pid)
		if len(p.QMP) != 2 {
			t.Fatalf("sockets %+v, want two", p.QMP)
		}
		for _, s := range p.QMP {
			greet(t, p, s)
		}
	})
}

func TestQEMUTwoOfOneIdentity(t *testing.T) {
	forEachQEMU(t, func(t *testing.T, q qemu) {
		dir := t.TempDir()
		w := watch(t, Options{})
		first := q.start(t, bareArgs("twin", dir+"/1")...)
		second := q.start(t, bareArgs("twin", dir+"/2")...)
		w.started(first.Process.Pid)
		w.started(second.Process.Pid)
		found, err := Scan(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		sockets := map[string]bool{}
		for _, p := range found {
			if p.Name == "twin" && p.UUID == testUUID {
				sockets[p.QMP[0].Path] = true
			}
		}
		if diff := cmp.Diff(map[string]bool{dir + "/1": true, dir + "/2": true}, sockets); diff != "" {
			t.Error(diff)
		}
		stop(first)
		w.exited(first.Process.Pid)
		if _, err := Inspect(second.Process.Pid); err != nil {
			t.Errorf("the other one: %v", err)
		}
	})
}

func TestQEMUStoppedBySignal(t *testing.T) {
	forEachQEMU(t, func(t *testing.T, q qemu) {
		w := watch(t, Options{})
		cmd := q.start(t, bareArgs("halted", t.TempDir()+"/qmp")...)
		w.started(cmd.Process.Pid)
		if err := cmd.Process.Signal(unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(5 * time.Second); ; {
			p, err := Inspect(cmd.Process.Pid)
			if err != nil {
				t.Fatal(err)
			}
			if p.Stopped {
				return
			}
			if time.Now().After(deadline) {
				t.Fatal("not seen as stopped")
			}
		}
	})
}

func TestQEMUQuestionsAreNoVMs(t *testing.T) {
	forEachQEMU(t, func(t *testing.T, q qemu) {
		w := watch(t, Options{})
		for _, arg := range []string{"-version", "-help"} {
			if err := exec.Command(q.Binary, arg).Run(); err != nil {
				t.Fatal(err)
			}
		}
		last := q.start(t, bareArgs("last", t.TempDir()+"/qmp")...)
		w.next("the one VM", time.Second, func(e Event) bool {
			if len(e.Process.Args) == 2 && e.Process.Binary == q.Binary {
				t.Errorf("%v: %q", e.Kind, e.Process.Args)
			}
			return e.Kind == Started && e.Process.PID == last.Process.Pid
		})
	})
}

// greet connects to a monitor and reads its greeting. The socket appears some
// time after the process.
func greet(t *testing.T, p Process, s Socket) *qmpConn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	conn, err := testvm.Connect(ctx, nil, func(ctx context.Context) (net.Conn, error) {
		address, err := p.Address(s)
		if err != nil {
			return nil, err
		}
		return (&net.Dialer{}).DialContext(ctx, "unix", address)
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	q := &qmpConn{t, conn, bufio.NewReader(conn)}
	if line := q.line(); !strings.Contains(line, `"QMP"`) {
		t.Fatalf("%s greets with %q", conn.RemoteAddr(), line)
	}
	return q
}

// qmpConn is enough of a QMP session to ask a question.
type qmpConn struct {
	t    *testing.T
	conn net.Conn
	r    *bufio.Reader
}

func (q *qmpConn) line() string {
	q.t.Helper()
	line, err := q.r.ReadString('\n')
	if err != nil {
		q.t.Fatal(err)
	}
	return line
}

func (q *qmpConn) ask(command string, result any) {
	q.t.Helper()
	if _, err := fmt.Fprintf(q.conn, "{\"execute\":%q}\n", command); err != nil {
		q.t.Fatal(err)
	}
	for {
		var reply struct {
			Return json.RawMessage `json:"return"`
			Error  json.RawMessage `json:"error"`
		}
		line := q.line()
		if err := json.Unmarshal([]byte(line), &reply); err != nil || reply.Error != nil {
			q.t.Fatalf("%s: %s, %v", command, line, err)
		}
		if reply.Return == nil {
			continue // an event
		}
		if err := json.Unmarshal(reply.Return, result); err != nil {
			q.t.Fatal(err)
		}
		return
	}
}

// TestQEMUAsyncTeardown runs a QEMU with a second process that has its command
// line and outlives it by a little.
func TestQEMUAsyncTeardown(t *testing.T) {
	forEachQEMU(t, func(t *testing.T, q qemu) {
		option := []string{"-run-with", "async-teardown=on"}
		if _, old := q.takesNoArgument(t, "async-teardown"); old {
			option = []string{"-async-teardown"}
		}
		w := watch(t, Options{})
		cmd := q.start(t, append(bareArgs("teardown", t.TempDir()+"/qmp"), option...)...)
		p := w.started(cmd.Process.Pid)
		greet(t, p, p.QMP[0])
		found, err := Scan(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, p := range found {
			if p.Name == "teardown" {
				n++
			}
		}
		if children := childrenOf(t, p.PID); n != 1 || len(children) != 1 {
			t.Errorf("%d VMs found, want one; its children are %v, want one", n, children)
		}
		stop(cmd)
		w.exited(p.PID)
	})
}

func childrenOf(t *testing.T, pid int) []string {
	t.Helper()
	data, err := os.ReadFile(procPath(pid, fmt.Sprintf("task/%d/children", pid)))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(string(data))
}
