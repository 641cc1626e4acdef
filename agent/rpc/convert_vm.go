package rpc

import (
	"github.com/vmsnap/vmsnap/agent"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

var vmStates = map[agent.State]vmsnapv1.VMState{
	agent.Running: vmsnapv1.VMState_VM_STATE_RUNNING,
	agent.Paused:  vmsnapv1.VMState_VM_STATE_PAUSED,
	agent.Stopped: vmsnapv1.VMState_VM_STATE_STOPPED,
	agent.Unknown: vmsnapv1.VMState_VM_STATE_UNKNOWN,
}

var presences = map[agent.Presence]vmsnapv1.GuestAgent_Presence{
	agent.NoChannel:    vmsnapv1.GuestAgent_PRESENCE_NONE,
	agent.Disconnected: vmsnapv1.GuestAgent_PRESENCE_DISCONNECTED,
	agent.Connected:    vmsnapv1.GuestAgent_PRESENCE_CONNECTED,
}

func vmProto(v agent.VMView) *vmsnapv1.VM {
	return &vmsnapv1.VM{
		Id:       text(v.ID),
		Name:     text(v.Name),
		Uuid:     text(v.UUID),
		State:    vmStates[v.State],
		RunState: text(v.RunState),
		Process:  processProto(v.Process),
		GuestAgent: &vmsnapv1.GuestAgent{
			Presence: presences[v.GuestAgent.Presence],
			Socket:   text(v.GuestAgent.Socket),
		},
		Disks: each(v.Disks, diskProto),
		Problems: each(v.Problems, func(p agent.Problem) *vmsnapv1.Problem {
			return &vmsnapv1.Problem{Code: text(p.Code), Message: text(p.Message), Hint: text(p.Hint)}
		}),
		OperationId: text(v.Operation),
		Freeze:      freezeProto(v.Freeze),
		FirstSeen:   stamp(v.FirstSeen),
		LastSeen:    stamp(v.LastSeen),
		Snapshots:   uint32(v.Snapshots),
		Space:       vmSpaceProto(v.Space),
	}
}

func vmSpaceProto(s *agent.VMSpace) *vmsnapv1.VMSpace {
	if s == nil {
		return nil
	}
	return &vmsnapv1.VMSpace{
		Layers: s.Layers, Foreign: s.Foreign, Memory: s.Memory, Reclaimable: s.Reclaimable, Incomplete: s.Incomplete,
		Measured: stamp(s.Measured),
	}
}

func processProto(p *agent.ProcessView) *vmsnapv1.Process {
	if p == nil {
		return nil
	}
	return &vmsnapv1.Process{
		Pid:         int32(p.PID),
		Started:     stamp(p.Started),
		QemuVersion: text(p.QEMUVersion),
		Binary:      text(p.Binary),
		Unit:        text(p.Unit),
		Slice:       text(p.Slice),
		CgroupMode:  text(p.CgroupMode),
		QmpSocket:   text(p.QMPSocket),
	}
}

func freezeProto(f *agent.FreezeView) *vmsnapv1.Freeze {
	if f == nil {
		return nil
	}
	return &vmsnapv1.Freeze{
		Since:       stamp(f.Since),
		Deadline:    stamp(f.Deadline),
		Frozen:      int32(f.Frozen),
		Total:       int32(f.Total),
		OperationId: text(f.Operation),
		Unresolved:  f.Unresolved,
	}
}

func diskProto(d agent.DiskView) *vmsnapv1.Disk {
	return &vmsnapv1.Disk{
		Device:       text(d.Device),
		Node:         text(d.Node),
		Bus:          text(d.Bus),
		LaunchPath:   text(d.LaunchPath),
		LaunchFormat: text(d.LaunchFormat),
		VirtualSize:  d.VirtualSize,
		Layers:       each(d.Layers, layerProto),
		Throttled:    d.Throttled,
		Iothread:     text(d.IOThread),
		NotCuttable:  text(d.NotCuttable),
		SettleNeeded: d.SettleNeeded,
	}
}

func layerProto(l agent.LayerView) *vmsnapv1.Layer {
	return &vmsnapv1.Layer{
		Id:          text(l.ID),
		Path:        text(l.Path),
		Format:      text(l.Format),
		VirtualSize: l.VirtualSize,
		Allocated:   l.Allocated,
		Foreign:     l.Foreign,
		Immutable:   l.Immutable,
		Vm:          text(l.VM),
	}
}

var hostStates = map[agent.HostState]vmsnapv1.HostState{
	agent.HostWorks: vmsnapv1.HostState_HOST_STATE_WORKS, agent.HostLimited: vmsnapv1.HostState_HOST_STATE_LIMITED,
	agent.HostBroken: vmsnapv1.HostState_HOST_STATE_BROKEN,
}

func checkProto(c agent.HostCheck) *vmsnapv1.HostCheck {
	return &vmsnapv1.HostCheck{Code: text(c.Code), State: hostStates[c.State], Message: text(c.Message), Hint: text(c.Hint)}
}

func findingProto(f agent.Finding) *vmsnapv1.Finding {
	return &vmsnapv1.Finding{
		Code: text(f.Code), Message: text(f.Message), Hint: text(f.Hint), Repairable: f.Repairable, Repaired: f.Repaired,
		Repair: text(f.Repair),
	}
}
