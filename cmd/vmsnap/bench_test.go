package main

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/vmsnap/vmsnap/agent/rpc/rpctest"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// manyVMs are 500 VMs with two disks.
func manyVMs() *vmsnapv1.ListVMsResponse {
	msg := &vmsnapv1.ListVMsResponse{}
	for i := range 500 {
		vm := &vmsnapv1.VM{
			Id: fmt.Sprintf("%08x", i), Name: fmt.Sprintf("web-%03d", i), Uuid: "11111111-2222-4333-8444-555555555555",
			State: vmsnapv1.VMState_VM_STATE_RUNNING, LastSeen: timestamppb.New(rpctest.Now), Snapshots: 3,
			GuestAgent: &vmsnapv1.GuestAgent{Presence: vmsnapv1.GuestAgent_PRESENCE_CONNECTED},
			Process:    &vmsnapv1.Process{Pid: int32(1000 + i), QemuVersion: "10.0.2", Unit: "qemu@web.service"},
		}
		for _, name := range []string{"root", "data"} {
			vm.Disks = append(vm.Disks, &vmsnapv1.Disk{Device: name, Layers: []*vmsnapv1.Layer{{Id: "7f3a0c11", Path: "/srv/vm/" + name + ".qcow2"}}})
		}
		msg.Vms = append(msg.Vms, vm)
	}
	return msg
}

// BenchmarkVMList prints a list of 500 VMs, which the command does once.
func BenchmarkVMList(b *testing.B) {
	msg := manyVMs()
	for _, f := range formats() {
		b.Run(f, func(b *testing.B) {
			a := &app{format: format(f), now: func() time.Time { return rpctest.Now }}
			b.ReportAllocs()
			for b.Loop() {
				var out bytes.Buffer
				if err := a.render(&out, vmsResult(msg)); err != nil || out.Len() == 0 {
					b.Fatal(err)
				}
			}
		})
	}
}

// maxCellAllocs: a line is put together once, a cell's text is not changed.
const maxCellAllocs = 2

func TestTableAllocates(t *testing.T) {
	msg := manyVMs()
	a := &app{format: formatTable, now: func() time.Time { return rpctest.Now }}
	n := testing.AllocsPerRun(10, func() {
		var out bytes.Buffer
		if err := a.render(&out, vmsResult(msg)); err != nil {
			t.Fatal(err)
		}
	})
	if cells := float64(6 * len(msg.GetVms())); n > maxCellAllocs*cells {
		t.Errorf("a cell of the table allocates %.1f times", n/cells)
	}
}
