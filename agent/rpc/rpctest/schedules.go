package rpctest

import (
	"context"
	"slices"
	"time"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/agent/schedule"
)

// AddSchedule adds a schedule.
func (b *Backend) AddSchedule(v agent.ScheduleView) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.schedules = append(b.schedules, v)
}

// CreateSchedule adds a schedule of one VM, whatever it is for.
func (b *Backend) CreateSchedule(_ context.Context, spec agent.ScheduleSpec, uid uint32) (agent.ScheduleView, error) {
	rule, err := spec.Timing.Rule()
	if err != nil {
		return agent.ScheduleView{}, fault.New(fault.Usage, "schedule %s: %w", spec.Name, err)
	}
	if !spec.Retention.None() {
		return agent.ScheduleView{}, fault.New(fault.Unsupported, "no retention here")
	}
	spec.NameTemplate = schedule.DefaultName
	v := agent.ScheduleView{
		ID: "5c5c5c5c", Spec: spec, UID: uid, Created: Now, Changed: Now, Revision: 1,
		VMs: []agent.ScheduleVM{{ID: "5f0c1a2b", Name: "web", Next: rule.Next(Now)}},
	}
	b.AddSchedule(v)
	return v, nil
}

// Schedules returns the schedules that were added.
func (b *Backend) Schedules(context.Context) ([]agent.ScheduleView, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.schedules), nil
}

// Schedule returns one schedule, by name or id.
func (b *Backend) Schedule(_ context.Context, ref string) (agent.ScheduleView, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	i, err := b.scheduleIndex(ref)
	if err != nil {
		return agent.ScheduleView{}, err
	}
	return b.schedules[i], nil
}

// scheduleIndex is for a caller that holds b.mu.
func (b *Backend) scheduleIndex(ref string) (int, error) {
	i := slices.IndexFunc(b.schedules, func(v agent.ScheduleView) bool { return v.Spec.Name == ref || v.ID == ref })
	if i < 0 {
		return i, fault.New(fault.NotFound, "there is no schedule %q", ref).WithHint("vmsnap schedule list shows the schedules")
	}
	return i, nil
}

// change changes one schedule.
func (b *Backend) change(ref string, f func(*agent.ScheduleView) error) (agent.ScheduleView, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	i, err := b.scheduleIndex(ref)
	if err == nil {
		err = f(&b.schedules[i])
	}
	if err != nil {
		return agent.ScheduleView{}, err
	}
	b.schedules[i].Revision++
	return b.schedules[i], nil
}

// PlanSchedule shows a schedule as it would be.
func (b *Backend) PlanSchedule(ctx context.Context, ref string, spec agent.ScheduleSpec) (agent.ScheduleView, error) {
	v, err := b.Schedule(ctx, ref)
	v.Spec = spec
	return v, err
}

// EditSchedule replaces what was chosen of a schedule.
func (b *Backend) EditSchedule(_ context.Context, ref string, spec agent.ScheduleSpec, revision uint64) (agent.ScheduleView, error) {
	return b.change(ref, func(v *agent.ScheduleView) error {
		if revision != 0 && revision != v.Revision {
			return fault.New(fault.Busy, "schedule %s was changed by somebody else meanwhile", ref)
		}
		rule, err := spec.Timing.Rule()
		if err != nil {
			return fault.New(fault.Usage, "%w", err)
		}
		v.Spec = spec
		for i := range v.VMs {
			v.VMs[i].Next = rule.Next(Now)
		}
		return nil
	})
}

// PauseSchedule pauses or resumes a schedule.
func (b *Backend) PauseSchedule(_ context.Context, ref string, paused bool) (agent.ScheduleView, error) {
	return b.change(ref, func(v *agent.ScheduleView) error {
		v.Paused = paused
		v.VMs = slices.Clone(v.VMs)
		for i := range v.VMs {
			if v.VMs[i].Next = (time.Time{}); !paused {
				v.VMs[i].Next = Now.Add(time.Hour)
			}
		}
		return nil
	})
}

// DeleteSchedule removes a schedule.
func (b *Backend) DeleteSchedule(_ context.Context, ref string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	i, err := b.scheduleIndex(ref)
	if err == nil {
		b.schedules = slices.Delete(b.schedules, i, i+1)
	}
	return err
}

// TakenRuns returns the last runs of the schedules' VMs.
func (b *Backend) TakenRuns(_ context.Context, f agent.RunFilter) ([]agent.RunView, error) {
	return b.runs(f, func(v agent.ScheduleVM, _ agent.ScheduleView) *agent.RunView { return v.Last }), nil
}

// ComingRuns returns the next runs of the schedules' VMs.
func (b *Backend) ComingRuns(_ context.Context, f agent.RunFilter) ([]agent.RunView, error) {
	return b.runs(f, func(v agent.ScheduleVM, s agent.ScheduleView) *agent.RunView {
		if v.Next.IsZero() {
			return nil
		}
		return &agent.RunView{
			Schedule: s.Spec.Name, VMID: v.ID, VMName: v.Name, Disks: []string{"root", "data"}, Time: v.Next, Begins: v.Next, State: catalog.RunDue,
		}
	}), nil
}

func (b *Backend) runs(f agent.RunFilter, of func(agent.ScheduleVM, agent.ScheduleView) *agent.RunView) (out []agent.RunView) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, s := range b.schedules {
		for _, v := range s.VMs {
			r := of(v, s)
			if r != nil && (f.VM == "" || f.VM == v.Name) && (f.Schedule == "" || f.Schedule == s.Spec.Name) &&
				(f.Disk == "" || slices.Contains(r.Disks, f.Disk)) {
				out = append(out, *r)
			}
		}
	}
	return out
}

// sampleSchedules are the schedules of Sample.
func sampleSchedules() []agent.ScheduleView {
	web := agent.ScheduleVM{ID: "5f0c1a2b", Name: "web", Next: Now.Add(17 * time.Hour)}
	web.Last = &agent.RunView{
		Schedule: "nightly", VMID: web.ID, VMName: "web", Disks: []string{"root", "data"}, Time: Now.Add(-7 * time.Hour), Begins: Now.Add(-7 * time.Hour),
		State: catalog.RunBegun, Late: true, Operation: "c0ffee01", Result: op.Succeeded, Snapshot: "1d0f5a3c", Name: "nightly-20260314T022653Z",
	}
	web.Verdicts = []schedule.Verdict{
		{Point: schedule.Point{ID: "1d0f5a3c", Name: "nightly-20260314T022653Z", Time: Now.Add(-7 * time.Hour), Size: 3 * mib}, Stays: true, Reasons: []string{"last 1 of 1", "newest of 2026-03-14, daily 1 of 7"}},
		{Point: schedule.Point{ID: "1d0f5a3b", Name: "nightly-20260212T013000Z", Time: Now.Add(-30 * 24 * time.Hour), Size: mib}, Reasons: []string{"no rule keeps it"}},
	}
	db := agent.ScheduleVM{ID: "6a6a6a6a", Name: "datenbank-東京", Last: &agent.RunView{
		Schedule: "dbs", VMID: "6a6a6a6a", VMName: "datenbank-東京", Time: Now.Add(-50 * time.Minute), Begins: Now.Add(-45 * time.Minute),
		State: catalog.RunSkipped, Message: "VM \"datenbank-東京\" is busy with operation 0badcafe",
	}}
	return []agent.ScheduleView{
		{
			ID: "5c0000d1", Paused: true, UID: 1000, Created: Now.Add(-90 * 24 * time.Hour), Changed: Now.Add(-time.Hour), Revision: 4, VMs: []agent.ScheduleVM{db},
			Spec: agent.ScheduleSpec{
				Name: "dbs", Selector: "datenbank-*", Timing: schedule.Timing{Kind: schedule.Cron, Cron: "30 */2 L * mon-fri"}, NameTemplate: "{{.VM}}-{{.Time}}",
				Jitter: 10 * time.Minute, Missed: schedule.Skip, Overlap: catalog.OverlapSkip,
				Snapshot: agent.SnapshotRequest{Quiesce: agent.QuiesceRequire, Labels: map[string]string{"team": "infra"}},
			},
		},
		{
			ID: "5c0000d2", UID: 0, Created: Now.Add(-20 * 24 * time.Hour), Changed: Now.Add(-20 * 24 * time.Hour), Revision: 1, VMs: []agent.ScheduleVM{web},
			Spec: agent.ScheduleSpec{
				Name: "nightly", VM: "web", Timing: schedule.Timing{Kind: schedule.Daily, Hour: 3, Minute: 30, Zone: "Europe/Berlin"},
				NameTemplate: schedule.DefaultName, Missed: schedule.CatchUp, Overlap: catalog.OverlapWait,
				Snapshot:  agent.SnapshotRequest{Memory: true, MaxPause: 200 * time.Millisecond},
				Retention: schedule.Retention{Last: 1, Daily: 7, MaxAge: 90 * 24 * time.Hour, MaxSpace: 100 * gib},
			},
		},
	}
}
