package freeze

import (
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
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/qga/qgatest"
)

// The test binary also plays the guard, and an agent that can be killed.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "guard":
			os.Exit(Main(context.Background(), hclog.LoggerOptions{Name: "guard", Level: hclog.Error}))
		case "agent":
			os.Exit(agentMain())
		}
	}
	// The race detector would delay the end of each of those by a second.
	if err := os.Setenv("GORACE", "atexit_sleep_ms=0"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// agentMain freezes as its standard input says, tells each step, and waits to
// be killed.
func agentMain() int {
	var args agentArgs
	err := json.NewDecoder(os.Stdin).Decode(&args)
	var g *Guard
	if err == nil {
		g, err = Start(context.Background(), guards(args.Dir), args.Request)
	}
	if err == nil {
		fmt.Println("started")
		_, err = g.Freeze(context.Background())
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("frozen")
	select {}
}

type agentArgs struct {
	Dir     string
	Request Request
}

// agentProcess is an agent of its own, to be killed.
type agentProcess struct {
	*exec.Cmd
	steps <-chan string
}

func startAgent(t *testing.T, dir string, r Request) *agentProcess {
	t.Helper()
	cmd := exec.Command(os.Args[0], "agent")
	args, err := json.Marshal(agentArgs{dir, r})
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdin, cmd.Stderr = strings.NewReader(string(args)), os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	steps := make(chan string, 4)
	go func() {
		defer close(steps)
		for {
			var step string
			if _, err := fmt.Fscanln(out, &step); err != nil {
				return
			}
			steps <- step
		}
	}()
	a := &agentProcess{Cmd: cmd, steps: steps}
	t.Cleanup(func() { a.signal(t, unix.SIGKILL); _ = cmd.Wait() })
	return a
}

func (a *agentProcess) await(t *testing.T, want string) {
	t.Helper()
	select {
	case got := <-a.steps:
		if got != want {
			t.Fatalf("the agent says %q, want %q", got, want)
		}
	case <-within(t).Done():
		t.Fatalf("the agent never said %q", want)
	}
}

func (a *agentProcess) signal(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := a.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Error(err)
	}
}

func guards(dir string) Config {
	return Config{Executable: []string{os.Args[0], "guard"}, Dir: dir}
}

// within is ample for anything that should happen.
func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// standIn is a process that takes the place of QEMU.
func standIn(t *testing.T) (Process, func()) {
	t.Helper()
	cmd := exec.Command("sleep", "infinity")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill := func() { _ = errors.Join(cmd.Process.Kill(), cmd.Wait()) }
	t.Cleanup(kill)
	p, err := ProcessOf(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	return p, kill
}

// request is a freeze of a guest that is a script.
func request(t *testing.T, s *qgatest.Server) Request {
	t.Helper()
	qemu, _ := standIn(t)
	return Request{
		VM: "web", VMID: "7f3a", Operation: "op1", AgentSocket: s.Path(), QEMU: qemu,
		FreezeTimeout: 10 * time.Second, Lease: 30 * time.Second,
	}
}

// outcome waits for the guard's end, and checks what must hold after every one:
// the guest is thawed and no lease is left.
func outcome(t *testing.T, s *qgatest.Server, g *Guard) Outcome {
	t.Helper()
	select {
	case <-g.Done():
	case <-within(t).Done():
		t.Fatal("the guard does not end")
	}
	checkThawed(t, s, g.cfg.Dir)
	return g.Outcome()
}

func checkThawed(t *testing.T, s *qgatest.Server, dir string) {
	t.Helper()
	if s.Frozen() {
		t.Error("the guest is frozen")
	}
	if leases, err := Leases(dir); err != nil || len(leases) > 0 {
		t.Errorf("leases %+v, error %v, want none", leases, err)
	}
}

// stop stops a process, and returns when none of its threads runs.
func stop(t *testing.T, p Process) {
	t.Helper()
	if err := unix.Kill(p.PID, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for ctx := within(t); ; {
		threads, err := filepath.Glob("/proc/" + strconv.Itoa(p.PID) + "/task/*/stat")
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
			t.Fatalf("process %d does not stop", p.PID)
		}
	}
}
