package rpc

import (
	"context"
	"iter"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/op"
)

// Backend does what the API asks for. *agent.Agent is one. Its errors carry a
// fault.Kind, and a busy error the *op.BusyError that names the operation.
type Backend interface {
	Owners

	VMs(ctx context.Context) ([]agent.VMView, agent.Discovery)
	VM(ctx context.Context, ref string) (agent.VMView, error)
	Forget(ctx context.Context, ref string, release bool) (layers []string, err error)
	Freeze(ctx context.Context, req agent.FreezeRequest) (agent.FreezeView, error)
	Thaw(ctx context.Context, ref string) (agent.ThawResult, error)
	Diagnose(ctx context.Context, req agent.DoctorRequest) (agent.Diagnosis, error)
	Repair(ctx context.Context, req agent.DoctorRequest) (agent.Diagnosis, error)
	CheckHost(ctx context.Context) ([]agent.HostCheck, error)
	RebuildCatalog(ctx context.Context, dirs []string) (agent.Rebuilt, error)

	PlanSnapshot(ctx context.Context, req agent.SnapshotRequest) (agent.Plan, error)
	CreateSnapshot(ctx context.Context, req agent.SnapshotRequest) (op.Record, error)
	CreateGroup(ctx context.Context, req agent.GroupRequest) (op.Record, error)
	RestoreGroup(ctx context.Context, req agent.GroupRestoreRequest) (op.Record, error)
	Snapshots(ctx context.Context, filter agent.SnapshotFilter) ([]agent.SnapshotView, error)
	Snapshot(ctx context.Context, ref string) (agent.SnapshotView, error)
	RenameSnapshot(ctx context.Context, ref, newName string) (agent.SnapshotView, error)
	VerifySnapshot(ctx context.Context, ref string, uid uint32) (op.Record, error)
	PlanDelete(ctx context.Context, req agent.DeleteRequest) (agent.DeletePlan, error)
	DeleteSnapshots(ctx context.Context, req agent.DeleteRequest) (op.Record, error)
	PlanRestore(ctx context.Context, req agent.RestoreRequest) (agent.RestorePlan, error)
	RestoreSnapshot(ctx context.Context, req agent.RestoreRequest) (op.Record, error)
	PreviewSnapshot(ctx context.Context, req agent.PreviewRequest) (op.Record, error)
	Preview(ctx context.Context, vm string) (agent.PreviewView, error)
	CommitPreview(ctx context.Context, vm string, uid uint32) (op.Record, error)
	UndoPreview(ctx context.Context, vm string, uid uint32) (op.Record, error)
	ExportSnapshot(ctx context.Context, req agent.ExportRequest) (op.Record, error)
	AttachDisk(ctx context.Context, req agent.AttachRequest) (op.Record, error)
	DetachDisk(ctx context.Context, req agent.DetachRequest) (op.Record, error)
	CloneDisk(ctx context.Context, req agent.CloneDiskRequest) (op.Record, error)
	CloneVM(ctx context.Context, req agent.CloneVMRequest) (op.Record, error)
	ForgetClone(ctx context.Context, path string) error
	SetTemplate(ctx context.Context, ref string, template bool) (agent.SnapshotView, error)

	Operations(ctx context.Context, filter agent.OperationFilter) ([]op.Record, error)
	Operation(ctx context.Context, id string) (op.Record, error)
	// WatchOperation yields the operation at once, at each change, and a last
	// time when it ends. It stops with ctx.
	WatchOperation(ctx context.Context, id string) iter.Seq2[op.Record, error]
	CancelOperation(ctx context.Context, id string) (op.Record, error)
	PauseOperation(ctx context.Context, id string) (op.Record, error)
	ResumeOperation(ctx context.Context, id string) (op.Record, error)

	CreateSchedule(ctx context.Context, spec agent.ScheduleSpec, uid uint32) (agent.ScheduleView, error)
	Schedules(ctx context.Context) ([]agent.ScheduleView, error)
	Schedule(ctx context.Context, ref string) (agent.ScheduleView, error)
	PlanSchedule(ctx context.Context, ref string, spec agent.ScheduleSpec) (agent.ScheduleView, error)
	EditSchedule(ctx context.Context, ref string, spec agent.ScheduleSpec, revision uint64) (agent.ScheduleView, error)
	PauseSchedule(ctx context.Context, ref string, paused bool) (agent.ScheduleView, error)
	DeleteSchedule(ctx context.Context, ref string) error
	TakenRuns(ctx context.Context, filter agent.RunFilter) ([]agent.RunView, error)
	ComingRuns(ctx context.Context, filter agent.RunFilter) ([]agent.RunView, error)

	Events(ctx context.Context, filter agent.EventFilter) (agent.EventList, error)
	// WatchEvents yields events as they come. It stops with ctx.
	WatchEvents(ctx context.Context, filter agent.EventFilter) iter.Seq2[agent.EventNews, error]
}
