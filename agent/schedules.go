package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"path"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/event"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/agent/schedule"
)

// ScheduleCaps bound what a schedule may keep. Zero values bound nothing.
type ScheduleCaps struct {
	Keep   int           // snapshots of a VM, by the counts of its retention
	MaxAge time.Duration // of a snapshot
}

// Deleter deletes a snapshot for a retention: the snapshot's own operation, with
// its merge.
type Deleter interface {
	DeleteSnapshot(ctx context.Context, id string, uid uint32) (op.Record, error)
}

// ScheduleSpec is a schedule as people choose it.
type ScheduleSpec struct {
	Name         string
	VM           string // name, UUID or id of the one VM …
	Selector     string // … or a pattern of VMs' names, as in path.Match
	Timing       schedule.Timing
	Snapshot     SnapshotRequest // the options of its snapshots; VM and Name are the schedule's to choose
	NameTemplate string          // empty: schedule.DefaultName
	Jitter       time.Duration
	Missed       schedule.Missed // empty: schedule.CatchUp
	Overlap      catalog.Overlap // empty: catalog.OverlapWait
	Retention    schedule.Retention
}

// ScheduleView is a schedule with what comes next and what came last.
type ScheduleView struct {
	ID       string
	Spec     ScheduleSpec // VM is the VM's name, or its id when it was forgotten
	Paused   bool
	UID      uint32
	Created  time.Time
	Changed  time.Time
	Revision uint64
	VMs      []ScheduleVM // those that it takes snapshots of now, by name
}

// ScheduleVM is a VM of a schedule.
type ScheduleVM struct {
	ID, Name string
	Next     time.Time // when the next run begins, jitter included; zero: never
	Last     *RunView  // nil when it has not run yet
	Verdicts []schedule.Verdict
}

// RunView is a run that came or comes.
type RunView struct {
	Schedule  string // name
	VMID      string
	VMName    string
	Disks     []string  // that it takes
	Time      time.Time // of the schedule, without jitter
	Begins    time.Time // jitter included
	State     catalog.RunState
	Late      bool
	Operation string
	Result    op.State // of the operation
	Snapshot  string   // id
	Name      string   // of the snapshot
	Message   string
}

// maxJitter keeps a run within a day of its time.
const maxJitter = 24 * time.Hour

// check refuses what cannot be meant, and fills in what was left out.
func (a *Agent) checkSchedule(s *ScheduleSpec, now time.Time) (*schedule.Rule, error) {
	if err := checkScheduleName(s.Name); err != nil {
		return nil, err
	}
	if s.NameTemplate == "" {
		s.NameTemplate = schedule.DefaultName
	}
	if s.Missed == "" {
		s.Missed = schedule.CatchUp
	}
	if s.Overlap == "" {
		s.Overlap = catalog.OverlapWait
	}
	rule, err := s.Timing.Rule()
	if err != nil {
		return nil, fault.New(fault.Usage, "schedule %s: %w", s.Name, err)
	}
	if rule.Next(now).IsZero() {
		return nil, fault.New(fault.Usage, "schedule %s: its only time, %s, is past", s.Name, s.Timing)
	}
	switch {
	case (s.VM == "") == (s.Selector == ""):
		return nil, fault.New(fault.Usage, "schedule %s: give either a VM or a selector", s.Name)
	case s.Missed != schedule.CatchUp && s.Missed != schedule.Skip:
		return nil, fault.New(fault.Usage, "schedule %s: missed runs are %q; %s and %s are known", s.Name, s.Missed, schedule.CatchUp, schedule.Skip)
	case s.Overlap != catalog.OverlapWait && s.Overlap != catalog.OverlapSkip:
		return nil, fault.New(fault.Usage, "schedule %s: overlaps are %q; %s and %s are known", s.Name, s.Overlap, catalog.OverlapWait, catalog.OverlapSkip)
	case s.Jitter < 0 || s.Jitter > maxJitter:
		return nil, fault.New(fault.Usage, "schedule %s: the jitter %s is not between 0 and %s", s.Name, s.Jitter, maxJitter)
	}
	if _, err := path.Match(s.Selector, ""); err != nil {
		return nil, fault.New(fault.Usage, "schedule %s: the selector %q is not a pattern", s.Name, s.Selector)
	}
	if err := a.checkSnapshots(s, rule, now); err != nil {
		return nil, err
	}
	return rule, a.checkRetention(s)
}

// checkScheduleName takes what fits into a snapshot's name.
func checkScheduleName(name string) error {
	bad := func(r rune) bool { return r == '/' || unicode.IsSpace(r) || !unicode.IsPrint(r) }
	if name == "" || len(name) > maxScheduleName || !utf8.ValidString(name) || strings.HasPrefix(name, "-") || strings.ContainsFunc(name, bad) {
		return fault.New(fault.Usage, "a schedule cannot be called %q", name).
			WithHint("use up to %d letters, digits and marks such as - _ .", maxScheduleName)
	}
	return nil
}

// maxScheduleName leaves room for a time in the names of snapshots, in bytes.
const maxScheduleName = 48

// checkSnapshots checks the options and the names of a schedule's snapshots.
func (a *Agent) checkSnapshots(s *ScheduleSpec, rule *schedule.Rule, now time.Time) error {
	template, err := schedule.ParseTemplate(s.NameTemplate)
	if err == nil {
		err = template.Distinct(rule, now)
	}
	if err != nil {
		return fault.New(fault.Usage, "schedule %s: %w", s.Name, err)
	}
	example := s.Snapshot
	example.Name = template.Name(schedule.Naming{VM: "vm", Schedule: s.Name, Time: rule.Next(now)})
	if err := a.checkRequest(&example); err != nil {
		return fault.New(fault.Of(err), "schedule %s: %w", s.Name, err)
	}
	return nil
}

// checkRetention checks a retention against the caps, and that there is
// something to delete with.
func (a *Agent) checkRetention(s *ScheduleSpec) error {
	r := s.Retention
	if p, err := a.profile(s.Snapshot.Profile); err == nil && r.None() {
		r = p.Retention
	}
	if err := r.Check(); err != nil {
		return fault.New(fault.Usage, "schedule %s: %w", s.Name, err)
	}
	caps := a.cfg.ScheduleCaps
	if most, counted := r.Most(); caps.Keep > 0 && (!counted || most > caps.Keep) {
		return fault.New(fault.Denied, "schedule %s: it would keep %s; at most %d are allowed here", s.Name, keeps(most, counted), caps.Keep).
			WithHint("give it a retention of at most %d in all; the setting schedule-max-keep bounds it", caps.Keep)
	}
	if caps.MaxAge > 0 && (r.MaxAge == 0 || r.MaxAge > caps.MaxAge) {
		return fault.New(fault.Denied, "schedule %s: its snapshots would be kept for longer than the %s that are allowed here", s.Name, caps.MaxAge).
			WithHint("give it a maximum age; the setting schedule-max-age bounds it")
	}
	return nil
}

func keeps(most int, counted bool) string {
	if !counted {
		return "any number of snapshots of a VM"
	}
	return fmt.Sprintf("up to %d snapshots of a VM", most)
}

// stored is a spec as the catalog keeps it.
func (s ScheduleSpec) stored(vmID string) (catalog.ScheduleSpec, error) {
	s.Snapshot.VM, s.Snapshot.Name = "", ""
	options, err := json.Marshal(s.Snapshot)
	return catalog.ScheduleSpec{
		VMID: vmID, Selector: s.Selector, Timing: s.Timing, Snapshot: options, Name: s.NameTemplate, Jitter: s.Jitter,
		Missed: s.Missed, Overlap: s.Overlap, Retention: s.Retention,
	}, err
}

// CreateSchedule makes a schedule. It runs from now on.
func (a *Agent) CreateSchedule(ctx context.Context, s ScheduleSpec, uid uint32) (ScheduleView, error) {
	now := a.clock()
	if _, err := a.checkSchedule(&s, now); err != nil {
		return ScheduleView{}, err
	}
	vmID, err := a.scheduledVM(s)
	if err != nil {
		return ScheduleView{}, err
	}
	spec, err := s.stored(vmID)
	if err != nil {
		return ScheduleView{}, err
	}
	var rec catalog.Schedule
	err = a.catalog.Update(ctx, func(tx *catalog.Tx) error {
		if rec, err = tx.AddSchedule(ctx, catalog.Schedule{Name: s.Name, Spec: spec, UID: uid}); err != nil {
			return err
		}
		return tx.AddEvent(ctx, scheduleEvent(ctx, rec, "created", "made: "+s.Timing.String()))
	})
	return a.afterChange(ctx, rec, err)
}

// PlanSchedule shows what a schedule would be, what would come next and which of
// its snapshots would stay, and changes nothing. ref names the schedule that would
// be edited; without one it would be made.
func (a *Agent) PlanSchedule(ctx context.Context, ref string, s ScheduleSpec) (ScheduleView, error) {
	now := a.clock()
	if _, err := a.checkSchedule(&s, now); err != nil {
		return ScheduleView{}, err
	}
	vmID, err := a.scheduledVM(s)
	if err != nil {
		return ScheduleView{}, err
	}
	spec, err := s.stored(vmID)
	if err != nil {
		return ScheduleView{}, err
	}
	rec := catalog.Schedule{Name: s.Name, Created: now, Changed: now}
	if ref != "" {
		if rec, err = a.catalog.Schedule(ctx, ref); err != nil {
			return ScheduleView{}, err
		}
	}
	if other, err := a.catalog.Schedule(ctx, s.Name); err == nil && other.ID != rec.ID {
		return ScheduleView{}, fault.New(fault.Exists, "there is a schedule %s already", s.Name)
	} else if err != nil && fault.Of(err) != fault.NotFound {
		return ScheduleView{}, err
	}
	rec.Name, rec.Spec = s.Name, spec
	return a.scheduleView(ctx, rec)
}

// scheduledVM returns the id of the VM that a spec names, if it names one.
func (a *Agent) scheduledVM(s ScheduleSpec) (string, error) {
	if s.VM == "" {
		return "", nil
	}
	v, err := a.find(s.VM)
	if err != nil {
		return "", err
	}
	return v.id, nil
}

// EditSchedule replaces what was chosen of a schedule, if it has the revision
// still. When the times change it runs from now on by the new ones.
func (a *Agent) EditSchedule(ctx context.Context, ref string, s ScheduleSpec, revision uint64) (ScheduleView, error) {
	now := a.clock()
	if _, err := a.checkSchedule(&s, now); err != nil {
		return ScheduleView{}, err
	}
	vmID, err := a.scheduledVM(s)
	if err != nil {
		return ScheduleView{}, err
	}
	spec, err := s.stored(vmID)
	if err != nil {
		return ScheduleView{}, err
	}
	var rec catalog.Schedule
	err = a.catalog.Update(ctx, func(tx *catalog.Tx) error {
		if rec, err = tx.Schedule(ctx, ref); err != nil {
			return err
		}
		moved := rec.Spec.Timing.String() != spec.Timing.String() || rec.Spec.Jitter != spec.Jitter
		rec.Name, rec.Spec = s.Name, spec
		if revision != 0 {
			rec.Revision = revision
		}
		if rec, err = tx.ChangeSchedule(ctx, rec); err != nil {
			return err
		}
		if moved {
			if err := tx.ResetScheduleHandled(ctx, rec.ID, now); err != nil {
				return err
			}
		}
		return tx.AddEvent(ctx, scheduleEvent(ctx, rec, "edited", "edited: "+s.Timing.String()))
	})
	return a.afterChange(ctx, rec, err)
}

// PauseSchedule keeps a schedule from running, or lets it run again. What it
// would have run meanwhile is not caught up.
func (a *Agent) PauseSchedule(ctx context.Context, ref string, paused bool) (ScheduleView, error) {
	word := "resumed"
	if paused {
		word = "paused"
	}
	var rec catalog.Schedule
	err := a.catalog.Update(ctx, func(tx *catalog.Tx) (err error) {
		if rec, err = tx.Schedule(ctx, ref); err != nil || rec.Paused == paused {
			return err
		}
		rec.Paused = paused
		if rec, err = tx.ChangeSchedule(ctx, rec); err != nil {
			return err
		}
		if err := tx.ResetScheduleHandled(ctx, rec.ID, a.clock()); err != nil {
			return err
		}
		return tx.AddEvent(ctx, scheduleEvent(ctx, rec, word, word))
	})
	return a.afterChange(ctx, rec, err)
}

// DeleteSchedule removes a schedule. Its snapshots stay.
func (a *Agent) DeleteSchedule(ctx context.Context, ref string) error {
	err := a.catalog.Update(ctx, func(tx *catalog.Tx) error {
		rec, err := tx.Schedule(ctx, ref)
		if err != nil {
			return err
		}
		if err := tx.DeleteSchedule(ctx, rec.ID); err != nil {
			return err
		}
		return tx.AddEvent(ctx, scheduleEvent(ctx, rec, "deleted", "deleted"))
	})
	a.scheduler.wake()
	return err
}

// afterChange wakes the scheduler and shows the schedule.
func (a *Agent) afterChange(ctx context.Context, rec catalog.Schedule, err error) (ScheduleView, error) {
	if err != nil {
		return ScheduleView{}, err
	}
	a.scheduler.wake()
	return a.scheduleView(ctx, rec)
}

// scheduleEvent is that of a change of a schedule.
func scheduleEvent(ctx context.Context, s catalog.Schedule, result, message string) event.Event {
	return event.Event{
		Kind: event.ScheduleChanged, Severity: event.Info, VMID: s.Spec.VMID, Schedule: s.Name, UID: event.Actor(ctx),
		Result: result, Message: fmt.Sprintf("schedule %s: %s", s.Name, message),
	}
}
