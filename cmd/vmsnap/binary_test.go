package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/agent/rpc/rpctest"
)

// built is the command as it is installed; every user may run it.
var built string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "vmsnap-cmd")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer func() { _ = os.RemoveAll(dir) }()
		if err := os.Chmod(dir, 0o755); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		built = filepath.Join(dir, "vmsnap")
		build := exec.Command("go", "build", "-o", built, ".")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

// binary prepares a run of the built command.
func binary(t *testing.T, socket string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), built, args...)
	cmd.Env = append(os.Environ(), socketVariable+"="+socket)
	cmd.Dir = "/"
	return cmd
}

// process is a run of the built command whose standard error is read as it
// comes.
type process struct {
	t      *testing.T
	cmd    *exec.Cmd
	stdout strings.Builder
	seen   strings.Builder
	stderr io.Reader
}

// start runs the command; tty makes its standard error a terminal.
func start(t *testing.T, tty bool, socket string, args ...string) *process {
	t.Helper()
	p := &process{t: t, cmd: binary(t, socket, args...)}
	p.cmd.Stdout = &p.stdout
	var near, far *os.File
	var err error
	if tty {
		near, far = openTerminal(t)
	} else if near, far, err = os.Pipe(); err != nil {
		t.Fatal(err)
	}
	p.cmd.Stderr = far
	p.stderr = near
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = near.Close() })
	// What never comes must not be waited for for ever.
	limit := time.AfterFunc(30*time.Second, func() { _ = p.cmd.Process.Kill() })
	t.Cleanup(func() { limit.Stop() })
	if err := far.Close(); err != nil {
		t.Fatal(err)
	}
	return p
}

// await reads the standard error until it has a text.
func (p *process) await(text string) {
	p.t.Helper()
	buf := make([]byte, 4096)
	for !strings.Contains(p.seen.String(), text) {
		n, err := p.stderr.Read(buf)
		p.seen.Write(buf[:n])
		if err != nil {
			p.t.Fatalf("%q did not come: %v after %q", text, err, p.seen.String())
		}
	}
}

func (p *process) signal(s os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// end reads the rest and returns the exit code.
func (p *process) end() int {
	p.t.Helper()
	// A terminal ends with an error where a pipe ends with EOF.
	rest, _ := io.ReadAll(p.stderr)
	p.seen.Write(rest)
	_ = p.cmd.Wait()
	return p.cmd.ProcessState.ExitCode()
}

// stuck returns a backend whose snapshots stay in their second step.
func stuck() *rpctest.Backend {
	b := rpctest.Sample()
	b.Script(rpctest.Script{Create: func(context.Context, agent.SnapshotRequest) (op.Record, error) {
		return b.PutOperation(freezingWeb()), nil
	}})
	return b
}

func freezingWeb() op.Record {
	began := time.Now()
	return op.Record{
		ID: "beefbeef", Kind: op.KindSnapshot, VMName: "web", State: op.Running, Created: began, Started: began,
		Steps:    rpctest.Steps(began, true, "preflight", "freeze"),
		Progress: op.Progress{Done: 1, Total: 4, Unit: "steps"},
	}
}

// scripted replaces only the cancelling of a stuck backend.
func scripted(b *rpctest.Backend, cancel func(context.Context, string) (op.Record, error)) *rpctest.Backend {
	b.Script(rpctest.Script{
		Create: func(context.Context, agent.SnapshotRequest) (op.Record, error) {
			return b.PutOperation(freezingWeb()), nil
		},
		Cancel: cancel,
	})
	return b
}

func TestInterruptCancels(t *testing.T) {
	for name, s := range map[string]os.Signal{"SIGINT": os.Interrupt, "SIGTERM": syscall.SIGTERM} {
		t.Run(name, func(t *testing.T) {
			b := stuck()
			p := start(t, false, serve(t, b), "snapshot", "create", "web")
			p.await("web: preflight: done in 120ms\n")
			p.signal(s)
			if code := p.end(); code != 130 {
				t.Errorf("the exit code is %d", code)
			}
			for _, want := range []string{"cancelling; Ctrl-C again leaves the operation to itself\n", "vmsnap: the snapshot was cancelled\n"} {
				if !strings.Contains(p.seen.String(), want) {
					t.Errorf("%q lacks %q", p.seen.String(), want)
				}
			}
			if r, err := b.Operation(t.Context(), "beefbeef"); err != nil || r.State != op.Cancelled {
				t.Errorf("the operation is %s, %v", r.State, err)
			}
			if p.stdout.String() != "" {
				t.Errorf("a result is printed: %s", p.stdout.String())
			}
		})
	}
}

// TestInterruptWaitsForTheRevert has a cancel that is acknowledged at once and
// work that takes its time to be undone.
func TestInterruptWaitsForTheRevert(t *testing.T) {
	b := rpctest.Sample()
	acknowledged := make(chan op.Record, 1)
	scripted(b, func(context.Context, string) (op.Record, error) {
		r := freezingWeb()
		r.State = op.Reverting
		r = b.PutOperation(r)
		acknowledged <- r
		return r, nil
	})
	p := start(t, false, serve(t, b), "snapshot", "create", "web")
	p.await("preflight: done")
	p.signal(os.Interrupt)
	p.await("web: undoing what was done\n")
	r := <-acknowledged
	r.State, r.Failure = op.Cancelled, &op.Failure{Kind: fault.Cancelled, Message: "cancelled, all is as before"}
	b.PutOperation(r)
	if code := p.end(); code != 130 || !strings.Contains(p.seen.String(), "vmsnap: cancelled, all is as before\n") {
		t.Errorf("exit %d with %q", code, p.seen.String())
	}
}

// TestInterruptTooLate has a snapshot that is past its cut: it completes.
func TestInterruptTooLate(t *testing.T) {
	b := rpctest.Sample()
	scripted(b, func(context.Context, string) (op.Record, error) {
		return op.Record{}, fault.New(fault.TooLate, "operation beefbeef is past its cut, and completes")
	})
	p := start(t, false, serve(t, b), "snapshot", "create", "web")
	p.await("preflight: done")
	p.signal(os.Interrupt)
	p.await("not cancelled: operation beefbeef is past its cut, and completes\n")
	s := taken("fresh")
	b.AddSnapshot(s)
	r := freezingWeb()
	r.State, r.Snapshot = op.Succeeded, s.ID
	b.PutOperation(r)
	if code := p.end(); code != 0 || !strings.HasPrefix(p.stdout.String(), "web/fresh taken") {
		t.Errorf("exit %d with %q and %q", code, p.stdout.String(), p.seen.String())
	}
}

// TestSecondInterruptDetaches has an operation that will not be cancelled.
func TestSecondInterruptDetaches(t *testing.T) {
	b := rpctest.Sample()
	scripted(b, func(context.Context, string) (op.Record, error) {
		r := freezingWeb()
		r.State = op.Cancelling
		return b.PutOperation(r), nil
	})
	p := start(t, false, serve(t, b), "snapshot", "create", "web")
	p.await("preflight: done")
	p.signal(os.Interrupt)
	p.await("web: cancelling\n")
	p.signal(os.Interrupt)
	if code := p.end(); code != 130 {
		t.Errorf("the exit code is %d", code)
	}
	if want := "vmsnap: operation beefbeef is left to itself\nhint: vmsnap operation watch beefbeef\n"; !strings.HasSuffix(p.seen.String(), want) {
		t.Errorf("%q lacks %q", p.seen.String(), want)
	}
}

// TestInterruptWhileBeginning interrupts before the daemon has answered: the
// operation that then begins is cancelled all the same.
func TestInterruptWhileBeginning(t *testing.T) {
	b := rpctest.Sample()
	asked, answer := make(chan struct{}), make(chan struct{})
	b.Script(rpctest.Script{Create: func(context.Context, agent.SnapshotRequest) (op.Record, error) {
		close(asked)
		<-answer
		return b.PutOperation(freezingWeb()), nil
	}})
	p := start(t, false, serve(t, b), "snapshot", "create", "web")
	<-asked
	p.signal(os.Interrupt)
	close(answer)
	if code := p.end(); code != 130 {
		t.Errorf("exit %d with %q", code, p.seen.String())
	}
	if r, err := b.Operation(t.Context(), "beefbeef"); err != nil || r.State != op.Cancelled {
		t.Errorf("the operation is %s, %v", r.State, err)
	}
}

// TestInterruptedWatch leaves the operation of somebody else alone.
func TestInterruptedWatch(t *testing.T) {
	b := rpctest.Sample()
	b.PutOperation(freezingWeb())
	p := start(t, false, serve(t, b), "operation", "watch", "beefbeef")
	p.await("preflight: done")
	p.signal(os.Interrupt)
	if code := p.end(); code != 130 || !strings.Contains(p.seen.String(), "operation beefbeef is left to itself") {
		t.Errorf("exit %d with %q", code, p.seen.String())
	}
	if r, _ := b.Operation(t.Context(), "beefbeef"); r.State != op.Running {
		t.Errorf("the operation is %s", r.State)
	}
}

// TestInterruptedCall ends a call that is not an operation.
func TestInterruptedCall(t *testing.T) {
	b := rpctest.Sample()
	asked := make(chan struct{})
	b.Script(rpctest.Script{VM: func(ctx context.Context, _ string) (agent.VMView, error) {
		close(asked)
		<-ctx.Done()
		return agent.VMView{}, ctx.Err()
	}})
	p := start(t, false, serve(t, b), "vm", "show", "web")
	<-asked
	p.signal(os.Interrupt)
	if code := p.end(); code != 130 || p.seen.String() != "vmsnap: interrupted\n" {
		t.Errorf("exit %d with %q", code, p.seen.String())
	}
}
