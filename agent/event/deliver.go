package event

import (
	"context"
	"errors"
	"time"

	"github.com/hashicorp/go-hclog"
)

// Source is where events are kept.
type Source interface {
	Events(ctx context.Context, f Filter) ([]Event, error)
	EventBounds(ctx context.Context) (Bounds, error)
	// EventsAdded returns a channel that is closed when events have been added
	// since the call.
	EventsAdded() <-chan struct{}
	SinkPosition(ctx context.Context, sink string) (seq uint64, known bool, err error)
	SetSinkPosition(ctx context.Context, sink string, seq uint64) error
}

// Sink passes events on.
type Sink interface {
	// Name is under which its position is kept.
	Name() string
	// Send passes one event on. An error that is ErrRefused is final for this
	// event; after any other it is sent again.
	Send(ctx context.Context, e Event) error
}

// ErrRefused means that a sink will not take an event, however often it is sent.
var ErrRefused = errors.New("the event was refused")

// The time limits of delivering.
const (
	// retryFirst is the wait after a first failure; each further one doubles it …
	retryFirst = time.Second
	// … up to this: a receiver that was away for hours gets what it missed
	// within minutes of its return.
	retryLast = 5 * time.Minute
)

// page is how many events are read at once.
const page = 100

// Deliver sends the events of a source to a sink, each at least once and in
// their order, until ctx ends. A sink that was never used before begins with
// the next event.
func Deliver(ctx context.Context, source Source, sink Sink, log hclog.Logger) {
	d := &delivery{source: source, sink: sink, log: log.With("sink", sink.Name())}
	for ctx.Err() == nil {
		added := source.EventsAdded()
		n, err := d.round(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			d.log.Error("events cannot be read", "error", err)
			d.pause(ctx)
		case n == 0:
			d.wait = 0
			select {
			case <-added:
			case <-ctx.Done():
			}
		}
	}
}

// delivery is what Deliver knows.
type delivery struct {
	source Source
	sink   Sink
	log    hclog.Logger
	begun  bool
	last   uint64        // the last event that was passed on
	wait   time.Duration // before the next attempt; 0 while all goes well
}

// round sends the events that there are, up to a page of them.
func (d *delivery) round(ctx context.Context) (int, error) {
	bounds, err := d.source.EventBounds(ctx)
	if err != nil {
		return 0, err
	}
	if err := d.begin(ctx, bounds); err != nil {
		return 0, err
	}
	if d.last > bounds.Last {
		d.log.Warn("the events are not those of before: beginning with the next one", "position", d.last, "newest", bounds.Last)
		d.last = bounds.Last
	}
	if d.last+1 < bounds.First {
		d.log.Warn("events have left the history before they could be sent", "from", d.last+1, "to", bounds.First-1)
	}
	events, err := d.source.Events(ctx, Filter{Since: d.last, Limit: page})
	if err != nil {
		return 0, err
	}
	for _, e := range events {
		if !d.send(ctx, e) {
			return 0, ctx.Err()
		}
		d.last = e.Seq
		if err := d.source.SetSinkPosition(ctx, d.sink.Name(), e.Seq); err != nil {
			d.log.Warn("the position is not recorded: events may be sent twice", "error", err)
		}
	}
	return len(events), nil
}

// begin finds out where to begin.
func (d *delivery) begin(ctx context.Context, bounds Bounds) error {
	if d.begun {
		return nil
	}
	last, known, err := d.source.SinkPosition(ctx, d.sink.Name())
	if err != nil {
		return err
	}
	if !known {
		last = bounds.Last
		if err := d.source.SetSinkPosition(ctx, d.sink.Name(), last); err != nil {
			return err
		}
	}
	d.last, d.begun = last, true
	return nil
}

// send sends one event until it is taken or refused. It returns false when ctx
// has ended before.
func (d *delivery) send(ctx context.Context, e Event) bool {
	for {
		err := d.sink.Send(ctx, e)
		switch {
		case ctx.Err() != nil:
			return false
		case err == nil:
			if d.wait > 0 {
				d.log.Info("events are sent again", "seq", e.Seq)
			}
			d.wait = 0
			return true
		case errors.Is(err, ErrRefused):
			d.log.Error("an event is left out", "seq", e.Seq, "error", err)
			return true
		}
		if d.wait == 0 {
			d.log.Warn("an event cannot be sent; it is tried again", "seq", e.Seq, "error", err)
		}
		d.pause(ctx)
		if ctx.Err() != nil {
			return false
		}
	}
}

// pause waits before the next attempt, longer each time.
func (d *delivery) pause(ctx context.Context) {
	d.wait = min(max(2*d.wait, retryFirst), retryLast)
	timer := time.NewTimer(d.wait)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
