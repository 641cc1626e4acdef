package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"slices"
	"strings"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/schedule"
)

// keepLabel is the label that keeps a snapshot from being expired.
const keepLabel = "keep"

// Schedules returns all schedules by name.
func (a *Agent) Schedules(ctx context.Context) ([]ScheduleView, error) {
	all, err := a.catalog.Schedules(ctx)
	if err != nil {
		return nil, err
	}
	views := make([]ScheduleView, len(all))
	for i, s := range all {
		if views[i], err = a.scheduleView(ctx, s); err != nil {
			return nil, err
		}
	}
	return views, nil
}

// Schedule returns the schedule of a name or an id.
func (a *Agent) Schedule(ctx context.Context, ref string) (ScheduleView, error) {
	s, err := a.catalog.Schedule(ctx, ref)
	if err != nil {
		return ScheduleView{}, fault.New(fault.Of(err), "%w", err).WithHint("vmsnap schedule list shows the schedules")
	}
	return a.scheduleView(ctx, s)
}

func (a *Agent) scheduleView(ctx context.Context, s catalog.Schedule) (ScheduleView, error) {
	spec := s.Spec
	view := ScheduleView{
		ID: s.ID, Paused: s.Paused, UID: s.UID, Created: s.Created, Changed: s.Changed, Revision: s.Revision,
		Spec: ScheduleSpec{
			Name: s.Name, VM: spec.VMID, Selector: spec.Selector, Timing: spec.Timing, NameTemplate: spec.Name,
			Jitter: spec.Jitter, Missed: spec.Missed, Overlap: spec.Overlap, Retention: spec.Retention,
		},
	}
	if err := json.Unmarshal(spec.Snapshot, &view.Spec.Snapshot); err != nil {
		return view, fault.New(fault.Failed, "the options of schedule %s: %w", s.Name, err)
	}
	rule, err := spec.Timing.Rule()
	if err != nil {
		return view, fault.New(fault.Failed, "schedule %s: %w", s.Name, err)
	}
	for _, v := range a.scheduledVMs(s) {
		entry := ScheduleVM{ID: v.id, Name: v.name()}
		if v.id == spec.VMID {
			view.Spec.VM = entry.Name
		}
		if !s.Paused {
			entry.Next = a.nextRun(ctx, s, rule, v.id)
		}
		last, err := a.catalog.ScheduleRuns(ctx, catalog.RunFilter{Schedule: s.ID, VMID: v.id, Limit: 1})
		if err != nil {
			return view, err
		}
		for _, run := range last {
			r := a.runView(ctx, s, v, run)
			entry.Last = &r
		}
		if entry.Verdicts, err = a.verdicts(ctx, s, rule, v); err != nil {
			return view, err
		}
		view.VMs = append(view.VMs, entry)
	}
	slices.SortFunc(view.VMs, func(x, y ScheduleVM) int { return cmp.Or(strings.Compare(x.Name, y.Name), strings.Compare(x.ID, y.ID)) })
	return view, nil
}

// nextRun returns when a schedule's next run of a VM begins.
func (a *Agent) nextRun(ctx context.Context, s catalog.Schedule, rule *schedule.Rule, vmID string) time.Time {
	jitter := runJitter(s, vmID)
	ran := a.ran(ctx, s.ID, vmID)
	for next := rule.Next(a.clock().Add(-jitter)); !next.IsZero(); next = rule.Next(next) {
		if !ran(next) {
			return next.Add(jitter)
		}
	}
	return time.Time{}
}

// runView shows a run with what its operation came to.
func (a *Agent) runView(ctx context.Context, s catalog.Schedule, v *vm, run catalog.ScheduleRun) RunView {
	r := RunView{
		Schedule: s.Name, VMID: v.id, VMName: v.name(), Time: run.Time, Begins: run.Time.Add(runJitter(s, v.id)), State: run.State,
		Late: run.Late, Operation: run.Operation, Message: run.Message,
	}
	if run.Operation == "" {
		return r
	}
	rec, err := a.ops.Operation(ctx, run.Operation)
	if err != nil {
		r.Message = err.Error()
		return r
	}
	r.Result, r.Snapshot = rec.State, rec.Snapshot
	if rec.Failure != nil {
		r.Message = rec.Failure.Message
	}
	if snapshot, err := a.catalog.Snapshot(ctx, rec.Snapshot); err == nil {
		r.Name = snapshot.Name
		for _, d := range snapshot.Disks {
			if !d.Excluded {
				r.Disks = append(r.Disks, d.Device)
			}
		}
	}
	return r
}

// RunFilter chooses runs.
type RunFilter struct {
	VM       string
	Schedule string
	Disk     string // only those that take this disk
	Limit    int    // 0: EventPage
}

// TakenRuns returns the runs that came, the newest first.
func (a *Agent) TakenRuns(ctx context.Context, f RunFilter) ([]RunView, error) {
	filter := catalog.RunFilter{Limit: cmp.Or(f.Limit, EventPage)}
	if f.VM != "" {
		v, err := a.find(f.VM)
		if err != nil {
			return nil, err
		}
		filter.VMID = v.id
	}
	all, err := a.catalog.Schedules(ctx)
	if err != nil {
		return nil, err
	}
	byID := map[string]catalog.Schedule{}
	for _, s := range all {
		byID[s.ID] = s
		if s.Name == f.Schedule || s.ID == f.Schedule {
			filter.Schedule = s.ID
		}
	}
	if f.Schedule != "" && filter.Schedule == "" {
		return nil, catalog.NoSchedule(f.Schedule)
	}
	runs, err := a.catalog.ScheduleRuns(ctx, filter)
	if err != nil {
		return nil, err
	}
	var views []RunView
	for _, run := range runs {
		a.mu.RLock()
		v := a.vms[run.VMID]
		a.mu.RUnlock()
		if v == nil {
			continue // it was forgotten at this moment
		}
		if r := a.runView(ctx, byID[run.Schedule], v, run); f.Disk == "" || slices.Contains(r.Disks, f.Disk) {
			views = append(views, r)
		}
	}
	return views, nil
}

// comingRuns is how many runs of a schedule for a VM are looked ahead at.
const comingRuns = 3

// ComingRuns returns the runs that come, the next one first.
func (a *Agent) ComingRuns(ctx context.Context, f RunFilter) ([]RunView, error) {
	if f.VM != "" {
		if _, err := a.find(f.VM); err != nil {
			return nil, err
		}
	}
	all, err := a.catalog.Schedules(ctx)
	if err != nil {
		return nil, err
	}
	var views []RunView
	found := false
	for _, s := range all {
		if f.Schedule != "" && f.Schedule != s.Name && f.Schedule != s.ID {
			continue
		}
		found = true
		if s.Paused {
			continue
		}
		for _, v := range a.scheduledVMs(s) {
			if f.VM != "" && !v.is(f.VM) {
				continue
			}
			views = append(views, a.coming(ctx, s, v, f.Disk)...)
		}
	}
	if f.Schedule != "" && !found {
		return nil, catalog.NoSchedule(f.Schedule)
	}
	slices.SortFunc(views, func(x, y RunView) int { return cmp.Or(x.Begins.Compare(y.Begins), strings.Compare(x.VMName, y.VMName)) })
	return views[:min(len(views), cmp.Or(f.Limit, EventPage))], nil
}

// is reports whether a VM is meant by a reference.
func (v *vm) is(ref string) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.id == ref || v.rec.Name == ref || v.rec.UUID == ref
}

// coming returns the next runs of a schedule for a VM.
func (a *Agent) coming(ctx context.Context, s catalog.Schedule, v *vm, disk string) []RunView {
	var req SnapshotRequest
	rule, err := s.Spec.Timing.Rule()
	if err != nil || json.Unmarshal(s.Spec.Snapshot, &req) != nil {
		return nil
	}
	if p, err := a.profile(req.Profile); err == nil {
		p.apply(&req)
	}
	disks := v.takes(req)
	if disk != "" && !slices.Contains(disks, disk) {
		return nil
	}
	var views []RunView
	jitter := runJitter(s, v.id)
	next := a.nextRun(ctx, s, rule, v.id)
	for !next.IsZero() && len(views) < comingRuns {
		at := next.Add(-jitter)
		views = append(views, RunView{Schedule: s.Name, VMID: v.id, VMName: v.name(), Disks: disks, Time: at, Begins: next, State: catalog.RunDue})
		if next = rule.Next(at); !next.IsZero() {
			next = next.Add(jitter)
		}
	}
	return views
}

// takes returns the disks that a request would take of a VM.
func (v *vm) takes(req SnapshotRequest) []string {
	v.mu.Lock()
	defer v.mu.Unlock()
	var devices []string
	for _, d := range v.disks {
		if takes, _ := req.takesDisk(d.Device); takes && !d.Removed {
			devices = append(devices, d.Device)
		}
	}
	return devices
}

// verdicts says which snapshots of a schedule stay, and why.
func (a *Agent) verdicts(ctx context.Context, s catalog.Schedule, rule *schedule.Rule, v *vm) ([]schedule.Verdict, error) {
	runs, err := a.catalog.ScheduleRuns(ctx, catalog.RunFilter{Schedule: s.ID, VMID: v.id, State: catalog.RunBegun})
	if err != nil {
		return nil, err
	}
	ours := map[string]bool{}
	for _, run := range runs {
		ours[run.Operation] = true
	}
	snapshots, err := a.catalog.Snapshots(ctx, v.id)
	if err != nil {
		return nil, err
	}
	var points []schedule.Point
	for _, snapshot := range snapshots {
		if !ours[snapshot.Operation] {
			continue
		}
		p := schedule.Point{ID: snapshot.ID, Name: snapshot.Name, Time: snapshot.Created, Size: a.takenSpace(ctx, snapshot), Expires: snapshot.Expires}
		if _, kept := snapshot.Labels[keepLabel]; kept {
			p.Protected = "it has the label " + keepLabel
		}
		if snapshot.Template {
			p.Protected = "it is a template"
		}
		points = append(points, p)
	}
	return a.retention(s.Spec).Judge(points, a.clock(), rule.Zone()), nil
}

// takenSpace is what a snapshot's files take.
func (a *Agent) takenSpace(ctx context.Context, s catalog.Snapshot) uint64 {
	var sum uint64
	for _, l := range a.snapshotViews(ctx, []catalog.Snapshot{s}, nil)[0].Layers {
		if !l.Foreign {
			sum += l.Allocated
		}
	}
	if s.Memory != nil {
		sum += s.Memory.Size
	}
	return sum
}

// expire deletes the snapshots that a schedule's retention lets go, the oldest
// first, one after the other. What cannot be deleted now is tried again after
// the next run.
func (a *Agent) expire(ctx context.Context, s catalog.Schedule, v *vm) {
	log := a.log.With("schedule", s.Name, "vm", v.name())
	rule, err := s.Spec.Timing.Rule()
	if err != nil {
		log.Error("nothing is expired", "error", err)
		return
	}
	verdicts, err := a.verdicts(ctx, s, rule, v)
	if err != nil {
		log.Error("nothing is expired", "error", err)
		return
	}
	for _, verdict := range slices.Backward(verdicts) {
		if verdict.Stays || ctx.Err() != nil {
			continue
		}
		log.Info("a snapshot is expired", "snapshot", verdict.Name, "because", strings.Join(verdict.Reasons, "; "))
		rec, err := a.deleter.DeleteSnapshot(ctx, verdict.ID, s.UID)
		if err == nil {
			_, err = a.ops.Wait(ctx, rec.ID)
		}
		if err != nil {
			log.Warn("a snapshot is not expired yet", "snapshot", verdict.Name, "error", err)
			return
		}
	}
}
