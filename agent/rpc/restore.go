package rpc

import (
	"context"

	"connectrpc.com/connect"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/launch"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

func (s snapshotService) RestoreSnapshot(ctx context.Context, req *connect.Request[vmsnapv1.RestoreSnapshotRequest]) (*connect.Response[vmsnapv1.RestoreSnapshotResponse], error) {
	request, err := restoreRequest(ctx, req.Msg)
	if err != nil {
		return nil, err
	}
	record, err := s.backend.RestoreSnapshot(ctx, request)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.RestoreSnapshotResponse{Operation: operationProto(record)}), nil
}

func (s snapshotService) PlanRestore(ctx context.Context, req *connect.Request[vmsnapv1.RestoreSnapshotRequest]) (*connect.Response[vmsnapv1.PlanRestoreResponse], error) {
	request, err := restoreRequest(ctx, req.Msg)
	if err != nil {
		return nil, err
	}
	plan, err := s.backend.PlanRestore(ctx, request)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.PlanRestoreResponse{Plan: restorePlanProto(plan)}), nil
}

// restoreRequest checks a request and says who made it.
func restoreRequest(ctx context.Context, msg *vmsnapv1.RestoreSnapshotRequest) (agent.RestoreRequest, error) {
	if err := checkRestore(msg); err != nil {
		return agent.RestoreRequest{}, err
	}
	caller, err := uid(ctx)
	if err != nil {
		return agent.RestoreRequest{}, err
	}
	return agent.RestoreRequest{
		Snapshot: msg.GetSnapshot(),
		Disks: each(msg.GetDisks(), func(c *vmsnapv1.DiskChoice) agent.DiskChoice {
			return agent.DiskChoice{Device: c.GetDevice(), Snapshot: c.GetSnapshot()}
		}),
		Exclude:   msg.GetExclude(),
		NoSafety:  msg.GetNoSafetySnapshot(),
		Memory:    msg.GetMemory(),
		Launcher:  launcherOf(msg.GetLauncher()),
		RequestID: msg.GetRequestId(),
		UID:       caller,
	}, nil
}

func checkRestore(msg *vmsnapv1.RestoreSnapshotRequest) error {
	if len(msg.GetDisks()) > maxDisks {
		return usage("disks has %d entries; at most %d are allowed", len(msg.GetDisks()), maxDisks)
	}
	for _, c := range msg.GetDisks() {
		if err := first(checkRef("an entry of disks: device", c.GetDevice()), checkLength("an entry of disks: snapshot", c.GetSnapshot(), maxName)); err != nil {
			return err
		}
	}
	if l := msg.GetLauncher(); l != 0 {
		if launcherOf(l) == launch.Automatic {
			return usage("launcher %d is unknown", l)
		}
		if !msg.GetMemory() {
			return usage("a launcher is for restoring memory")
		}
	}
	return first(
		checkRef("snapshot", msg.GetSnapshot()),
		checkList("exclude", msg.GetExclude(), maxDisks, maxRef),
		checkLength("request_id", msg.GetRequestId(), maxRequestID),
	)
}

func restorePlanProto(p agent.RestorePlan) *vmsnapv1.RestorePlan {
	return &vmsnapv1.RestorePlan{
		VmName:   text(p.VM),
		Snapshot: text(p.Snapshot),
		Live:     p.Live,
		Disks: each(p.Disks, func(d agent.RestorePlanDisk) *vmsnapv1.RestorePlanDisk {
			return &vmsnapv1.RestorePlanDisk{Device: text(d.Device), Snapshot: text(d.Snapshot), Layer: text(d.Layer), VirtualSize: d.Size}
		}),
		Memory:   restorePlanMemoryProto(p.Memory),
		Warnings: each(p.Warnings, warningProto),
		Blockers: each(p.Blockers, func(e *fault.Error) *vmsnapv1.Error { return detailOf(e) }),
	}
}

func restorePlanMemoryProto(m *agent.RestorePlanMemory) *vmsnapv1.RestorePlanMemory {
	if m == nil {
		return nil
	}
	return &vmsnapv1.RestorePlanMemory{
		Path: text(m.Path), Size: m.Size, Launcher: launchers[m.Launcher], Runs: m.Runs, SavedIn: text(m.Saved), Reserve: m.Reserve,
	}
}

var launchers = map[launch.Kind]vmsnapv1.Launcher{
	launch.Unit:     vmsnapv1.Launcher_LAUNCHER_UNIT,
	launch.Systemd:  vmsnapv1.Launcher_LAUNCHER_SYSTEMD,
	launch.Exec:     vmsnapv1.Launcher_LAUNCHER_EXEC,
	launch.External: vmsnapv1.Launcher_LAUNCHER_EXTERNAL,
}

// launcherOf returns the agent's name of a launcher, Automatic for one that it
// does not know.
func launcherOf(l vmsnapv1.Launcher) launch.Kind {
	for kind, proto := range launchers {
		if proto == l {
			return kind
		}
	}
	return launch.Automatic
}
