package rpc_test

import (
	"os"
	"testing"

	"connectrpc.com/connect"

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
	roles, err := rpc.ResolveRoles(uint32(os.Getuid()), nil, nil, nil)
	if err != nil {
		b.Fatal(err)
	}
	c := client.New(rpctest.Serve(b, backend, rpc.Options{Roles: roles}))
	defer c.Close()
	for b.Loop() {
		res, err := c.VMs().ListVMs(b.Context(), connect.NewRequest(&vmsnapv1.ListVMsRequest{}))
		if err != nil || len(res.Msg.GetVms()) != 500 {
			b.Fatal(err)
		}
	}
}
