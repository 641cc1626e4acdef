package catalog

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/schedule"
)

// Schedule takes snapshots of a VM, or of all VMs that a selector matches, at
// times of its own.
type Schedule struct {
	ID       string // assigned by the catalog; never changes
	Name     string // unique
	Spec     ScheduleSpec
	Paused   bool
	UID      uint32 // who made it; its snapshots are theirs
	Created  time.Time
	Changed  time.Time
	Revision uint64 // grows with each change
}

// ScheduleSpec is what people chose of a schedule.
type ScheduleSpec struct {
	VMID      string             `json:"vm,omitempty"`       // the one VM …
	Selector  string             `json:"selector,omitempty"` // … or a pattern of names, as in path.Match
	Timing    schedule.Timing    `json:"timing"`
	Snapshot  json.RawMessage    `json:"snapshot"` // the options of its snapshots; the agent's own
	Name      string             `json:"name"`     // the template of their names
	Jitter    time.Duration      `json:"jitter,omitempty"`
	Missed    schedule.Missed    `json:"missed"`
	Overlap   Overlap            `json:"overlap"`
	Retention schedule.Retention `json:"retention,omitzero"`
}

// Overlap is what a run does that comes while its VM is busy.
type Overlap string

// The policies for overlaps.
const (
	OverlapWait Overlap = "wait" // until the VM is free, or the next run comes
	OverlapSkip Overlap = "skip"
)

// RunState is what became of a run.
type RunState string

// The states of a run.
const (
	RunDue     RunState = "due"     // decided on, and not begun yet
	RunBegun   RunState = "begun"   // its operation was begun, and tells the rest
	RunSkipped RunState = "skipped" // it did not take place; the message says why
)

// ScheduleRun is one run of a schedule for one VM.
type ScheduleRun struct {
	Schedule  string // id
	VMID      string
	Time      time.Time // of the schedule, without jitter
	State     RunState
	Late      bool   // it was missed, and caught up
	Operation string // empty until it has begun
	Message   string // why it was skipped
}

const scheduleColumns = "id, name, spec, paused, uid, created, changed, revision"

func scanSchedule(row scanner) (Schedule, error) {
	var s Schedule
	err := row.Scan(&s.ID, &s.Name, jsonColumn{&s.Spec}, &s.Paused, &s.UID, timeColumn{&s.Created}, timeColumn{&s.Changed}, bitsColumn{&s.Revision})
	return s, err
}

// Schedules returns all schedules by name.
func (r reader) Schedules(ctx context.Context) ([]Schedule, error) {
	return query(ctx, r, scanSchedule, "SELECT "+scheduleColumns+" FROM schedules ORDER BY name")
}

// Schedule returns the schedule of a name or an id, or fault.NotFound.
func (r reader) Schedule(ctx context.Context, ref string) (Schedule, error) {
	s, ok, err := queryOne(ctx, r, scanSchedule, "SELECT "+scheduleColumns+" FROM schedules WHERE name = ?1 OR id = ?1 ORDER BY name = ?1 DESC", ref)
	if err == nil && !ok {
		err = NoSchedule(ref)
	}
	return s, err
}

// AddSchedule records a new schedule and returns it with its id. It returns
// fault.Exists when the name is taken.
func (tx *Tx) AddSchedule(ctx context.Context, s Schedule) (Schedule, error) {
	if err := tx.scheduleNameFree(ctx, s.Name, ""); err != nil {
		return s, err
	}
	var err error
	if s.ID, err = tx.freeID(ctx, "schedules"); err != nil {
		return s, err
	}
	spec, err := jsonText(s.Spec)
	if err != nil {
		return s, fmt.Errorf("schedule %s: %w", s.Name, err)
	}
	s.Created, s.Changed, s.Revision = tx.now().UTC().Round(0), tx.now().UTC().Round(0), 1
	_, err = tx.exec(ctx, "INSERT INTO schedules ("+scheduleColumns+") VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
		s.ID, s.Name, spec, s.Paused, s.UID, nanos(s.Created), nanos(s.Changed), int64(s.Revision))
	return s, err
}

// ChangeSchedule replaces a schedule of the same revision and returns it as it
// is recorded. It returns fault.Busy when it was changed meanwhile.
func (tx *Tx) ChangeSchedule(ctx context.Context, s Schedule) (Schedule, error) {
	if err := tx.scheduleNameFree(ctx, s.Name, s.ID); err != nil {
		return s, err
	}
	spec, err := jsonText(s.Spec)
	if err != nil {
		return s, fmt.Errorf("schedule %s: %w", s.Name, err)
	}
	s.Changed = tx.now().UTC().Round(0)
	n, err := tx.exec(ctx, "UPDATE schedules SET name = ?, spec = ?, paused = ?, changed = ?, revision = revision + 1 WHERE id = ? AND revision = ?",
		s.Name, spec, s.Paused, nanos(s.Changed), s.ID, int64(s.Revision))
	if err != nil {
		return s, err
	}
	s.Revision++
	if n == 0 {
		if _, err := tx.Schedule(ctx, s.ID); err != nil {
			return s, err
		}
		return s, fault.New(fault.Busy, "schedule %s was changed by somebody else meanwhile", s.Name).WithHint("look at it again, and repeat the change")
	}
	return s, nil
}

func (tx *Tx) scheduleNameFree(ctx context.Context, name, id string) error {
	_, taken, err := queryOne(ctx, tx.reader, scanValue[string], "SELECT id FROM schedules WHERE name = ? AND id <> ?", name, id)
	if err == nil && taken {
		err = fault.New(fault.Exists, "there is a schedule %q already", name)
	}
	return err
}

// NoSchedule is the error of a schedule that was asked for and is not there.
func NoSchedule(ref string) error {
	return fault.New(fault.NotFound, "there is no schedule %q", ref).WithHint("vmsnap schedule list shows the schedules")
}

// DeleteSchedule forgets a schedule and its runs. Its snapshots stay.
func (tx *Tx) DeleteSchedule(ctx context.Context, id string) error {
	n, err := tx.exec(ctx, "DELETE FROM schedules WHERE id = ?", id)
	if err == nil && n == 0 {
		err = notFound("there is no schedule with the id %q", id)
	}
	return err
}

// ScheduleHandled returns up to which time a schedule has dealt with each VM.
func (r reader) ScheduleHandled(ctx context.Context, id string) (map[string]time.Time, error) {
	type row struct {
		vm   string
		time time.Time
	}
	rows, err := query(ctx, r, func(s scanner) (x row, err error) {
		err = s.Scan(&x.vm, timeColumn{&x.time})
		return x, err
	}, "SELECT vm, handled FROM schedule_vms WHERE schedule = ?", id)
	handled := make(map[string]time.Time, len(rows))
	for _, x := range rows {
		handled[x.vm] = x.time
	}
	return handled, err
}

// SetScheduleHandled records up to which time a schedule has dealt with a VM.
func (tx *Tx) SetScheduleHandled(ctx context.Context, id, vmID string, handled time.Time) error {
	_, err := tx.exec(ctx, `INSERT INTO schedule_vms (schedule, vm, handled) VALUES (?, ?, ?)
		ON CONFLICT (schedule, vm) DO UPDATE SET handled = excluded.handled`, id, vmID, nanos(handled))
	return err
}

// ResetScheduleHandled makes a schedule begin anew with all of its VMs.
func (tx *Tx) ResetScheduleHandled(ctx context.Context, id string, handled time.Time) error {
	_, err := tx.exec(ctx, "UPDATE schedule_vms SET handled = ? WHERE schedule = ?", nanos(handled), id)
	return err
}

const runColumns = "schedule, vm, time, state, late, operation, message"

func scanRun(row scanner) (ScheduleRun, error) {
	var r ScheduleRun
	err := row.Scan(&r.Schedule, &r.VMID, timeColumn{&r.Time}, &r.State, &r.Late, &r.Operation, &r.Message)
	return r, err
}

// runsKept is how many runs of a schedule for a VM are kept beside those whose
// snapshots are there.
const runsKept = 1000

// AddScheduleRun records a run. It returns fault.Exists when the schedule has
// run for the VM at this time before.
func (tx *Tx) AddScheduleRun(ctx context.Context, r ScheduleRun) error {
	n, err := tx.exec(ctx, "INSERT INTO schedule_runs ("+runColumns+") VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
		r.Schedule, r.VMID, nanos(r.Time), r.State, r.Late, r.Operation, r.Message)
	if err != nil {
		return err
	}
	if n == 0 {
		return fault.New(fault.Exists, "the schedule has run at %s already", r.Time.Format(time.RFC3339))
	}
	_, err = tx.exec(ctx, `DELETE FROM schedule_runs WHERE schedule = ?1 AND vm = ?2 AND time < ifnull((
			SELECT time FROM schedule_runs WHERE schedule = ?1 AND vm = ?2 ORDER BY time DESC LIMIT 1 OFFSET ?3), 0)
		AND operation NOT IN (SELECT operation FROM snapshots WHERE vm = ?2)`, r.Schedule, r.VMID, runsKept-1)
	return err
}

// EndScheduleRun records what became of a run.
func (c *Catalog) EndScheduleRun(ctx context.Context, r ScheduleRun) error {
	return c.Update(ctx, func(tx *Tx) error { return tx.EndScheduleRun(ctx, r) })
}

// EndScheduleRun records what became of a run; see Catalog.EndScheduleRun.
func (tx *Tx) EndScheduleRun(ctx context.Context, r ScheduleRun) error {
	_, err := tx.exec(ctx, "UPDATE schedule_runs SET state = ?, operation = ?, message = ? WHERE schedule = ? AND vm = ? AND time = ?",
		r.State, r.Operation, r.Message, r.Schedule, r.VMID, nanos(r.Time))
	return err
}

// RunFilter chooses runs. Its zero value lets all through.
type RunFilter struct {
	Schedule string // id
	VMID     string
	State    RunState
	Limit    int // no more than these; all when 0
}

// ScheduleRuns returns runs, the newest time first.
func (r reader) ScheduleRuns(ctx context.Context, f RunFilter) ([]ScheduleRun, error) {
	limit := f.Limit
	if limit <= 0 {
		limit = -1 // none, to SQLite
	}
	return query(ctx, r, scanRun, "SELECT "+runColumns+` FROM schedule_runs
		WHERE (?1 = '' OR schedule = ?1) AND (?2 = '' OR vm = ?2) AND (?3 = '' OR state = ?3) ORDER BY time DESC, vm, schedule LIMIT ?4`,
		f.Schedule, f.VMID, string(f.State), limit)
}

// ScheduleRan reports whether a schedule has run for a VM at a time.
func (r reader) ScheduleRan(ctx context.Context, id, vmID string, at time.Time) (bool, error) {
	_, ran, err := queryOne(ctx, r, scanValue[string], "SELECT state FROM schedule_runs WHERE schedule = ? AND vm = ? AND time = ?", id, vmID, nanos(at))
	return ran, err
}
