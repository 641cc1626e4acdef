package rpc

import (
	"context"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/schedule"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// wordTable tells the words of an enumeration.
type wordTable[Enum comparable, Word comparable] map[Enum]Word

func (t wordTable[Enum, Word]) of(word Word) (e Enum) {
	for enum, w := range t {
		if w == word {
			return enum
		}
	}
	return e
}

var scheduleKinds = wordTable[vmsnapv1.ScheduleKind, schedule.Kind]{
	vmsnapv1.ScheduleKind_SCHEDULE_KIND_ONCE:    schedule.Once,
	vmsnapv1.ScheduleKind_SCHEDULE_KIND_HOURLY:  schedule.Hourly,
	vmsnapv1.ScheduleKind_SCHEDULE_KIND_DAILY:   schedule.Daily,
	vmsnapv1.ScheduleKind_SCHEDULE_KIND_WEEKLY:  schedule.Weekly,
	vmsnapv1.ScheduleKind_SCHEDULE_KIND_MONTHLY: schedule.Monthly,
	vmsnapv1.ScheduleKind_SCHEDULE_KIND_CRON:    schedule.Cron,
}

var missed = wordTable[vmsnapv1.Missed, schedule.Missed]{
	vmsnapv1.Missed_MISSED_UNSPECIFIED: "",
	vmsnapv1.Missed_MISSED_CATCH_UP:    schedule.CatchUp,
	vmsnapv1.Missed_MISSED_SKIP:        schedule.Skip,
}

var overlaps = wordTable[vmsnapv1.Overlap, catalog.Overlap]{
	vmsnapv1.Overlap_OVERLAP_UNSPECIFIED: "",
	vmsnapv1.Overlap_OVERLAP_WAIT:        catalog.OverlapWait,
	vmsnapv1.Overlap_OVERLAP_SKIP:        catalog.OverlapSkip,
}

var runStates = wordTable[vmsnapv1.RunState, catalog.RunState]{
	vmsnapv1.RunState_RUN_STATE_DUE:     catalog.RunDue,
	vmsnapv1.RunState_RUN_STATE_BEGUN:   catalog.RunBegun,
	vmsnapv1.RunState_RUN_STATE_SKIPPED: catalog.RunSkipped,
}

// maxNumber bounds the numbers of a timing and of a retention, so that they fit
// the agent's.
const maxNumber = 1 << 30

// maxAge bounds the age of a retention: a duration has no room for more than
// some 292 years.
const maxAge = 100 * 366 * 24 * time.Hour

// scheduleSpec checks the structure of a schedule. What it means is the agent's
// to judge.
func scheduleSpec(ctx context.Context, msg *vmsnapv1.ScheduleSpec) (agent.ScheduleSpec, error) {
	var spec agent.ScheduleSpec
	timing, err := timingOf(msg.GetTiming())
	if err != nil {
		return spec, err
	}
	retention, err := retentionOf(msg.GetRetention())
	if err != nil {
		return spec, err
	}
	options, err := snapshotOptions(ctx, msg.GetSnapshot())
	if err != nil {
		return spec, err
	}
	late, known := missed[msg.GetMissed()]
	if !known {
		return spec, usage("missed has the unknown value %d", msg.GetMissed())
	}
	overlap, known := overlaps[msg.GetOverlap()]
	if !known {
		return spec, usage("overlap has the unknown value %d", msg.GetOverlap())
	}
	spec = agent.ScheduleSpec{
		Name: msg.GetName(), VM: msg.GetVm(), Selector: msg.GetSelector(), Timing: timing, Snapshot: options,
		NameTemplate: msg.GetNameTemplate(), Jitter: msg.GetJitter().AsDuration(), Missed: late, Overlap: overlap, Retention: retention,
	}
	return spec, first(
		checkRef("name", spec.Name), checkLength("vm", spec.VM, maxRef), checkLength("selector", spec.Selector, maxRef),
		checkLength("name_template", spec.NameTemplate, maxName), checkDuration("jitter", msg.GetJitter()),
	)
}

// snapshotOptions are those of a schedule's snapshots.
func snapshotOptions(ctx context.Context, msg *vmsnapv1.CreateSnapshotRequest) (agent.SnapshotRequest, error) {
	if msg.GetVm() != "" || msg.GetName() != "" || msg.GetRequestId() != "" {
		return agent.SnapshotRequest{}, usage("snapshot has a vm, a name or a request_id: they are the schedule's to choose")
	}
	whole := &vmsnapv1.CreateSnapshotRequest{}
	if msg != nil {
		whole = proto.CloneOf(msg)
	}
	whole.Vm = "of the schedule"
	options, err := snapshotRequest(ctx, whole)
	options.VM, options.UID = "", 0
	return options, err
}

func timingOf(msg *vmsnapv1.Timing) (schedule.Timing, error) {
	kind, known := scheduleKinds[msg.GetKind()]
	if !known {
		return schedule.Timing{}, usage("timing.kind has the unknown value %d", msg.GetKind())
	}
	if msg.GetAt() != nil && !msg.GetAt().IsValid() {
		return schedule.Timing{}, usage("timing.at is not a time")
	}
	for _, n := range append([]uint32{msg.GetDay(), msg.GetHour(), msg.GetMinute(), msg.GetSecond()}, msg.GetWeekdays()...) {
		if n > maxNumber {
			return schedule.Timing{}, usage("timing has the number %d", n)
		}
	}
	if len(msg.GetWeekdays()) > 7 {
		return schedule.Timing{}, usage("timing.weekdays has %d entries", len(msg.GetWeekdays()))
	}
	t := schedule.Timing{
		Kind: kind, Cron: msg.GetCron(), Day: int(msg.GetDay()), Hour: int(msg.GetHour()), Minute: int(msg.GetMinute()),
		Second: int(msg.GetSecond()), Zone: msg.GetZone(),
	}
	for _, w := range msg.GetWeekdays() {
		t.Weekdays = append(t.Weekdays, time.Weekday(w))
	}
	if msg.GetAt() != nil {
		t.At = msg.GetAt().AsTime()
	}
	return t, first(checkLength("timing.cron", t.Cron, maxRef), checkLength("timing.zone", t.Zone, maxRef))
}

func retentionOf(msg *vmsnapv1.Retention) (schedule.Retention, error) {
	for _, n := range []uint32{msg.GetLast(), msg.GetHourly(), msg.GetDaily(), msg.GetWeekly(), msg.GetMonthly(), msg.GetYearly()} {
		if n > maxNumber {
			return schedule.Retention{}, usage("retention has the number %d", n)
		}
	}
	if age := msg.GetMaxAge(); age != nil && (!age.IsValid() || age.AsDuration() < 0 || age.AsDuration() > maxAge) {
		return schedule.Retention{}, usage("retention.max_age is not between zero and a hundred years")
	}
	return schedule.Retention{
		Last: int(msg.GetLast()), Hourly: int(msg.GetHourly()), Daily: int(msg.GetDaily()), Weekly: int(msg.GetWeekly()),
		Monthly: int(msg.GetMonthly()), Yearly: int(msg.GetYearly()), MaxAge: msg.GetMaxAge().AsDuration(), MaxSpace: msg.GetMaxSpace(),
	}, nil
}

func scheduleProto(v agent.ScheduleView) *vmsnapv1.Schedule {
	s := v.Spec
	return &vmsnapv1.Schedule{
		Id: text(v.ID), Paused: v.Paused, Uid: v.UID, Created: stamp(v.Created), Changed: stamp(v.Changed), Revision: v.Revision,
		Spec: &vmsnapv1.ScheduleSpec{
			Name: text(s.Name), Vm: text(s.VM), Selector: text(s.Selector), Timing: timingProto(s.Timing), Snapshot: optionsProto(s.Snapshot),
			NameTemplate: text(s.NameTemplate), Jitter: span(s.Jitter), Missed: missed.of(s.Missed), Overlap: overlaps.of(s.Overlap),
			Retention: retentionProto(s.Retention),
		},
		Vms:        each(v.VMs, scheduleVMProto),
		TimingText: text(s.Timing.String()),
	}
}

func timingProto(t schedule.Timing) *vmsnapv1.Timing {
	out := &vmsnapv1.Timing{
		Kind: scheduleKinds.of(t.Kind), At: stamp(t.At), Cron: text(t.Cron), Day: uint32(t.Day), Hour: uint32(t.Hour),
		Minute: uint32(t.Minute), Second: uint32(t.Second), Zone: text(t.Zone),
	}
	for _, w := range t.Weekdays {
		out.Weekdays = append(out.Weekdays, uint32(w))
	}
	return out
}

func retentionProto(r schedule.Retention) *vmsnapv1.Retention {
	if r.None() {
		return nil
	}
	return &vmsnapv1.Retention{
		Last: uint32(r.Last), Hourly: uint32(r.Hourly), Daily: uint32(r.Daily), Weekly: uint32(r.Weekly), Monthly: uint32(r.Monthly),
		Yearly: uint32(r.Yearly), MaxAge: span(r.MaxAge), MaxSpace: r.MaxSpace,
	}
}

// optionsProto is what snapshotOptions reads.
func optionsProto(r agent.SnapshotRequest) *vmsnapv1.CreateSnapshotRequest {
	out := &vmsnapv1.CreateSnapshotRequest{
		Description: text(r.Description), Disks: each(r.Disks, text), Exclude: each(r.Exclude, text), Quiesce: requested[string(r.Quiesce)],
		Mountpoints: each(r.Mountpoints, text), FreezeTimeout: span(r.FreezeTimeout), Lease: span(r.Lease), Strict: r.Strict,
		AllowPartial: r.AllowPartial, Memory: r.Memory, MemoryStrategy: strategies[r.Strategy], MaxPause: span(r.MaxPause), Compress: r.Compress,
		ExpireAfter: span(r.ExpireAfter),
		Profile:     text(r.Profile),
	}
	if len(r.Labels) > 0 {
		out.Labels = make(map[string]string, len(r.Labels))
		for key, value := range r.Labels {
			out.Labels[text(key)] = text(value)
		}
	}
	return out
}

func scheduleVMProto(v agent.ScheduleVM) *vmsnapv1.ScheduleVM {
	out := &vmsnapv1.ScheduleVM{Id: text(v.ID), Name: text(v.Name), Next: stamp(v.Next), Verdicts: each(v.Verdicts, verdictProto)}
	if v.Last != nil {
		out.Last = runProto(*v.Last)
	}
	return out
}

func verdictProto(v schedule.Verdict) *vmsnapv1.Verdict {
	return &vmsnapv1.Verdict{
		SnapshotId: text(v.ID), Snapshot: text(v.Name), Created: stamp(v.Time), Size: v.Size, Stays: v.Stays, Reasons: each(v.Reasons, text),
	}
}

func runProto(r agent.RunView) *vmsnapv1.Run {
	return &vmsnapv1.Run{
		Schedule: text(r.Schedule), VmId: text(r.VMID), VmName: text(r.VMName), Disks: each(r.Disks, text), Time: stamp(r.Time),
		Begins: stamp(r.Begins), State: runStates.of(r.State), Late: r.Late, OperationId: text(r.Operation), Result: operationStates[r.Result],
		SnapshotId: text(r.Snapshot), Snapshot: text(r.Name), Message: text(r.Message),
	}
}
