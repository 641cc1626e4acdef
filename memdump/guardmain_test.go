package memdump

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/monitor"
)

// The test binary also plays the guard process, and agents that can be killed.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "pause-guard":
			if err := RunGuard(context.Background(), hclog.LoggerOptions{Name: "guard", Level: hclog.Error}); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			os.Exit(0)
		case "pausing-agent":
			pausingAgent()
			os.Exit(0)
		case "encrypt-and-hang":
			encryptAndHang()
		case "compress-and-hang":
			compressAndHang()
		}
	}
	// The race detector would delay the end of each of those by a second.
	if err := os.Setenv("GORACE", "atexit_sleep_ms=0"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

func guardCommand() []string { return []string{os.Args[0], "pause-guard"} }

// guardTestLimit is ample for anything that should happen.
const guardTestLimit = 60 * time.Second

func guardContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), guardTestLimit)
	t.Cleanup(cancel)
	return ctx
}

// guardedVM is what an agent is told about the VM that it pauses.
type guardedVM struct {
	Socket    string
	PID       int
	StartTime uint64
	Resumed   string
}

func (v guardedVM) config(s *monitor.Session) GuardConfig {
	return GuardConfig{
		Command: guardCommand(), Session: s, Sockets: []string{v.Socket}, VM: "web",
		PID: v.PID, StartTime: v.StartTime, Resumed: v.Resumed,
	}
}

// pausingAgent does what it reads, a line each, and answers each with a line.
func pausingAgent() {
	in := bufio.NewScanner(os.Stdin)
	in.Scan()
	var vm guardedVM
	err := json.Unmarshal(in.Bytes(), &vm)
	var s *monitor.Session
	if err == nil {
		s, err = monitor.Dial(context.Background(), vm.Socket)
	}
	var g *PauseGuard
	if err == nil {
		g, err = StartGuard(context.Background(), vm.config(s))
	}
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(g.cmd.Process.Pid)
	for in.Scan() {
		fmt.Println(obey(in.Text(), s, g))
	}
}

func obey(line string, s *monitor.Session, g *PauseGuard) string {
	ctx := context.Background()
	verb, rest, _ := strings.Cut(line, " ")
	var err error
	switch verb {
	case "arm":
		limit, _ := time.ParseDuration(rest)
		err = g.Arm(limit)
	case "disarm":
		acted, err := g.Disarm()
		return fmt.Sprintf("acted %t, error %v", acted, err)
	case "close":
		err = g.Close()
	case "session":
		<-s.Done()
		return fmt.Sprint(errors.Is(s.Err(), monitor.ErrGone))
	case "getfd":
		f, openErr := os.OpenFile(rest, os.O_CREATE|os.O_RDWR, 0o600)
		if openErr != nil {
			return openErr.Error()
		}
		err = errors.Join(s.ExecuteWithFile(ctx, "getfd", map[string]string{"fdname": "memory"}, nil, f), f.Close())
	case "send": // without waiting for the answer
		go func() { _ = s.Execute(ctx, rest, nil, nil) }()
	default:
		var args any
		if rest != "" {
			args = json.RawMessage(rest)
		}
		err = s.Execute(ctx, verb, args, nil)
	}
	return fmt.Sprint(err)
}

// agentUnderTest is an agent of its own, to be killed.
type agentUnderTest struct {
	t     *testing.T
	cmd   *exec.Cmd
	guard int // pidfd of its guard
	pid   int // of its guard
	say   *os.File
	lines chan string
}

func startPausingAgent(t *testing.T, vm guardedVM) *agentUnderTest {
	t.Helper()
	cmd := exec.Command(os.Args[0], "pausing-agent")
	cmd.Stderr = os.Stderr
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdin = r
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = r.Close()
	a := &agentUnderTest{t: t, cmd: cmd, say: w, lines: make(chan string, 16), guard: -1}
	go func() {
		defer close(a.lines)
		for in := bufio.NewScanner(out); in.Scan(); {
			a.lines <- in.Text()
		}
	}()
	t.Cleanup(func() {
		a.signal(unix.SIGKILL)
		_ = cmd.Wait()
		_ = w.Close()
		if a.guard >= 0 {
			a.awaitGuardEnd()
			_ = unix.Close(a.guard)
		}
	})
	told, err := json.Marshal(vm)
	if err != nil {
		t.Fatal(err)
	}
	answer := a.ask(string(told))
	if a.pid, err = strconv.Atoi(answer); err != nil {
		t.Fatalf("the agent says %q", answer)
	}
	if a.guard, err = unix.PidfdOpen(a.pid, 0); err != nil {
		t.Fatal(err)
	}
	return a
}

// ask has the agent do something and returns what it answers.
func (a *agentUnderTest) ask(line string) string {
	a.t.Helper()
	if _, err := a.say.WriteString(line + "\n"); err != nil {
		a.t.Fatal(err)
	}
	select {
	case answer := <-a.lines:
		return answer
	case <-time.After(guardTestLimit):
		a.t.Fatalf("the agent does not answer %q", line)
		return ""
	}
}

// do has the agent do something that must succeed.
func (a *agentUnderTest) do(lines ...string) {
	a.t.Helper()
	for _, line := range lines {
		if answer := a.ask(line); answer != "<nil>" {
			a.t.Fatalf("%s: %s", line, answer)
		}
	}
}

func (a *agentUnderTest) signal(s unix.Signal) {
	a.t.Helper()
	if err := a.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		a.t.Error(err)
	}
}

// awaitGuardEnd fails the test unless the guard process ends.
func (a *agentUnderTest) awaitGuardEnd() {
	a.t.Helper()
	if !processEnds(a.t, a.guard, guardTestLimit) {
		a.t.Error("the guard does not end")
	}
}

func processEnds(t *testing.T, pidfd int, limit time.Duration) bool {
	t.Helper()
	_, exited, err := (&wordPipe{fd: -1}).await(pidfd, time.Now().Add(limit))
	if err != nil {
		t.Error(err)
	}
	return exited
}

// halt stops a process, and returns when none of its threads runs.
func halt(t *testing.T, pid int) {
	t.Helper()
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for ctx := guardContext(t); ; {
		threads, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*/stat")
		if err != nil {
			t.Fatal(err)
		}
		running := slices.ContainsFunc(threads, func(path string) bool {
			b, err := os.ReadFile(path)
			return err == nil && !strings.Contains(string(b), ") T ")
		})
		if !running {
			return
		}
		select {
		case <-time.After(time.Millisecond): // only a parent gets an event
		case <-ctx.Done():
			t.Fatalf("process %d does not stop", pid)
		}
	}
}
