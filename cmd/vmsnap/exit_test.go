package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/agent/rpc/rpctest"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// exitCodes are what operators' scripts rely on; the numbers must not change.
var exitCodes = map[fault.Kind]int{
	fault.Failed:        1,
	fault.Usage:         2,
	fault.Partial:       3,
	fault.NotFound:      4,
	fault.NotQuiesced:   5,
	fault.NoSpace:       6,
	fault.Denied:        7,
	fault.Unresponsive:  8,
	fault.TooLate:       9,
	fault.Busy:          11,
	fault.HasDependants: 12,
	fault.Exists:        13,
	fault.Unsupported:   14,
	fault.Cancelled:     130,
}

// TestExitCodes has each kind of failure as that of a call, as that of an
// operation, and as what a dry run finds.
func TestExitCodes(t *testing.T) {
	for kind, want := range exitCodes {
		failure := fault.New(kind, "web: this went wrong").WithHint("do that")
		b := rpctest.Sample()
		b.PutOperation(op.Record{
			ID: "0000beef", Kind: op.KindSnapshot, VMName: "web", State: op.Failed,
			Failure: &op.Failure{Kind: kind, Message: failure.Message, Hint: failure.Hint},
		})
		b.Script(rpctest.Script{
			VM: func(context.Context, string) (agent.VMView, error) {
				return agent.VMView{}, fmt.Errorf("ask: %w", failure)
			},
			Plan: func(context.Context, agent.SnapshotRequest) (agent.Plan, error) {
				return agent.Plan{Blockers: []*fault.Error{failure}}, nil
			},
		})
		socket := serve(t, b)
		for _, line := range []string{"vm show web", "operation watch 0000beef", "snapshot create web --dry-run"} {
			t.Run(string(kind)+" "+line, func(t *testing.T) {
				got := command(t, socket, strings.Fields(line)...)
				if got.code != want {
					t.Errorf("the exit code is %d; want %d", got.code, want)
				}
				if !strings.Contains(got.stderr, "web: this went wrong\nhint: do that\n") || !strings.Contains(got.stderr, "vmsnap: ") {
					t.Errorf("the standard error has %q", got.stderr)
				}
			})
		}
	}
}

// TestBusyNamesTheOperation follows the hint of a busy VM.
func TestBusyNamesTheOperation(t *testing.T) {
	b := rpctest.Sample()
	b.Script(rpctest.Script{Create: func(context.Context, agent.SnapshotRequest) (op.Record, error) {
		return op.Record{}, fault.New(fault.Busy, "%w", &op.BusyError{VM: "web", Operation: "0badcafe"}).
			WithHint("wait for it, or cancel it: vmsnap operation cancel 0badcafe")
	}})
	golden(t, "create-busy", "", []string{"snapshot", "create", "web"}, command(t, serve(t, b), "snapshot", "create", "web"))
}

func TestDaemonUnreachable(t *testing.T) {
	dir := t.TempDir()
	dead := filepath.Join(dir, "dead.sock")
	listener, err := net.Listen("unix", dead)
	if err != nil {
		t.Fatal(err)
	}
	listener.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	for name, socket := range map[string]string{"no-socket": filepath.Join(dir, "none.sock"), "dead": dead} {
		for _, line := range []string{"vm list", "snapshot create web", "operation watch 0000beef"} {
			t.Run(name+" "+line, func(t *testing.T) {
				args := strings.Fields(line)
				golden(t, "unreachable-"+name+"-"+args[1], socket, args, command(t, socket, args...))
			})
		}
	}
	// The version of the command itself can still be told.
	if got := command(t, dead, "version"); got.code != 0 || !strings.Contains(got.stdout, "nobody listens") {
		t.Errorf("version: %+v", got)
	}
}

// TestSocketOfOthers runs the command as a user who may not open the socket.
func TestSocketOfOthers(t *testing.T) {
	socket := serve(t, rpctest.Sample())
	if err := os.Chmod(socket, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := binary(t, socket, "vm", "list")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err == nil || cmd.ProcessState.ExitCode() != int(vmsnapv1.ErrorCode_ERROR_CODE_DENIED) ||
		!strings.Contains(string(out), "may not be opened by this user\nhint: join the group") {
		t.Errorf("got %v with %s", err, out)
	}
}

// TestLostAnswer has a daemon that dies with a request in its hands.
func TestLostAnswer(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "d.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		_, _ = conn.Read(make([]byte, 64<<10))
		_, _ = listener.Close(), conn.Close()
	}()
	got := command(t, socket, "snapshot", "create", "web", "--request-id", "mine")
	if got.code == 0 || !strings.Contains(got.stderr, "may have begun all the same; the same command with --request-id mine finds out") {
		t.Errorf("got %+v", got)
	}
}

func TestVersion(t *testing.T) {
	got := command(t, serve(t, rpctest.Sample()), "version")
	if got.code != 0 || !strings.HasPrefix(got.stdout, "vmsnap ") || !strings.Contains(got.stdout, "\nvmsnapd 1.2.3, at /") {
		t.Errorf("got %+v", got)
	}
	for f, want := range map[string]string{"json": `"vmsnapd": {`, "yaml": "vmsnapd:\n  version: 1.2.3\n"} {
		if got := command(t, serve(t, rpctest.Sample()), "version", "-o", f); !strings.Contains(got.stdout, want) {
			t.Errorf("as %s: %+v", f, got)
		}
	}
}
