package client_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/agent/rpc"
	"github.com/vmsnap/vmsnap/agent/rpc/rpctest"
	"github.com/vmsnap/vmsnap/api/client"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

func options(t *testing.T) rpc.Options {
	t.Helper()
	roles, err := rpc.ResolveRoles(uint32(os.Getuid()), nil, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return rpc.Options{Roles: roles, Version: "1.2.3"}
}

func connected(t *testing.T, socket string) *client.Client {
	t.Helper()
	c := client.New(socket)
	t.Cleanup(c.Close)
	return c
}

func running() op.Record {
	return op.Record{ID: "0000beef", Kind: op.KindSnapshot, VMName: "web", State: op.Running}
}

// followed is what Follow came to.
type followed struct {
	operation *vmsnapv1.Operation
	err       error
}

// follow follows 0000beef; the states that it sees come on the channel.
func follow(ctx context.Context, c *client.Client) (<-chan vmsnapv1.OperationState, <-chan followed) {
	states, end := make(chan vmsnapv1.OperationState, 100), make(chan followed, 1)
	go func() {
		operation, err := c.Follow(ctx, "0000beef", func(o *vmsnapv1.Operation) { states <- o.GetState() })
		close(states)
		end <- followed{operation, err}
	}()
	return states, end
}

func TestFollow(t *testing.T) {
	for name, c := range map[string]struct {
		last op.Record
		code vmsnapv1.ErrorCode // 0 when it is no error
	}{
		"succeeded": {op.Record{State: op.Succeeded}, 0},
		"partial":   {op.Record{State: op.Succeeded, Partial: true}, 0},
		"failed": {
			op.Record{State: op.Failed, Failure: &op.Failure{Kind: fault.NotQuiesced, Message: "not frozen"}},
			vmsnapv1.ErrorCode_ERROR_CODE_NOT_QUIESCED,
		},
		"failed, with no reason": {op.Record{State: op.Failed}, vmsnapv1.ErrorCode_ERROR_CODE_FAILED},
		"cancelled": {
			op.Record{State: op.Cancelled, Failure: &op.Failure{Kind: fault.Cancelled, Message: "by the user"}},
			vmsnapv1.ErrorCode_ERROR_CODE_CANCELLED,
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := rpctest.NewBackend()
			b.PutOperation(running())
			states, end := follow(t.Context(), connected(t, rpctest.Serve(t, b, options(t))))
			if s := <-states; s != vmsnapv1.OperationState_OPERATION_STATE_RUNNING {
				t.Errorf("began with %s", s)
			}
			c.last.ID = "0000beef"
			b.PutOperation(c.last)
			<-states
			got := <-end
			if got.operation.GetPartial() != c.last.Partial {
				t.Errorf("got %v", got.operation)
			}
			if c.code == 0 {
				if got.err != nil {
					t.Errorf("got %v", got.err)
				}
				return
			}
			detail, ok := client.ErrorOf(got.err)
			if failed, is := errors.AsType[*client.OperationError](got.err); !is || failed.Operation != got.operation {
				t.Errorf("got %v, not an operation's error", got.err)
			}
			if !ok || detail.GetCode() != c.code || detail.GetOperationId() != "0000beef" {
				t.Errorf("got %v; want %s", detail, c.code)
			}
		})
	}
}

// TestFollowOverARestart stops the daemon twice while an operation runs: once
// for a moment, and once so long that its socket is gone.
func TestFollowOverARestart(t *testing.T) {
	b := rpctest.NewBackend()
	b.PutOperation(running())
	socket := filepath.Join(t.TempDir(), "d.sock")
	stop := rpctest.ServeAt(t, socket, b, options(t))
	states, end := follow(t.Context(), connected(t, socket))
	<-states
	stop()
	stop = rpctest.ServeAt(t, socket, b, options(t))
	record := running()
	record.State = op.Reverting
	b.PutOperation(record)
	if s := <-states; s != vmsnapv1.OperationState_OPERATION_STATE_REVERTING {
		t.Errorf("after the first restart: %s", s)
	}
	stop()
	if _, err := net.Dial("unix", socket); err == nil {
		t.Fatal("the daemon has not stopped")
	}
	record.State = op.Succeeded
	b.PutOperation(record)
	rpctest.ServeAt(t, socket, b, options(t))
	if s, open := <-states; !open || s != vmsnapv1.OperationState_OPERATION_STATE_SUCCEEDED {
		t.Errorf("after the second restart: %s", s)
	}
	if got := <-end; got.err != nil {
		t.Errorf("got %v", got.err)
	}
	for s := range states {
		t.Errorf("seen once more: %s", s)
	}
}

// TestFollowAConnectionThatBreaks breaks connections without a word, as a
// daemon does that is killed.
func TestFollowAConnectionThatBreaks(t *testing.T) {
	b := rpctest.NewBackend()
	b.PutOperation(running())
	daemon := rpctest.Serve(t, b, options(t))
	front, cut := cuttable(t, daemon)
	states, end := follow(t.Context(), connected(t, front))
	<-states
	cut()
	record := running()
	record.State = op.Succeeded
	b.PutOperation(record)
	if got := <-end; got.err != nil {
		t.Errorf("got %v", got.err)
	}
}

// cuttable returns a socket that passes everything on to another, and a
// function that breaks the connection through it.
func cuttable(t *testing.T, to string) (socket string, cut func()) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "f.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	conns := make(chan net.Conn, 10)
	pass := func(from, to net.Conn) {
		_, _ = io.Copy(to, from)
		_, _ = from.Close(), to.Close()
	}
	go func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("unix", to)
			if err != nil {
				_ = near.Close()
				continue
			}
			go pass(near, far)
			go pass(far, near)
			conns <- near
		}
	}()
	return socket, func() { _ = (<-conns).Close() }
}

func TestFollowGivesUp(t *testing.T) {
	b := rpctest.NewBackend()
	c := connected(t, rpctest.Serve(t, b, options(t)))
	if _, err := c.Wait(t.Context(), "0000beef"); !hasCode(err, vmsnapv1.ErrorCode_ERROR_CODE_NOT_FOUND) {
		t.Errorf("without the operation: %v", err)
	}
	b.PutOperation(running())
	ctx, cancel := context.WithCancel(t.Context())
	states, end := follow(ctx, c)
	<-states
	cancel()
	got := <-end
	if !errors.Is(got.err, context.Canceled) || got.operation.GetState() != vmsnapv1.OperationState_OPERATION_STATE_RUNNING {
		t.Errorf("got %v, %v", got.operation, got.err)
	}
	// While there is no daemon, the context still ends it.
	ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := connected(t, filepath.Join(t.TempDir(), "none")).Wait(ctx, "0000beef"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("without a daemon: %v", err)
	}
}

func hasCode(err error, code vmsnapv1.ErrorCode) bool {
	detail, ok := client.ErrorOf(err)
	return ok && detail.GetCode() == code
}

func TestUnreachable(t *testing.T) {
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
	for name, c := range map[string]struct{ socket, message string }{
		"no socket":          {filepath.Join(dir, "none.sock"), "there is no socket " + dir},
		"nobody listens":     {dead, "nobody listens at the socket " + dead},
		"a name is too long": {filepath.Join(dir, strings.Repeat("x", 200)), "cannot be reached at " + dir},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := connected(t, c.socket).VMs().ListVMs(t.Context(), connect.NewRequest(&vmsnapv1.ListVMsRequest{}))
			detail, _ := client.ErrorOf(err)
			if !hasCode(err, vmsnapv1.ErrorCode_ERROR_CODE_UNREACHABLE) || !strings.Contains(detail.GetMessage(), c.message) || detail.GetHint() == "" {
				t.Errorf("got %v", detail)
			}
			if client.OutcomeUnknown(err) {
				t.Error("the outcome of what was never sent is known")
			}
		})
	}
}

func TestErrorOfOthers(t *testing.T) {
	if detail, ok := client.ErrorOf(errors.New("x")); ok {
		t.Errorf("got %v", detail)
	}
	if detail, ok := client.ErrorOf(nil); ok {
		t.Errorf("got %v", detail)
	}
	for code, want := range map[connect.Code]vmsnapv1.ErrorCode{
		connect.CodeCanceled:         vmsnapv1.ErrorCode_ERROR_CODE_CANCELLED,
		connect.CodeInvalidArgument:  vmsnapv1.ErrorCode_ERROR_CODE_USAGE,
		connect.CodeDeadlineExceeded: vmsnapv1.ErrorCode_ERROR_CODE_UNRESPONSIVE,
		connect.CodeUnimplemented:    vmsnapv1.ErrorCode_ERROR_CODE_UNSUPPORTED,
		connect.CodeUnavailable:      vmsnapv1.ErrorCode_ERROR_CODE_UNREACHABLE,
		connect.CodePermissionDenied: vmsnapv1.ErrorCode_ERROR_CODE_FAILED,
	} {
		if err := connect.NewError(code, errors.New("x")); !hasCode(err, want) {
			t.Errorf("%s is not %s", code, want)
		}
	}
}

func TestVersion(t *testing.T) {
	c := connected(t, rpctest.Serve(t, rpctest.NewBackend(), options(t)))
	if v, err := c.Version(t.Context()); v != "1.2.3" || err != nil {
		t.Errorf("got %q, %v", v, err)
	}
	if _, err := connected(t, filepath.Join(t.TempDir(), "none")).Version(t.Context()); !hasCode(err, vmsnapv1.ErrorCode_ERROR_CODE_UNREACHABLE) {
		t.Errorf("without a daemon: %v", err)
	}
}

// TestHungDaemon has something that takes connections and never answers: the
// caller's deadline ends the call.
func TestHungDaemon(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "d.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err = connected(t, socket).VMs().ListVMs(ctx, connect.NewRequest(&vmsnapv1.ListVMsRequest{}))
	if !hasCode(err, vmsnapv1.ErrorCode_ERROR_CODE_UNRESPONSIVE) || !client.OutcomeUnknown(err) {
		t.Errorf("got %v", err)
	}
}
