package monitor

import (
	"context"
	"encoding/json"
	"sync/atomic"
	"time"

	"github.com/digitalocean/go-qemu/qmp"
)

// An Event is something that QEMU reported of its own accord.
type Event struct {
	Name      string          // such as "BLOCK_JOB_COMPLETED"
	Timestamp time.Time       // QEMU's host time to the microsecond; zero if it had none
	Data      json.RawMessage // nil for events without data; shared by all subscribers, do not modify
}

// Decode unmarshals the event's data. Without data it leaves v as it is.
func (e Event) Decode(v any) error {
	if len(e.Data) == 0 {
		return nil
	}
	if err := json.Unmarshal(e.Data, v); err != nil {
		return &OpError{Op: "event " + e.Name, Err: err}
	}
	return nil
}

// A Subscription receives events. An event that arrives while its buffer is
// full is dropped and counted: after Lost has risen, ask QEMU.
type Subscription struct {
	// C delivers the events, in QEMU's order. It is closed by Close and by the
	// end of the session.
	C <-chan Event

	c       chan Event
	names   map[string]bool // nil for all
	lost    atomic.Uint64
	session *Session
}

// Subscribe delivers events from now on: all of them, or those of the given
// names. The buffer holds at least one event. On an ended session C is closed
// from the start.
func (s *Session) Subscribe(buffer int, names ...string) *Subscription {
	c := make(chan Event, max(buffer, 1))
	sub := &Subscription{C: c, c: c, session: s}
	if len(names) > 0 {
		sub.names = make(map[string]bool, len(names))
		for _, n := range names {
			sub.names[n] = true
		}
	}
	s.subMu.Lock()
	defer s.subMu.Unlock()
	if s.subs == nil {
		close(c)
		return sub
	}
	s.subs[sub] = struct{}{}
	return sub
}

// Lost returns how many events were dropped for want of room.
func (sub *Subscription) Lost() uint64 { return sub.lost.Load() }

// Close ends the subscription and closes C. It may be called more than once.
func (sub *Subscription) Close() {
	s := sub.session
	s.subMu.Lock()
	defer s.subMu.Unlock()
	if _, ok := s.subs[sub]; ok {
		delete(s.subs, sub)
		close(sub.c)
	}
}

// publish hands an event to the subscribers without ever waiting for one.
func (s *Session) publish(m *message) {
	s.subMu.Lock()
	defer s.subMu.Unlock()
	if len(s.subs) == 0 {
		return
	}
	e := Event{Name: m.Event, Data: m.Data}
	// Seconds are -1 when QEMU could not read the clock (QMP specification).
	if m.Timestamp.Seconds > 0 {
		e.Timestamp = time.Unix(m.Timestamp.Seconds, m.Timestamp.Microseconds*1000)
	}
	for sub := range s.subs {
		if sub.names != nil && !sub.names[e.Name] {
			continue
		}
		select {
		case sub.c <- e:
		default:
			sub.lost.Add(1)
		}
	}
}

// endSubscriptions closes every subscription's channel and refuses new ones.
func (s *Session) endSubscriptions() {
	s.subMu.Lock()
	defer s.subMu.Unlock()
	for sub := range s.subs {
		close(sub.c)
	}
	s.subs = nil
}

// eventsBuffer is the room of a subscription made through qmp.Monitor, whose
// consumers cannot choose it.
const eventsBuffer = 256

// Events implements qmp.Monitor. The channel is closed when the context or the
// session ends. Subscribe also tells of events that were dropped.
func (s *Session) Events(ctx context.Context) (<-chan qmp.Event, error) {
	if err := s.Err(); err != nil {
		return nil, err
	}
	sub := s.Subscribe(eventsBuffer)
	out := make(chan qmp.Event)
	go func() {
		defer close(out)
		defer context.AfterFunc(ctx, sub.Close)()
		defer sub.Close()
		for e := range sub.C {
			q := qmp.Event{Event: e.Name}
			if !e.Timestamp.IsZero() {
				q.Timestamp.Seconds = e.Timestamp.Unix()
				q.Timestamp.Microseconds = int64(e.Timestamp.Nanosecond() / 1000)
			}
			if err := e.Decode(&q.Data); err != nil {
				continue // data that is no object has no place in qmp.Event
			}
			select {
			case out <- q:
			case <-ctx.Done():
				return
			case <-s.done:
				return
			}
		}
	}()
	return out, nil
}
