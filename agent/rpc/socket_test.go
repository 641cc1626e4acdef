package rpc_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/hashicorp/go-hclog"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/agent/rpc"
	"github.com/vmsnap/vmsnap/agent/rpc/rpctest"
	"github.com/vmsnap/vmsnap/api/client"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// journal keeps what is logged.
type journal struct {
	mu   sync.Mutex
	text strings.Builder
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.Write(p)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.String()
}

func (j *journal) logger() hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{Level: hclog.Debug, Output: j})
}

// ownRoles makes the tests' own user an admin.
func ownRoles(t testing.TB) rpc.Roles {
	t.Helper()
	roles, err := rpc.ResolveRoles(uint32(os.Getuid()), nil, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return roles
}

func wantCode(t *testing.T, err error, want vmsnapv1.ErrorCode, message string) {
	t.Helper()
	detail, ok := client.ErrorOf(err)
	if !ok || detail.GetCode() != want || !strings.Contains(detail.GetMessage(), message) {
		t.Errorf("got %v (%v); want %s with %q", err, detail, want, message)
	}
}

func TestRequestReachesTheBackend(t *testing.T) {
	b := rpctest.Sample()
	got := make(chan agent.SnapshotRequest, 1)
	b.Script(rpctest.Script{Create: func(_ context.Context, req agent.SnapshotRequest) (op.Record, error) {
		got <- req
		return op.Record{ID: "0000beef", Kind: op.KindSnapshot, State: op.Queued}, nil
	}})
	c := client.New(rpctest.Serve(t, b, rpc.Options{Roles: ownRoles(t)}))
	defer c.Close()
	res, err := c.Snapshots().CreateSnapshot(t.Context(), connect.NewRequest(&vmsnapv1.CreateSnapshotRequest{
		Vm: "web", Name: "n", Description: "d", Labels: map[string]string{"k": "v"}, Disks: []string{"root"},
		Exclude: []string{"data"}, Mountpoints: []string{"/"}, Strict: true, AllowPartial: true, RequestId: "r",
		Quiesce: vmsnapv1.Quiesce_QUIESCE_PREFER, Memory: true, MemoryStrategy: vmsnapv1.MemoryStrategy_MEMORY_STRATEGY_PRECOPY,
		MaxPause: durationpb.New(time.Second), Compress: true,
	}))
	if err != nil {
		t.Fatal(err)
	}
	if res.Msg.GetOperation().GetId() != "0000beef" {
		t.Errorf("got the operation %v", res.Msg.GetOperation())
	}
	want := agent.SnapshotRequest{
		VM: "web", Name: "n", Description: "d", Labels: map[string]string{"k": "v"}, Disks: []string{"root"},
		Exclude: []string{"data"}, Quiesce: agent.QuiescePrefer, Mountpoints: []string{"/"}, Strict: true,
		AllowPartial: true, Memory: true, Strategy: agent.MemoryPrecopy, MaxPause: time.Second, Compress: true,
		RequestID: "r", UID: uint32(os.Getuid()),
	}
	if diff := diff(want, <-got); diff != "" {
		t.Errorf("request (-want +got):\n%s", diff)
	}
}

func TestTooLargeARequest(t *testing.T) {
	c := client.New(rpctest.Serve(t, rpctest.Sample(), rpc.Options{Roles: ownRoles(t)}))
	defer c.Close()
	_, err := c.VMs().GetVM(t.Context(), connect.NewRequest(&vmsnapv1.GetVMRequest{Vm: strings.Repeat("x", 2<<20)}))
	if connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("got %v", err)
	}
	wantCode(t, err, vmsnapv1.ErrorCode_ERROR_CODE_USAGE, "larger than configured max 1048576")
}

func TestPanicBecomesAnError(t *testing.T) {
	b, log := rpctest.Sample(), new(journal)
	b.Script(rpctest.Script{VM: func(context.Context, string) (agent.VMView, error) { panic("out of range") }})
	c := client.New(rpctest.Serve(t, b, rpc.Options{Roles: ownRoles(t), Logger: log.logger()}))
	defer c.Close()
	_, err := c.VMs().GetVM(t.Context(), connect.NewRequest(&vmsnapv1.GetVMRequest{Vm: "web"}))
	wantCode(t, err, vmsnapv1.ErrorCode_ERROR_CODE_FAILED, "vmsnapd failed inside")
	for _, want := range []string{"call panicked", "out of range", "socket_test.go", "/vmsnap.v1.VMService/GetVM"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log lacks %q:\n%s", want, log)
		}
	}
	if _, err := c.VMs().ListVMs(t.Context(), connect.NewRequest(&vmsnapv1.ListVMsRequest{})); err != nil {
		t.Errorf("the next call: %v", err)
	}
}

func TestCallsAreLogged(t *testing.T) {
	log := new(journal)
	c := client.New(rpctest.Serve(t, rpctest.Sample(), rpc.Options{Roles: ownRoles(t), Logger: log.logger()}))
	defer c.Close()
	_, err := c.VMs().GetVM(t.Context(), connect.NewRequest(&vmsnapv1.GetVMRequest{Vm: "nope"}))
	wantCode(t, err, vmsnapv1.ErrorCode_ERROR_CODE_NOT_FOUND, `there is no VM "nope"`)
	want := []string{"[DEBUG]", "procedure=/vmsnap.v1.VMService/GetVM", fmt.Sprintf("uid=%d", os.Getuid()), fmt.Sprintf("pid=%d", os.Getpid()), "code=not_found"}
	for _, w := range want {
		if !strings.Contains(log.String(), w) {
			t.Errorf("the log lacks %q:\n%s", w, log)
		}
	}
}

// TestStreamsEndWhenTheDaemonStops has a watcher when the daemon stops: it is
// told to come back, and does not hold up the end.
func TestStreamsEndWhenTheDaemonStops(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "d.sock")
	stop := rpctest.ServeAt(t, socket, rpctest.Sample(), rpc.Options{Roles: ownRoles(t)})
	c := client.New(socket)
	defer c.Close()
	stream, err := c.Operations().WatchOperation(t.Context(), connect.NewRequest(&vmsnapv1.WatchOperationRequest{Id: "0badcafe"}))
	if err != nil || !stream.Receive() {
		t.Fatalf("watch: %v, %v", err, stream.Err())
	}
	began := time.Now()
	go stop()
	if stream.Receive() {
		t.Errorf("the stream went on with %v", stream.Msg())
	}
	wantCode(t, stream.Err(), vmsnapv1.ErrorCode_ERROR_CODE_UNREACHABLE, "vmsnapd is stopping")
	if err := stream.Close(); err != nil {
		t.Error(err)
	}
	stop()
	if took := time.Since(began); took > 4*time.Second {
		t.Errorf("the daemon took %s to stop", took)
	}
}

// TestCutOff has a call that outlasts the daemon's patience: its context ends.
func TestCutOff(t *testing.T) {
	b := rpctest.Sample()
	began, ended := make(chan struct{}), make(chan struct{})
	b.Script(rpctest.Script{VM: func(ctx context.Context, _ string) (agent.VMView, error) {
		close(began)
		<-ctx.Done()
		close(ended)
		return agent.VMView{}, ctx.Err()
	}})
	socket := filepath.Join(t.TempDir(), "d.sock")
	stop := rpctest.ServeAt(t, socket, b, rpc.Options{Roles: ownRoles(t)})
	c := client.New(socket)
	defer c.Close()
	failed := make(chan error, 1)
	go func() {
		_, err := c.VMs().GetVM(t.Context(), connect.NewRequest(&vmsnapv1.GetVMRequest{Vm: "web"}))
		failed <- err
	}()
	<-began
	stop()
	<-ended
	if err := <-failed; !client.OutcomeUnknown(err) {
		t.Errorf("got %v; want an unknown outcome", err)
	}
}

// TestPeerWithoutIdentity serves on TCP, where nobody is known.
func TestPeerWithoutIdentity(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	log := new(journal)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	handler := rpc.NewHandler(rpctest.Sample(), rpc.Options{Roles: ownRoles(t), Logger: log.logger()})
	go func() { done <- rpc.Serve(ctx, listener, handler, log.logger()) }()
	out := curl(t, nil, "-X", "POST", "-H", "Content-Type: application/json", "-d", "{}",
		"http://"+listener.Addr().String()+"/vmsnap.v1.VMService/ListVMs")
	if !strings.Contains(out, `"permission_denied"`) {
		t.Errorf("got %s", out)
	}
	for _, want := range []string{"connection without an identity", "call refused", "identified=false"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log lacks %q:\n%s", want, log)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestListenerFails tells the daemon when its socket breaks under it.
func TestListenerFails(t *testing.T) {
	listener, err := net.Listen("unix", filepath.Join(t.TempDir(), "d.sock"))
	if err != nil {
		t.Fatal(err)
	}
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	err = rpc.Serve(t.Context(), listener, rpc.NewHandler(rpctest.Sample(), rpc.Options{}), hclog.NewNullLogger())
	if !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v", err)
	}
}
