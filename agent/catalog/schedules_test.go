package catalog

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/schedule"
)

func addSchedule(t *testing.T, c *Catalog, s Schedule) (out Schedule, err error) {
	t.Helper()
	err = c.Update(t.Context(), func(tx *Tx) error {
		out, err = tx.AddSchedule(t.Context(), s)
		return err
	})
	return out, err
}

func TestSchedules(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	c.now = func() time.Time { return epoch }
	want := Schedule{
		Name: "nightly", UID: 7, Paused: true, Spec: ScheduleSpec{
			VMID: "v", Selector: "w*", Timing: schedule.Timing{Kind: schedule.Weekly, Weekdays: []time.Weekday{1}, Hour: 2, Zone: "Europe/Berlin"},
			Snapshot: json.RawMessage(`{"Memory":true}`), Name: "{{.Time}}", Jitter: time.Minute, Missed: schedule.Skip,
			Overlap: OverlapWait, Retention: schedule.Retention{Last: 3, MaxAge: time.Hour},
		},
	}
	first, err := addSchedule(t, c, want)
	check(t, err)
	want.ID, want.Created, want.Changed, want.Revision = first.ID, epoch, epoch, 1
	same(t, "added", first, want)
	for _, ref := range []string{"nightly", first.ID} {
		got, err := c.Schedule(ctx, ref)
		check(t, err)
		same(t, "read", got, want)
	}
	_, err = addSchedule(t, c, want)
	wantKind(t, "the name is taken", err, fault.Exists)
	second, err := addSchedule(t, c, Schedule{Name: "hourly", Spec: ScheduleSpec{Snapshot: json.RawMessage("{}")}})
	check(t, err)
	change := func(s Schedule) (out Schedule, err error) {
		err = c.Update(ctx, func(tx *Tx) error { out, err = tx.ChangeSchedule(ctx, s); return err })
		return out, err
	}
	second.Name, second.Paused = "nightly", true
	_, err = change(second)
	wantKind(t, "the other's name", err, fault.Exists)
	second.Name = "daily"
	changed, err := change(second)
	check(t, err)
	if changed.Revision != 2 {
		t.Errorf("the revision is %d", changed.Revision)
	}
	_, err = change(second)
	wantKind(t, "changed twice", err, fault.Busy)
	_, err = change(Schedule{ID: "x", Name: "x"})
	wantKind(t, "an unknown one", err, fault.NotFound)
	all, err := c.Schedules(ctx)
	check(t, err)
	same(t, "all", all, []Schedule{changed, first})
	remove := func(id string) error { return c.Update(ctx, func(tx *Tx) error { return tx.DeleteSchedule(ctx, id) }) }
	check(t, remove(first.ID))
	wantKind(t, "deleted twice", remove(first.ID), fault.NotFound)
	_, err = c.Schedule(ctx, "nightly")
	wantKind(t, "a deleted one", err, fault.NotFound)
}

func TestScheduleRuns(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	v, _ := seed(t, c, "web")
	s, err := addSchedule(t, c, Schedule{Name: "nightly"})
	check(t, err)
	run := ScheduleRun{Schedule: s.ID, VMID: v.ID, Time: epoch, State: RunDue, Late: true}
	add := func(r ScheduleRun) error {
		return c.Update(ctx, func(tx *Tx) error { return tx.AddScheduleRun(ctx, r) })
	}
	check(t, add(run))
	wantKind(t, "the same time again", add(run), fault.Exists)
	ran, err := c.ScheduleRan(ctx, s.ID, v.ID, epoch)
	check(t, err)
	later, err := c.ScheduleRan(ctx, s.ID, v.ID, epoch.Add(1))
	check(t, err)
	if !ran || later {
		t.Errorf("ran: %v, and later %v", ran, later)
	}
	run.State, run.Operation, run.Message = RunBegun, "0000beef", "…"
	check(t, c.EndScheduleRun(ctx, run))
	got, err := c.ScheduleRuns(ctx, RunFilter{Schedule: s.ID, VMID: v.ID, State: RunBegun})
	check(t, err)
	same(t, "runs", got, []ScheduleRun{run})
	check(t, c.Update(ctx, func(tx *Tx) error {
		for i := range runsKept + 5 {
			if err := tx.AddScheduleRun(ctx, ScheduleRun{Schedule: s.ID, VMID: v.ID, Time: epoch.Add(time.Duration(i+1) * time.Second), State: RunSkipped}); err != nil {
				return err
			}
		}
		return tx.SetScheduleHandled(ctx, s.ID, v.ID, epoch)
	}))
	if got, err = c.ScheduleRuns(ctx, RunFilter{}); err != nil || len(got) != runsKept || !got[0].Time.After(got[1].Time) {
		t.Errorf("%d runs are kept, %v", len(got), err)
	}
	handled, err := c.ScheduleHandled(ctx, s.ID)
	check(t, err)
	same(t, "handled", handled, map[string]time.Time{v.ID: epoch})
	check(t, c.Update(ctx, func(tx *Tx) error { return tx.ResetScheduleHandled(ctx, s.ID, epoch.Add(1)) }))
	handled, err = c.ScheduleHandled(ctx, s.ID)
	check(t, err)
	same(t, "handled", handled, map[string]time.Time{v.ID: epoch.Add(1)})
	check(t, c.DeleteVM(ctx, v.ID))
	if got, err := c.ScheduleRuns(ctx, RunFilter{}); err != nil || len(got) != 0 {
		t.Errorf("%d runs of a VM that is forgotten, %v", len(got), err)
	}
}
