package client_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"connectrpc.com/connect"
	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/agent/rpc"
	"github.com/vmsnap/vmsnap/agent/rpc/rpctest"
	"github.com/vmsnap/vmsnap/api/client"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// A controller takes a snapshot that must be consistent. The request id makes
// it safe to repeat the request when its answer was lost: the same operation is
// returned. When the guest cannot be frozen, the controller decides for itself
// what that means.
func Example() {
	ctx := context.Background()
	socket, stop := exampleDaemon()
	defer stop()

	c := client.New(socket)
	defer c.Close()

	created, err := c.Snapshots().CreateSnapshot(ctx, connect.NewRequest(&vmsnapv1.CreateSnapshotRequest{
		Vm: "web", Name: "before-upgrade", Quiesce: vmsnapv1.Quiesce_QUIESCE_REQUIRE, RequestId: "upgrade-17",
	}))
	if err != nil {
		fmt.Println("not begun:", err)
		return
	}
	operation, err := c.Follow(ctx, created.Msg.GetOperation().GetId(), func(o *vmsnapv1.Operation) {
		fmt.Println(o.GetState())
	})
	var failed *client.OperationError
	switch e, _ := client.ErrorOf(err); {
	case err == nil:
		fmt.Println("taken:", operation.GetSnapshotId())
	case e.GetCode() == vmsnapv1.ErrorCode_ERROR_CODE_NOT_QUIESCED:
		fmt.Printf("not quiesced: %s (%s)\n", e.GetMessage(), e.GetHint())
	case errors.As(err, &failed):
		fmt.Println("failed:", err)
	default:
		fmt.Println("lost sight of it:", err)
	}

	// Output:
	// OPERATION_STATE_RUNNING
	// OPERATION_STATE_FAILED
	// not quiesced: cut web: the guest agent did not answer (is qemu-guest-agent running in the guest?)
}

// exampleDaemon serves a host with a guest that cannot be frozen.
func exampleDaemon() (socket string, stop func()) {
	b := rpctest.NewBackend()
	b.Script(rpctest.Script{Create: func(_ context.Context, req agent.SnapshotRequest) (op.Record, error) {
		return b.PutOperation(op.Record{ID: "c0ffee01", Kind: op.KindSnapshot, VMName: req.VM, State: op.Running}), nil
	}})
	dir, err := os.MkdirTemp("", "vmsnap-example")
	if err != nil {
		panic(err)
	}
	listener, err := net.Listen("unix", filepath.Join(dir, "d.sock"))
	if err != nil {
		panic(err)
	}
	roles, err := rpc.ResolveRoles(uint32(os.Getuid()), nil, nil, nil)
	if err != nil {
		panic(err)
	}
	log := hclog.NewNullLogger()
	// The operation fails once somebody watches it.
	watched := &onWatch{Backend: b, then: func() {
		b.PutOperation(op.Record{
			ID: "c0ffee01", Kind: op.KindSnapshot, VMName: "web", State: op.Failed,
			Failure: &op.Failure{
				Kind: fault.NotQuiesced, Message: "cut web: the guest agent did not answer",
				Hint: "is qemu-guest-agent running in the guest?",
			},
		})
	}}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = rpc.Serve(ctx, listener, rpc.NewHandler(watched, rpc.Options{Roles: roles}), log)
	}()
	return listener.Addr().String(), func() {
		cancel()
		<-done
		_ = os.RemoveAll(dir)
	}
}
