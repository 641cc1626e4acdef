package rpc_test

import (
	"context"
	"testing"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/vmsnap/vmsnap/agent/event"
	"github.com/vmsnap/vmsnap/agent/rpc"
	"github.com/vmsnap/vmsnap/agent/rpc/rpctest"
	"github.com/vmsnap/vmsnap/api/client"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// BenchmarkListVMs lists 500 VMs of two disks over the socket; the budget is
// 10 ms.
func BenchmarkListVMs(b *testing.B) {
	backend := rpctest.NewBackend()
	vms, _ := rpctest.Sample().VMs(b.Context())
	for range 500 {
		backend.AddVM(vms[0])
	}
	c := client.New(rpctest.Serve(b, backend, rpc.Options{Roles: ownRoles(b)}))
	defer c.Close()
	b.ReportAllocs()
	for b.Loop() {
		res, err := c.VMs().ListVMs(b.Context(), connect.NewRequest(&vmsnapv1.ListVMsRequest{}))
		if err != nil || len(res.Msg.GetVms()) != 500 {
			b.Fatal(err)
		}
	}
}

// watched is a stream of events over the socket.
func watched(b *testing.B, events int) func() {
	backend := rpctest.NewBackend()
	for range events {
		backend.AddEvent(event.Event{
			Time: rpctest.Now, Kind: event.VMStarted, Severity: event.Info, VMID: "5f0c1a2b", VMName: "web", Message: "QEMU process 4711 started",
		})
	}
	c := client.New(rpctest.Serve(b, backend, rpc.Options{Roles: ownRoles(b)}))
	b.Cleanup(c.Close)
	return func() {
		ctx, cancel := context.WithCancel(b.Context())
		defer cancel()
		stream, err := c.Events().WatchEvents(ctx, connect.NewRequest(&vmsnapv1.WatchEventsRequest{Since: proto.Uint64(0)}))
		if err != nil {
			b.Fatal(err)
		}
		for range events {
			if !stream.Receive() {
				b.Fatal(stream.Err())
			}
		}
		cancel()
		_ = stream.Close() // it was cancelled
	}
}

// BenchmarkWatchEvents reads a thousand events; the figures are of both ends.
func BenchmarkWatchEvents(b *testing.B) {
	watch := watched(b, 1000)
	b.ReportAllocs()
	for b.Loop() {
		watch()
	}
}
