package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"sync"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/event"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/agent/schedule"
)

// lookInterval is how often the scheduler looks at the clock at least: timers
// do not follow a clock that is set, nor a host that slept.
const lookInterval = 30 * time.Second

// scheduler runs the schedules.
type scheduler struct {
	changed chan struct{} // receives when schedules or VMs have changed

	mu      sync.Mutex
	pending map[pendingKey]time.Time // runs that wait for their VM, and when they were to begin
	looked  time.Time                // when the schedules were last looked at

	expiring sync.Mutex           // held while snapshots are deleted whose time has come
	notYet   map[string]time.Time // when to try again, by the ids of those that could not be deleted
}

type pendingKey struct{ schedule, vm string }

func newScheduler() *scheduler {
	return &scheduler{changed: make(chan struct{}, 1), pending: map[pendingKey]time.Time{}, notYet: map[string]time.Time{}}
}

// wake makes the scheduler look again.
func (s *scheduler) wake() {
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// claim marks a VM as having a run of a schedule under way; it returns false
// when there is one.
func (s *scheduler) claim(k pendingKey, begins time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, pending := s.pending[k]; pending {
		return false
	}
	s.pending[k] = begins
	return true
}

// stands tells what the metrics show of the scheduler.
func (s *scheduler) stands() SchedulerView {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := SchedulerView{Looked: s.looked, Waiting: len(s.pending)}
	for _, begins := range s.pending {
		if v.Oldest.IsZero() || begins.Before(v.Oldest) {
			v.Oldest = begins
		}
	}
	return v
}

// saw notes that the schedules were looked at.
func (s *scheduler) saw(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.looked = now
}

func (s *scheduler) release(k pendingKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.pending, k)
}

// followSchedules runs the schedules until ctx ends.
func (a *Agent) followSchedules(ctx context.Context) {
	a.resumeRuns(ctx)
	for ctx.Err() == nil {
		next, err := a.runDue(ctx)
		if err != nil && ctx.Err() == nil {
			a.log.Error("the schedules cannot be looked at", "error", err)
		}
		a.scheduler.saw(a.clock())
		expires, err := a.expireDue(ctx)
		if err != nil && ctx.Err() == nil {
			a.log.Error("what expires cannot be looked at", "error", err)
		}
		wait := lookInterval
		for _, at := range []time.Time{next, expires} {
			if !at.IsZero() {
				wait = min(wait, max(at.Sub(a.clock()), 0))
			}
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-a.scheduler.changed:
		}
		timer.Stop()
	}
}

// runDue begins the runs that are due and returns when the next one is.
func (a *Agent) runDue(ctx context.Context) (next time.Time, err error) {
	all, err := a.catalog.Schedules(ctx)
	if err != nil {
		return next, err
	}
	var errs []error
	for _, s := range all {
		if s.Paused {
			continue
		}
		wake, err := a.runSchedule(ctx, s)
		if err != nil {
			errs = append(errs, fmt.Errorf("schedule %s: %w", s.Name, err))
		}
		if !wake.IsZero() && (next.IsZero() || wake.Before(next)) {
			next = wake
		}
	}
	return next, errors.Join(errs...)
}

// runSchedule begins what is due of one schedule.
func (a *Agent) runSchedule(ctx context.Context, s catalog.Schedule) (next time.Time, err error) {
	rule, err := s.Spec.Timing.Rule()
	if err != nil {
		return next, err
	}
	handled, err := a.catalog.ScheduleHandled(ctx, s.ID)
	if err != nil {
		return next, err
	}
	for _, v := range a.scheduledVMs(s) {
		now := a.clock()
		from, known := handled[v.id]
		if !known {
			// A VM that it has not dealt with yet begins now, and at the schedule's
			// own beginning if it was there by then.
			from = now
			if v.firstSeen().Before(s.Created) {
				from = s.Changed
			}
		}
		d := rule.Due(now, schedule.History{Handled: from, Ran: a.ran(ctx, s.ID, v.id)}, runJitter(s, v.id), s.Spec.Missed)
		if !known || !d.Handled.Equal(from) || !d.Run.IsZero() {
			if err := a.decide(ctx, s, v, d); err != nil {
				return next, err
			}
		}
		if !d.Wake.IsZero() && (next.IsZero() || d.Wake.Before(next)) {
			next = d.Wake
		}
	}
	return next, nil
}

// runJitter is by how much a schedule's runs of a VM are put off.
func runJitter(s catalog.Schedule, vmID string) time.Duration {
	return schedule.Jitter(s.ID+"/"+vmID, s.Spec.Jitter)
}

// ran tells whether a time had its run.
func (a *Agent) ran(ctx context.Context, id, vmID string) func(time.Time) bool {
	return func(at time.Time) bool {
		ran, err := a.catalog.ScheduleRan(ctx, id, vmID, at)
		if err != nil {
			a.log.Error("a schedule's runs cannot be read", "error", err)
		}
		return ran || err != nil // a run too few rather than one twice
	}
}

// scheduledVMs returns the VMs that a schedule takes snapshots of now.
func (a *Agent) scheduledVMs(s catalog.Schedule) []*vm {
	a.mu.RLock()
	defer a.mu.RUnlock()
	if s.Spec.Selector == "" {
		if v := a.vms[s.Spec.VMID]; v != nil {
			return []*vm{v}
		}
		return nil
	}
	var matching []*vm
	for _, v := range a.vms {
		if ok, err := path.Match(s.Spec.Selector, v.name()); ok && err == nil {
			matching = append(matching, v)
		}
	}
	return matching
}

func (v *vm) firstSeen() time.Time {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.rec.FirstSeen
}

// decide records what is to be done of a schedule for a VM, durably and once,
// and then does it.
func (a *Agent) decide(ctx context.Context, s catalog.Schedule, v *vm, d schedule.Decision) error {
	run := catalog.ScheduleRun{Schedule: s.ID, VMID: v.id, Time: d.Run, State: catalog.RunDue, Late: d.Late}
	key := pendingKey{s.ID, v.id}
	claimed := d.Run.IsZero() || a.scheduler.claim(key, d.Run.Add(runJitter(s, v.id)))
	if !claimed {
		run.State, run.Message = catalog.RunSkipped, "the run before it still waits for the VM"
	}
	err := a.catalog.Update(ctx, func(tx *catalog.Tx) error {
		if err := tx.SetScheduleHandled(ctx, s.ID, v.id, d.Handled); err != nil {
			return err
		}
		if d.Missed > 0 || d.Late {
			if err := tx.AddEvent(ctx, missedEvent(s, v, d)); err != nil {
				return err
			}
		}
		if d.Run.IsZero() {
			return nil
		}
		if !claimed {
			if err := tx.AddEvent(ctx, skippedEvent(s, v, run, event.Warning)); err != nil {
				return err
			}
		}
		return tx.AddScheduleRun(ctx, run)
	})
	if err == nil && !claimed {
		a.observeRun(s, v, run, false)
	}
	if d.Run.IsZero() || !claimed {
		return err
	}
	if err != nil {
		a.scheduler.release(key)
		return err
	}
	a.group.Go(func() { a.runClaimed(ctx, s, v, run) })
	return nil
}

// runClaimed does a run that was claimed, and lets the retention follow it.
func (a *Agent) runClaimed(ctx context.Context, s catalog.Schedule, v *vm, run catalog.ScheduleRun) {
	rec, begun := a.runOnce(ctx, s, v, run)
	a.scheduler.release(pendingKey{s.ID, v.id})
	if !begun || a.retention(s.Spec).None() {
		return
	}
	if rec, err := a.ops.Wait(ctx, rec.ID); err == nil && rec.State == op.Succeeded {
		a.expire(ctx, s, v)
	}
}

// resumeRuns goes on with the runs that an earlier agent had decided on. Their
// request ids see to it that none begins twice.
func (a *Agent) resumeRuns(ctx context.Context) {
	due, err := a.catalog.ScheduleRuns(ctx, catalog.RunFilter{State: catalog.RunDue})
	if err != nil {
		a.log.Error("runs that were due cannot be read", "error", err)
		return
	}
	for _, run := range due {
		s, err := a.catalog.Schedule(ctx, run.Schedule)
		if err != nil {
			a.log.Error("a run that was due is left", "error", err)
			continue
		}
		a.mu.RLock()
		v := a.vms[run.VMID]
		a.mu.RUnlock()
		switch {
		case v == nil:
		case s.Spec.Missed == schedule.Skip && a.clock().Sub(run.Time.Add(runJitter(s, v.id))) > schedule.Grace:
			run.Message = "vmsnapd was stopped"
			a.skipRun(ctx, s, v, run, event.Warning)
		case a.scheduler.claim(pendingKey{s.ID, run.VMID}, run.Time.Add(runJitter(s, v.id))):
			a.group.Go(func() { a.runClaimed(ctx, s, v, run) })
		}
	}
}

// runOnce begins the snapshot of a run, when the VM is free, and records what
// became of it. A run that a stop of the agent finds waiting goes on with the
// next agent.
func (a *Agent) runOnce(ctx context.Context, s catalog.Schedule, v *vm, run catalog.ScheduleRun) (rec op.Record, begun bool) {
	rec, err := a.beginRun(ctx, s, v, run)
	if err != nil {
		if ctx.Err() == nil {
			severity := event.Error
			if fault.Of(err) == fault.Busy {
				severity = event.Warning
			}
			run.Message = err.Error()
			a.skipRun(ctx, s, v, run, severity)
		}
		return rec, false
	}
	run.State, run.Operation = catalog.RunBegun, rec.ID
	a.observeRun(s, v, run, true)
	log := a.log.With("schedule", s.Name, "vm", v.name())
	log.Info("a run has begun", "time", run.Time, "operation", rec.ID)
	if err := a.catalog.EndScheduleRun(context.WithoutCancel(ctx), run); err != nil {
		log.Error("a run is not recorded", "error", err)
	}
	return rec, true
}

// skipRun records that a run does not take place.
func (a *Agent) skipRun(ctx context.Context, s catalog.Schedule, v *vm, run catalog.ScheduleRun, severity event.Severity) {
	log := a.log.With("schedule", s.Name, "vm", v.name())
	log.Warn("a run is skipped", "time", run.Time, "because", run.Message)
	run.State = catalog.RunSkipped
	a.observeRun(s, v, run, false)
	ctx = context.WithoutCancel(ctx)
	err := a.catalog.Update(ctx, func(tx *catalog.Tx) error {
		return errors.Join(tx.EndScheduleRun(ctx, run), tx.AddEvent(ctx, skippedEvent(s, v, run, severity)))
	})
	if err != nil {
		log.Error("a skipped run is not recorded", "error", err)
	}
}

// observeRun tells the metrics what became of a run, and how late it was.
func (a *Agent) observeRun(s catalog.Schedule, v *vm, run catalog.ScheduleRun, begun bool) {
	if a.cfg.OnRun != nil {
		a.cfg.OnRun(begun, max(a.clock().Sub(run.Time.Add(runJitter(s, v.id))), 0))
	}
}

// beginRun begins the snapshot of a run. If the VM is busy it waits, as the
// schedule wants it, until the next run is due.
func (a *Agent) beginRun(ctx context.Context, s catalog.Schedule, v *vm, run catalog.ScheduleRun) (op.Record, error) {
	req, err := runRequest(s, v, run)
	if err != nil {
		return op.Record{}, err
	}
	for {
		rec, err := a.create(ctx, req)
		var busy *op.BusyError
		if err == nil || !errors.As(err, &busy) || s.Spec.Overlap == catalog.OverlapSkip {
			return rec, err
		}
		a.log.Info("a run waits", "schedule", s.Name, "vm", v.name(), "operation", busy.Operation)
		if _, waited := a.ops.Wait(ctx, busy.Operation); ctx.Err() != nil || waited != nil && fault.Of(waited) != fault.NotFound {
			return rec, errors.Join(err, waited)
		}
	}
}

// runRequest is the snapshot that a run takes.
func runRequest(s catalog.Schedule, v *vm, run catalog.ScheduleRun) (SnapshotRequest, error) {
	var req SnapshotRequest
	if err := json.Unmarshal(s.Spec.Snapshot, &req); err != nil {
		return req, fmt.Errorf("the options of schedule %s: %w", s.Name, err)
	}
	template, err := schedule.ParseTemplate(s.Spec.Name)
	if err != nil {
		return req, err
	}
	rule, err := s.Spec.Timing.Rule()
	if err != nil {
		return req, err
	}
	req.VM, req.UID = v.id, s.UID
	req.Name = template.Name(schedule.Naming{VM: v.name(), Schedule: s.Name, Time: run.Time.In(rule.Zone())})
	req.RequestID = fmt.Sprintf("schedule %s %s %d", s.ID, v.id, run.Time.Unix())
	return req, nil
}

func missedEvent(s catalog.Schedule, v *vm, d schedule.Decision) event.Event {
	message := fmt.Sprintf("schedule %s: %d runs were missed and are let go", s.Name, d.Missed)
	if d.Late {
		message = fmt.Sprintf("schedule %s: the run of %s is caught up", s.Name, d.Run.UTC().Format(time.DateTime+" UTC"))
		if d.Missed > 0 {
			message += fmt.Sprintf(", %d before it are let go", d.Missed)
		}
	}
	return event.Event{Kind: event.ScheduleMissed, Severity: event.Warning, VMID: v.id, VMName: v.name(), Schedule: s.Name, Message: message}
}

func skippedEvent(s catalog.Schedule, v *vm, run catalog.ScheduleRun, severity event.Severity) event.Event {
	return event.Event{
		Kind: event.ScheduleSkipped, Severity: severity, VMID: v.id, VMName: v.name(), Schedule: s.Name,
		Message: fmt.Sprintf("schedule %s: the run of %s is skipped: %s", s.Name, run.Time.UTC().Format(time.DateTime+" UTC"), run.Message),
	}
}
