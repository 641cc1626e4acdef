package agent

import (
	"context"
	"fmt"
	"iter"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/event"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/freeze"
)

// What is kept of the events unless it is configured otherwise.
const (
	DefaultEventKeep   = 100_000
	DefaultEventMaxAge = 90 * 24 * time.Hour
	EventsSpared       = 1000 // of the last, however old they seem: the clock may have jumped
)

// pruneInterval is how often events that are too old or too many are forgotten.
const pruneInterval = 10 * time.Minute

// EventPage is how many events a list has unless another number is asked for.
const EventPage = 100

// EventFilter chooses events.
type EventFilter struct {
	VM        string // name, UUID or id, also of a VM that was forgotten
	Kinds     []event.Kind
	Severity  event.Severity // at least; all when empty
	Operation string
	Schedule  string
	Since     *uint64   // those with a greater number; nil: for a list all, for a watch those to come
	After     time.Time // those at or after it
	Visible   Visible
	Limit     int // 0: EventPage
}

// EventList is a page of events, the newest first.
type EventList struct {
	Events []event.Event
	Bounds event.Bounds // which ones are kept
}

// EventGap says that events were forgotten before they could be shown.
type EventGap struct{ From, To uint64 }

// EventNews is what a watch yields: that it stands (it misses nothing from here
// on), that events are missing before the next, or an event.
type EventNews struct {
	Stands bool
	Gap    *EventGap
	Event  event.Event
}

// Events returns the newest events that the filter lets through.
func (a *Agent) Events(ctx context.Context, f EventFilter) (EventList, error) {
	filter, err := a.eventFilter(ctx, f)
	if err != nil {
		return EventList{}, err
	}
	if f.Since != nil {
		filter.Since = *f.Since
	}
	filter.Newest = true
	if filter.Limit = f.Limit; filter.Limit == 0 {
		filter.Limit = EventPage
	}
	var list EventList
	if list.Bounds, err = a.catalog.EventBounds(ctx); err != nil {
		return EventList{}, err
	}
	list.Events, err = a.catalog.Events(ctx, filter)
	return list, err
}

// eventFilter finds out which VM is meant.
func (a *Agent) eventFilter(ctx context.Context, f EventFilter) (event.Filter, error) {
	filter := event.Filter{Kinds: f.Kinds, Severity: f.Severity, Operation: f.Operation, Schedule: f.Schedule, After: f.After}
	if may := f.Visible; may != nil {
		filter.Visible = func(e event.Event) bool { return may(e.VMID, e.VMName) }
	}
	if f.VM == "" {
		return filter, nil
	}
	v, err := a.find(f.VM)
	if err == nil {
		filter.VMID = v.id
		return filter, nil
	}
	if fault.Of(err) != fault.NotFound {
		return filter, err
	}
	filter.VMName = f.VM
	if known, asked := a.catalog.Events(ctx, event.Filter{VMName: f.VM, Limit: 1}); asked != nil || len(known) > 0 {
		return filter, asked
	}
	return filter, err
}

// watchPage is how many events a watch reads at once.
const watchPage = 500

// WatchEvents yields the events after a number as they come, each once and in
// order. Where some of them have been forgotten, it says so and goes on. It ends
// with ctx, or with an error.
func (a *Agent) WatchEvents(ctx context.Context, f EventFilter) iter.Seq2[EventNews, error] {
	return func(yield func(EventNews, error) bool) {
		filter, err := a.eventFilter(ctx, f)
		if err == nil {
			filter.Since, err = a.watchFrom(ctx, f.Since)
		}
		if err == nil && !yield(EventNews{Stands: true}, nil) {
			return
		}
		filter.Limit = watchPage
		for err == nil {
			added := a.catalog.EventsAdded()
			var news []EventNews
			if news, err = a.eventsAfter(ctx, &filter); err != nil {
				break
			}
			for _, n := range news {
				if !yield(n, nil) {
					return
				}
			}
			if len(news) > 0 {
				continue
			}
			select {
			case <-added:
			case <-ctx.Done():
				err = ctx.Err()
			}
		}
		if ctx.Err() != nil { // also when it came while the catalog was read
			err = context.Cause(ctx)
		}
		yield(EventNews{}, err)
	}
}

// watchFrom returns the number to begin after.
func (a *Agent) watchFrom(ctx context.Context, since *uint64) (uint64, error) {
	bounds, err := a.catalog.EventBounds(ctx)
	switch {
	case err != nil:
		return 0, err
	case since == nil:
		return bounds.Last, nil
	case *since > bounds.Last:
		return 0, fault.New(fault.Usage, "there is no event %d yet: the newest is %d", *since, bounds.Last).
			WithHint("the number is from another host, or the state directory was made anew; begin with 0")
	default:
		return *since, nil
	}
}

// eventsAfter returns what comes after filter.Since, and moves it on. What is
// forgotten while it reads shows as a gap the next time.
func (a *Agent) eventsAfter(ctx context.Context, filter *event.Filter) ([]EventNews, error) {
	var news []EventNews
	before, err := a.catalog.EventBounds(ctx)
	if err != nil {
		return nil, err
	}
	if filter.Since+1 < before.First {
		news = append(news, EventNews{Gap: &EventGap{filter.Since + 1, before.First - 1}})
		filter.Since = before.First - 1
	}
	events, err := a.catalog.Events(ctx, *filter)
	if err != nil {
		return nil, err
	}
	after, err := a.catalog.EventBounds(ctx)
	if err != nil || after.First > filter.Since+1 {
		return news, err // read again, with the gap
	}
	for _, e := range events {
		news = append(news, EventNews{Event: e})
	}
	// All up to before.Last were there to be read, also those that the filter
	// leaves out.
	filter.Since = max(filter.Since, before.Last)
	if n := len(events); n > 0 && (n == filter.Limit || events[n-1].Seq > before.Last) {
		filter.Since = events[n-1].Seq
	}
	return news, nil
}

// keepEvents forgets events that are too old or too many, and passes them on to
// the sinks.
func (a *Agent) keepEvents(ctx context.Context) {
	for _, sink := range a.cfg.Sinks {
		a.group.Go(func() { event.Deliver(ctx, a.catalog, sink, a.log.Named("event")) })
	}
	keep, age := a.cfg.EventKeep, a.cfg.EventMaxAge
	if keep == 0 {
		keep = DefaultEventKeep
	}
	if age == 0 {
		age = DefaultEventMaxAge
	}
	regularly := time.NewTicker(pruneInterval)
	defer regularly.Stop()
	for {
		if err := a.catalog.PruneEvents(ctx, keep, EventsSpared, time.Now().Add(-age)); err != nil && ctx.Err() == nil {
			a.log.Warn("old events are kept", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-regularly.C:
		}
	}
}

// tellRun records that a QEMU process was found, unless it has run since before
// an earlier agent saw it.
func (a *Agent) tellRun(before catalog.VM, known bool, rec catalog.VM, p discover.Process) {
	e := event.Event{Severity: event.Info, VMID: rec.ID, VMName: rec.Name}
	if !known {
		e.Kind, e.Message = event.VMFound, "seen for the first time"
		a.news.tell(e)
	} else if p.Started.Before(before.LastSeen) {
		return
	}
	e.Kind, e.Message = event.VMStarted, fmt.Sprintf("QEMU runs (pid %d)", p.PID)
	if p.Cgroup.Unit != "" {
		e.Message = fmt.Sprintf("QEMU runs (pid %d, %s)", p.PID, p.Cgroup.Unit)
	}
	a.news.tell(e)
}

// tellStop records that a QEMU process has exited.
func (a *Agent) tellStop(rec catalog.VM, pid int, how string) {
	a.news.tell(event.Event{
		Kind: event.VMStopped, Severity: event.Info, VMID: rec.ID, VMName: rec.Name, Result: how,
		Message: fmt.Sprintf("QEMU has exited (pid %d): %s", pid, how),
	})
}

// frozenEvent is that of a guest that was frozen.
func frozenEvent(v *vm, f FreezeView) event.Event {
	return event.Event{
		Time: f.Since, Kind: event.GuestFrozen, Severity: event.Info, VMID: v.id, VMName: v.name(), Operation: f.Operation,
		Message: fmt.Sprintf("%d of %d file systems are frozen", f.Frozen, f.Total),
	}
}

// tellFrozen records a freeze that an operator holds. That of a snapshot is
// recorded with its thaw: while the guest stands still, nothing is written.
func (a *Agent) tellFrozen(v *vm, f FreezeView, h *held) {
	if h != nil {
		a.news.tell(frozenEvent(v, f))
	}
}

// tellThawed records the end of a freeze, before it is taken off the VM.
func (a *Agent) tellThawed(v *vm, thaw error) {
	v.mu.Lock()
	f, h := v.freeze, v.held
	v.mu.Unlock()
	e := event.Event{Kind: event.GuestThawed, Severity: event.Info, VMID: v.id, VMName: v.name(), Message: "thawed"}
	if f != nil {
		e.Operation = f.Operation
		e.Message = fmt.Sprintf("thawed after %s", time.Since(f.Since).Round(time.Millisecond))
		if h == nil && !f.Unresolved {
			a.news.tell(frozenEvent(v, *f))
		}
	}
	switch {
	case thaw != nil:
		e.Kind, e.Severity = event.ThawUnresolved, event.Error
		e.Message = "the guest may be frozen still: " + thaw.Error()
	case f == nil:
		return // it was never frozen
	}
	a.news.tell(e)
}

// tellLeftover records what became of a freeze that an earlier agent left.
func (a *Agent) tellLeftover(r freeze.Recovered) {
	q := r.Lease.Request
	e := event.Event{
		Kind: event.GuestThawed, Severity: event.Warning, VMID: q.VMID, VMName: q.VM, Operation: q.Operation,
		Result: string(r.Outcome.End), Message: "a freeze that an earlier vmsnapd left behind has ended: " + string(r.Outcome.End),
	}
	if !r.Resolved() {
		e.Kind, e.Severity = event.ThawUnresolved, event.Error
		e.Message = "the guest may be frozen still, by an earlier vmsnapd"
		if r.Err != nil {
			e.Message += ": " + r.Err.Error()
		}
	}
	a.news.tell(e)
}

// deleteVM forgets a VM, and records that.
func (a *Agent) deleteVM(ctx context.Context, v *vm) error {
	return a.catalog.Update(ctx, func(tx *catalog.Tx) error {
		if err := tx.DeleteVM(ctx, v.id); err != nil {
			return err
		}
		return tx.AddEvent(ctx, event.Event{
			Kind: event.VMForgotten, Severity: event.Info, VMID: v.id, VMName: v.name(), UID: event.Actor(ctx),
			Message: "the records of the VM and of its snapshots were removed",
		})
	})
}

// rename gives a snapshot another name, and records that.
func (a *Agent) rename(ctx context.Context, s catalog.Snapshot, newName string) error {
	return a.catalog.Update(ctx, func(tx *catalog.Tx) error {
		if err := tx.RenameSnapshot(ctx, s.ID, newName); err != nil {
			return err
		}
		return tx.AddEvent(ctx, event.Event{
			Kind: event.SnapshotRenamed, Severity: event.Info, VMID: s.VMID, VMName: s.VMName, Snapshot: s.ID, UID: event.Actor(ctx),
			Message: fmt.Sprintf("snapshot %s is now %s", s.Name, newName),
		})
	})
}
