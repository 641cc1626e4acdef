package rpc

import (
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// text makes any string fit for Protobuf, which refuses to encode a whole
// message for one byte that is not UTF-8.
func text(s string) string {
	if utf8.ValidString(s) { // which is much faster to see than to make
		return s
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

// each converts a list.
func each[From, To any](list []From, convert func(From) To) []To {
	out := make([]To, len(list))
	for i, item := range list {
		out[i] = convert(item)
	}
	return out
}

// stamp returns nil for the zero time.
func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// span returns nil for zero, which everywhere means unknown or none.
func span(d time.Duration) *durationpb.Duration {
	if d == 0 {
		return nil
	}
	return durationpb.New(d)
}

var consistencies = map[catalog.Consistency]vmsnapv1.Consistency{
	catalog.Crash:      vmsnapv1.Consistency_CONSISTENCY_CRASH,
	catalog.Filesystem: vmsnapv1.Consistency_CONSISTENCY_FILESYSTEM,
	catalog.Memory:     vmsnapv1.Consistency_CONSISTENCY_MEMORY,
	catalog.Offline:    vmsnapv1.Consistency_CONSISTENCY_OFFLINE,
}

var requested = map[string]vmsnapv1.Quiesce{
	string(agent.QuiesceRequire): vmsnapv1.Quiesce_QUIESCE_REQUIRE,
	string(agent.QuiescePrefer):  vmsnapv1.Quiesce_QUIESCE_PREFER,
	string(agent.QuiesceNone):    vmsnapv1.Quiesce_QUIESCE_NONE,
}

var strategies = map[agent.MemoryStrategy]vmsnapv1.MemoryStrategy{
	agent.MemoryBackground: vmsnapv1.MemoryStrategy_MEMORY_STRATEGY_BACKGROUND,
	agent.MemoryPrecopy:    vmsnapv1.MemoryStrategy_MEMORY_STRATEGY_PRECOPY,
	agent.MemoryStopped:    vmsnapv1.MemoryStrategy_MEMORY_STRATEGY_STOPPED,
}

var operationStates = map[op.State]vmsnapv1.OperationState{
	op.Queued:     vmsnapv1.OperationState_OPERATION_STATE_QUEUED,
	op.Running:    vmsnapv1.OperationState_OPERATION_STATE_RUNNING,
	op.Cancelling: vmsnapv1.OperationState_OPERATION_STATE_CANCELLING,
	op.Reverting:  vmsnapv1.OperationState_OPERATION_STATE_REVERTING,
	op.Succeeded:  vmsnapv1.OperationState_OPERATION_STATE_SUCCEEDED,
	op.Failed:     vmsnapv1.OperationState_OPERATION_STATE_FAILED,
	op.Cancelled:  vmsnapv1.OperationState_OPERATION_STATE_CANCELLED,
}

func warningProto(w op.Warning) *vmsnapv1.Warning {
	return &vmsnapv1.Warning{Code: text(w.Code), Disk: text(w.Disk), Message: text(w.Message)}
}

func operationProto(r op.Record) *vmsnapv1.Operation {
	return &vmsnapv1.Operation{
		Id:         text(r.ID),
		Kind:       text(string(r.Kind)),
		VmId:       text(r.VMID),
		VmName:     text(r.VMName),
		State:      operationStates[r.State],
		Progress:   progressProto(r.Progress),
		Steps:      each(r.Steps, stepProto),
		Warnings:   each(r.Warnings, warningProto),
		Error:      failureProto(r),
		Partial:    r.Partial,
		SnapshotId: text(r.Snapshot),
		RequestId:  text(r.RequestID),
		Uid:        r.UID,
		Created:    stamp(r.Created),
		Started:    stamp(r.Started),
		Ended:      stamp(r.Ended),
		Revision:   r.Revision,

		QueuePosition: uint32(max(r.Queue.Position, 0)),
		QueueReason:   text(r.Queue.Reason),
		Paused:        r.Paused,
	}
}

func progressProto(p op.Progress) *vmsnapv1.Progress {
	return &vmsnapv1.Progress{Done: p.Done, Total: p.Total, Unit: text(p.Unit), Rate: p.Rate, Eta: span(p.ETA), Pass: uint32(max(p.Pass, 0))}
}

func stepProto(s op.Step) *vmsnapv1.Step {
	return &vmsnapv1.Step{Name: text(s.Name), Started: stamp(s.Started), Ended: stamp(s.Ended), Error: text(s.Error), Output: text(s.Output)}
}

func failureProto(r op.Record) *vmsnapv1.Error {
	if r.Failure == nil {
		return nil
	}
	return &vmsnapv1.Error{
		Code:        formOf(r.Failure.Kind).code,
		Message:     text(r.Failure.Message),
		Hint:        text(r.Failure.Hint),
		OperationId: text(r.ID),
	}
}

func planProto(p agent.Plan) *vmsnapv1.Plan {
	return &vmsnapv1.Plan{
		VmName:       text(p.VM),
		Name:         text(p.Name),
		Disks:        each(p.Disks, planDiskProto),
		Warnings:     each(p.Warnings, warningProto),
		Blockers:     each(p.Blockers, func(e *fault.Error) *vmsnapv1.Error { return detailOf(e) }),
		Consistency:  consistencies[p.Consistency],
		FreezeWindow: span(p.Window),
		Live:         p.Live,
		Memory:       planMemoryProto(p.Memory),
	}
}

func planMemoryProto(m *agent.PlanMemory) *vmsnapv1.PlanMemory {
	if m == nil {
		return nil
	}
	return &vmsnapv1.PlanMemory{
		Strategy:  strategies[m.Strategy],
		Reason:    text(m.Reason),
		Directory: text(m.Directory),
		Free:      m.Free,
		Reserve:   m.Reserve,
		Recipient: text(m.Recipient),
		Ram:       m.RAM,
		Bytes:     m.Bytes,
		Duration:  span(m.Duration),
		Pause:     span(m.Pause),
		DirtyRate: m.DirtyRate,
	}
}

func memoryProto(m *catalog.SavedMemory) *vmsnapv1.SnapshotMemory {
	if m == nil {
		return nil
	}
	return &vmsnapv1.SnapshotMemory{
		Path:       text(m.Path),
		Strategy:   strategies[agent.MemoryStrategy(m.Strategy)],
		Reason:     text(m.Reason),
		Size:       m.Size,
		StreamSize: m.StreamSize,
		Compressed: m.Compressed,
		Recipient:  text(m.Recipient),
		Checksum:   text(m.Checksum),
		Ram:        m.RAM,
		Pause:      span(m.Pause),
		Duration:   span(m.Duration),
	}
}

func planDiskProto(d agent.PlanDisk) *vmsnapv1.PlanDisk {
	return &vmsnapv1.PlanDisk{
		Device:      text(d.Device),
		Excluded:    d.Excluded,
		Directory:   text(d.Directory),
		Free:        d.Free,
		VirtualSize: d.VirtualSize,
		Settle:      text(string(d.Settle)),
	}
}

func snapshotProto(s agent.SnapshotView) *vmsnapv1.Snapshot {
	out := &vmsnapv1.Snapshot{
		Id:          text(s.ID),
		VmId:        text(s.VMID),
		VmName:      text(s.VMName),
		Name:        text(s.Name),
		Description: text(s.Description),
		Created:     stamp(s.Created),
		Consistency: consistencies[s.Consistency],
		Quiesce: &vmsnapv1.QuiesceResult{
			Requested:    requested[s.Quiesce.Requested],
			Reason:       text(s.Quiesce.Reason),
			Frozen:       int32(s.Quiesce.Frozen),
			Total:        int32(s.Quiesce.Total),
			FreezeWindow: span(s.Quiesce.Window),
		},
		Warnings:    each(s.Warnings, warningProto),
		OperationId: text(s.Operation),
		Partial:     s.Partial,
		Memory:      memoryProto(s.Memory),
		Group:       groupProto(s.Group),
		Automatic:   s.Automatic,
		State:       pointStates[s.State],
		Template:    s.Template,
		Expires:     stamp(s.Expires),
		Clones:      each(s.Clones, cloneProto),
		Space:       snapshotSpaceProto(s.Space),
		Position:    positionProto(s.Position),
		Here:        hereProto(s.Here, s.Previewed),
	}
	if len(s.Labels) > 0 {
		out.Labels = make(map[string]string, len(s.Labels))
		for key, value := range s.Labels {
			out.Labels[text(key)] = text(value)
		}
	}
	for _, d := range s.Disks {
		layer := s.Layers[d.LayerID]
		out.Disks = append(out.Disks, &vmsnapv1.SnapshotDisk{
			Device:      text(d.Device),
			LayerId:     text(d.LayerID),
			Path:        text(layer.Path),
			Format:      text(layer.Format),
			VirtualSize: d.Size,
			Excluded:    d.Excluded,
			Allocated:   layer.Allocated,
		})
	}
	return out
}

func snapshotSpaceProto(s *agent.SnapshotSpace) *vmsnapv1.SnapshotSpace {
	if s == nil {
		return nil
	}
	return &vmsnapv1.SnapshotSpace{Exclusive: s.Exclusive, Shared: s.Shared, Memory: s.Memory, Measured: stamp(s.Measured)}
}

func positionProto(p agent.Position) *vmsnapv1.Position {
	return &vmsnapv1.Position{ParentId: text(p.Parent), Strays: each(p.Strays, strayProto)}
}

func hereProto(p *agent.Position, preview bool) *vmsnapv1.Here {
	if p == nil {
		return nil
	}
	return &vmsnapv1.Here{Strays: each(p.Strays, strayProto), Preview: preview}
}

func strayProto(s agent.Stray) *vmsnapv1.Stray {
	return &vmsnapv1.Stray{Device: text(s.Device), SnapshotId: text(s.Snapshot)}
}
