package rpctest

import (
	"context"
	"iter"
	"slices"
	"sync"
	"time"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/event"
	"github.com/vmsnap/vmsnap/agent/fault"
)

// events are those of a Backend. The first one that is kept may be later than
// the first one that there was.
type events struct {
	mu      sync.Mutex
	all     []event.Event
	first   uint64
	changed chan struct{}
}

// AddEvent adds an event with the next number, and tells those who watch.
func (b *Backend) AddEvent(e event.Event) {
	b.events.mu.Lock()
	defer b.events.mu.Unlock()
	e.Seq = uint64(len(b.events.all)) + 1
	b.events.all = append(b.events.all, e)
	if b.events.changed != nil {
		close(b.events.changed)
		b.events.changed = nil
	}
}

// ForgetEvents forgets the events before a number.
func (b *Backend) ForgetEvents(first uint64) {
	b.events.mu.Lock()
	defer b.events.mu.Unlock()
	b.events.first = first
}

// after returns the events after a number that a filter lets through, which
// ones are kept, and what is closed when there are more.
func (s *events) after(since uint64, f agent.EventFilter) ([]event.Event, event.Bounds, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.changed == nil {
		s.changed = make(chan struct{})
	}
	bounds := event.Bounds{First: max(s.first, 1), Last: uint64(len(s.all))}
	var out []event.Event
	for _, e := range s.all {
		if e.Seq > since && e.Seq >= bounds.First && passes(e, f) {
			out = append(out, e)
		}
	}
	return out, bounds, s.changed
}

func passes(e event.Event, f agent.EventFilter) bool {
	return (f.Visible == nil || f.Visible(e.VMID, e.VMName)) &&
		(f.VM == "" || f.VM == e.VMName || f.VM == e.VMID) &&
		(len(f.Kinds) == 0 || slices.Contains(f.Kinds, e.Kind)) &&
		slices.Index(event.Severities, e.Severity) >= slices.Index(event.Severities, f.Severity) &&
		(f.Operation == "" || f.Operation == e.Operation) && (f.Schedule == "" || f.Schedule == e.Schedule) &&
		!e.Time.Before(f.After)
}

// Events returns the events that were added, the newest first.
func (b *Backend) Events(_ context.Context, f agent.EventFilter) (agent.EventList, error) {
	var since uint64
	if f.Since != nil {
		since = *f.Since
	}
	all, bounds, _ := b.events.after(since, f)
	slices.Reverse(all)
	if f.Limit > 0 && len(all) > f.Limit {
		all = all[:f.Limit]
	}
	return agent.EventList{Events: all, Bounds: bounds}, nil
}

// WatchEvents yields the events after a number, and those that are added.
func (b *Backend) WatchEvents(ctx context.Context, f agent.EventFilter) iter.Seq2[agent.EventNews, error] {
	return func(yield func(agent.EventNews, error) bool) {
		_, bounds, _ := b.events.after(0, f)
		since := bounds.Last
		if f.Since != nil {
			since = *f.Since
		}
		if since > bounds.Last {
			yield(agent.EventNews{}, fault.New(fault.Usage, "there is no event %d yet: the newest is %d", since, bounds.Last))
			return
		}
		if !yield(agent.EventNews{Stands: true}, nil) {
			return
		}
		for {
			all, bounds, changed := b.events.after(since, f)
			if since+1 < bounds.First && !yield(agent.EventNews{Gap: &agent.EventGap{From: since + 1, To: bounds.First - 1}}, nil) {
				return
			}
			for _, e := range all {
				if !yield(agent.EventNews{Event: e}, nil) {
					return
				}
			}
			since = max(since, bounds.Last)
			select {
			case <-changed:
			case <-ctx.Done():
				yield(agent.EventNews{}, ctx.Err())
				return
			}
		}
	}
}

// sampleEvents are the events of Sample.
func sampleEvents(b *Backend) {
	uid := uint32(1000)
	web := event.Event{VMID: "5f0c1a2b", VMName: "web", Severity: event.Info}
	at := func(ago time.Duration, kind event.Kind, change func(*event.Event)) {
		e := web
		e.Time, e.Kind = Now.Add(-ago), kind
		change(&e)
		b.AddEvent(e)
	}
	at(26*time.Hour, event.AgentStarted, func(e *event.Event) { e.VMID, e.VMName, e.Message = "", "", "vmsnapd serves requests" })
	at(25*time.Hour, event.VMStarted, func(e *event.Event) { e.Message = "QEMU runs (pid 4711)" })
	at(3*time.Hour, event.OperationBegan, func(e *event.Event) {
		e.Operation, e.UID, e.Message = "c0ffee01", &uid, "snapshot began"
	})
	at(3*time.Hour, event.OperationWarning, func(e *event.Event) {
		e.Operation, e.UID, e.Severity, e.Disk, e.Code = "c0ffee01", &uid, event.Warning, "data", "disk-excluded"
		e.Message = "it is not in the snapshot"
	})
	at(3*time.Hour-time.Second, event.OperationEnded, func(e *event.Event) {
		e.Operation, e.UID, e.Snapshot, e.Result, e.Message = "c0ffee01", &uid, "1d0f5a3c", "succeeded", "snapshot succeeded"
	})
	at(time.Hour, event.OperationEnded, func(e *event.Event) {
		e.VMID, e.VMName, e.Operation, e.UID, e.Severity = "77777777", "legacy", "c0ffee02", &uid, event.Error
		e.Code, e.Result, e.Message = "unresponsive", "failed", "snapshot failed: VM legacy: its monitor does not answer"
	})
}
