package rpctest

import (
	"time"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
)

// Now is the time at which the samples are looked at.
var Now = time.Date(2026, 3, 14, 9, 26, 53, 0, time.UTC)

// Sample returns a backend of a small host: VMs in each state, snapshots of
// each consistency, and operations in several states.
func Sample() *Backend {
	b := NewBackend()
	for _, v := range sampleVMs() {
		b.AddVM(v)
	}
	for _, s := range sampleSnapshots() {
		b.AddSnapshot(s)
	}
	for _, r := range sampleOperations() {
		b.PutOperation(r)
	}
	sampleEvents(b)
	for _, s := range sampleSchedules() {
		b.AddSchedule(s)
	}
	return b
}

const (
	kib = 1 << 10
	mib = 1 << 20
	gib = 1 << 30
)

func sampleVMs() []agent.VMView {
	return []agent.VMView{
		{
			ID: "5f0c1a2b", Name: "web", UUID: "0b7c1f6e-3d55-4c8a-9a61-1f1d3f0e8a01",
			State: agent.Running, RunState: "running",
			Process: &agent.ProcessView{
				PID: 4242, Started: Now.Add(-72 * time.Hour), QEMUVersion: "10.0.2",
				Binary: "/usr/bin/qemu-system-x86_64", Unit: "vm-web.service", Slice: "machine.slice",
				CgroupMode: "v2", QMPSocket: "/run/vm/web.qmp",
			},
			GuestAgent: agent.GuestAgentView{Presence: agent.Connected, Socket: "/run/vm/web.qga"},
			Disks: []agent.DiskView{
				{
					Device: "root", Node: "drive-root", Bus: "virtio", LaunchPath: "/srv/vm/web/root.qcow2",
					LaunchFormat: "qcow2", VirtualSize: 20 * gib, IOThread: "io1",
					Layers: []agent.LayerView{
						{ID: "11aa22bb", Path: "/srv/vm/web/root.7f3a.qcow2", Format: "qcow2", VirtualSize: 20 * gib, Allocated: 196 * kib},
						{ID: "11aa22ba", Path: "/srv/vm/web/root.1c22.qcow2", Format: "qcow2", VirtualSize: 20 * gib, Allocated: 6 * gib, Immutable: true},
						{ID: "11aa22b9", Path: "/srv/images/debian-12.qcow2", Format: "qcow2", VirtualSize: 10 * gib, Allocated: 2 * gib, Foreign: true},
					},
				},
				{
					Device: "data", Node: "drive-data", Bus: "scsi", LaunchPath: "/srv/vm/web/data.raw",
					VirtualSize: 500 * gib, Throttled: true, SettleNeeded: true,
					NotCuttable: "its file is on a file system that is mounted read-only",
					Layers: []agent.LayerView{
						{ID: "33cc44dd", Path: "/srv/vm/web/data.raw", Format: "raw", VirtualSize: 500 * gib, Allocated: 40 * gib},
					},
				},
			},
			Freeze: &agent.FreezeView{
				Since: Now.Add(-4 * time.Second), Deadline: Now.Add(26 * time.Second), Frozen: 2, Total: 3, Operation: "0badcafe",
			},
			Operation: "0badcafe",
			FirstSeen: Now.Add(-240 * time.Hour), LastSeen: Now, Snapshots: 3,
			Space: &agent.VMSpace{Layers: 45 * gib, Foreign: 2 * gib, Memory: 3 * gib, Reclaimable: 5 * gib, Measured: Now.Add(-2 * time.Minute)},
		},
		{
			ID: "6a6b6c6d", Name: "datenbank-東京", State: agent.Stopped,
			GuestAgent: agent.GuestAgentView{Presence: agent.NoChannel},
			Disks: []agent.DiskView{{
				Device: "virtio0", Bus: "virtio", LaunchPath: "/srv/vm/db/disk.qcow2", LaunchFormat: "qcow2", VirtualSize: 100 * gib,
				Layers: []agent.LayerView{
					{ID: "55ee66ff", Path: "/srv/vm/db/disk.qcow2", Format: "qcow2", VirtualSize: 100 * gib, Allocated: 61 * gib},
				},
			}},
			FirstSeen: Now.Add(-240 * time.Hour), LastSeen: Now.Add(-26 * time.Hour), Snapshots: 1,
		},
		{
			ID: "7e7f8081", Name: "legacy", State: agent.Unknown,
			Process: &agent.ProcessView{
				PID: 5150, Started: Now.Add(-90 * time.Minute), Binary: "/usr/bin/qemu-system-x86_64", CgroupMode: "v2",
			},
			GuestAgent: agent.GuestAgentView{Presence: agent.Disconnected, Socket: "/run/vm/legacy.qga"},
			Problems: []agent.Problem{{
				Code: "monitor-busy", Message: "another client holds the QMP socket /run/vm/legacy.qmp",
				Hint: "give QEMU a second -qmp socket, or end the other client",
			}},
			FirstSeen: Now.Add(-90 * time.Minute), LastSeen: Now,
		},
	}
}

func sampleSnapshots() []agent.SnapshotView {
	web := func(id, name string, created time.Duration, c catalog.Consistency) catalog.Snapshot {
		return catalog.Snapshot{
			ID: id, VMID: "5f0c1a2b", VMName: "web", Name: name, Created: Now.Add(-created), Consistency: c,
			Operation: "c0ffee01",
			Disks: []catalog.SnapshotDisk{
				{Device: "root", LayerID: "11aa22ba", Size: 20 * gib},
				{Device: "data", Size: 500 * gib, Excluded: true},
			},
		}
	}
	layers := map[string]agent.LayerView{
		"11aa22ba": {ID: "11aa22ba", Path: "/srv/vm/web/root.1c22.qcow2", Format: "qcow2", VirtualSize: 20 * gib, Allocated: 6 * gib, Immutable: true},
		"55ee66ff": {ID: "55ee66ff", Path: "/srv/vm/db/disk.qcow2", Format: "qcow2", VirtualSize: 100 * gib, Allocated: 61 * gib},
	}
	upgrade := web("a1b2c3d4", "before-upgrade", 3*time.Hour, catalog.Filesystem)
	upgrade.Description = "before the move to Debian 13"
	upgrade.Labels = map[string]string{"team": "infra", "keep": "yes"}
	upgrade.Quiesce = catalog.Quiesce{Requested: "require", Frozen: 2, Total: 2, Window: 84 * time.Millisecond}
	upgrade.Warnings = []op.Warning{{Code: "disk-excluded", Disk: "data", Message: "the disk is left out, as asked for"}}
	nightly := web("a1b2c3d5", "nightly", 31*time.Hour, catalog.Crash)
	nightly.Labels = map[string]string{"team": "infra"}
	nightly.Quiesce = catalog.Quiesce{Requested: "prefer", Reason: "the guest agent did not answer within 15s"}
	nightly.Partial = true
	first := web("a1b2c3d6", "alpha", 40*24*time.Hour, catalog.Offline)
	first.Quiesce = catalog.Quiesce{Requested: "none"}
	live := web("a1b2c3d8", "live", 5*24*time.Hour, catalog.Memory)
	live.Quiesce = catalog.Quiesce{Requested: "none"}
	live.Memory = &catalog.SavedMemory{
		Path: "/srv/vm/web/.vmsnap/9e107d9d.mem", Strategy: "background", Reason: "QEMU 10.0 can track writes",
		Size: 3 * gib, StreamSize: 7 * gib, Compressed: true, Recipient: "age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p", Checksum: "d41d8cd98f00b204e9800998ecf8427e", RAM: 8 * gib,
		Pause: 23 * time.Millisecond, Duration: 12400 * time.Millisecond,
	}
	db := catalog.Snapshot{
		ID: "a1b2c3d7", VMID: "6a6b6c6d", VMName: "datenbank-東京", Name: "stand", Created: Now.Add(-50 * time.Hour),
		Consistency: catalog.Crash, Quiesce: catalog.Quiesce{Requested: "prefer", Reason: "the VM is stopped"},
		Disks: []catalog.SnapshotDisk{{Device: "virtio0", LayerID: "55ee66ff", Size: 100 * gib}},
	}
	spaces := map[string]*agent.SnapshotSpace{
		upgrade.Name: {Exclusive: 340 * mib, Shared: 8 * gib, Measured: Now},
		live.Name:    {Exclusive: 3*gib + 12*mib, Shared: 7 * gib, Memory: 3 * gib, Measured: Now},
	}
	positions := map[string]agent.Position{
		live.Name:    {Parent: first.ID},
		nightly.Name: {Parent: first.ID, Strays: []agent.Stray{{Device: "root", Snapshot: live.ID}}},
		upgrade.Name: {Parent: live.ID},
	}
	var out []agent.SnapshotView
	for _, s := range []catalog.Snapshot{first, live, db, nightly, upgrade} {
		out = append(out, agent.SnapshotView{Snapshot: s, Layers: layers, Space: spaces[s.Name], Position: positions[s.Name]})
		if s.Name == nightly.Name {
			out[len(out)-1].Here = &agent.Position{Parent: s.ID}
		}
	}
	return out
}

// Steps returns steps that follow each other from a time on, each done within
// 120 ms but the last when it is still running.
func Steps(from time.Time, lastRuns bool, names ...string) []op.Step {
	var steps []op.Step
	for i, name := range names {
		s := op.Step{Name: name, Started: from.Add(time.Duration(i) * 120 * time.Millisecond)}
		if i < len(names)-1 || !lastRuns {
			s.Ended = s.Started.Add(120 * time.Millisecond)
		}
		steps = append(steps, s)
	}
	return steps
}

func sampleOperations() []op.Record {
	began := Now.Add(-3 * time.Hour)
	return []op.Record{
		{
			ID: "c0ffee01", Kind: op.KindSnapshot, VMID: "5f0c1a2b", VMName: "web", State: op.Succeeded, UID: 1000,
			RequestID: "deploy-17", Snapshot: "a1b2c3d4",
			Steps:    Steps(began, false, "preflight", "overlays", "freeze", "cut", "thaw", "settle"),
			Progress: op.Progress{Done: 6, Total: 6, Unit: "steps"},
			Warnings: []op.Warning{{Code: "disk-excluded", Disk: "data", Message: "the disk is left out, as asked for"}},
			Created:  began, Started: began, Ended: began.Add(720 * time.Millisecond),
		},
		{
			ID: "c0ffee02", Kind: op.KindSnapshot, VMID: "7e7f8081", VMName: "legacy", State: op.Failed,
			Steps: []op.Step{{Name: "preflight", Started: began, Ended: began.Add(time.Second), Error: "the monitor is busy"}},
			Failure: &op.Failure{
				Kind: fault.Busy, Message: "cut legacy: another client holds the QMP socket /run/vm/legacy.qmp",
				Hint: "give QEMU a second -qmp socket, or end the other client",
			},
			Progress: op.Progress{Done: 0, Total: 6, Unit: "steps"},
			Created:  began, Started: began, Ended: began.Add(time.Second),
		},
		{
			ID: "0badcafe", Kind: op.KindFreeze, VMID: "5f0c1a2b", VMName: "web", State: op.Running,
			Steps:    Steps(Now.Add(-4*time.Second), true, "freeze", "hold"),
			Progress: op.Progress{Done: 1, Total: 3, Unit: "steps"},
			Created:  Now.Add(-4 * time.Second), Started: Now.Add(-4 * time.Second),
		},
	}
}

// SamplePlan is the plan of a snapshot with nothing in its way.
func SamplePlan(req agent.SnapshotRequest) agent.Plan {
	name := req.Name
	if name == "" {
		name = "2026-03-14-092653"
	}
	var memory *agent.PlanMemory
	if req.Memory {
		memory = &agent.PlanMemory{
			Strategy: agent.MemoryBackground, Reason: "QEMU 10.0 can track writes", Directory: "/srv/vm/web/.vmsnap", Free: 120 * gib,
			Reserve: 9 * gib, RAM: 8 * gib, Bytes: 7 * gib, Duration: 12 * time.Second, Pause: 30 * time.Millisecond, DirtyRate: 100 << 20,
		}
	}
	return agent.Plan{
		Memory: memory,
		VM:     req.VM, Name: name, Live: true, Consistency: catalog.Filesystem, Window: 84 * time.Millisecond,
		Disks: []agent.PlanDisk{
			{Device: "root", Directory: "/srv/vm/web", Free: 120 * gib, VirtualSize: 20 * gib, Settle: agent.SettleLive},
			{Device: "data", Excluded: true, VirtualSize: 500 * gib},
		},
		Warnings: []op.Warning{{Code: "disk-excluded", Disk: "data", Message: "the disk is left out, as asked for"}},
	}
}
