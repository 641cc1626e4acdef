package op

import (
	"context"
	"iter"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// Watch returns the operation as it is now and then each time it changes, up to
// its end. A reader that is slow, and progress that is fast, get the latest
// state and miss those in between; the final one is never missed. An error is
// the last thing returned: fault.NotFound, the end of ctx, or that nobody runs
// the operation.
func (r *Runner) Watch(ctx context.Context, id string) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		o := r.live(id)
		if o == nil {
			r.watchStored(ctx, id, yield)
			return
		}
		for {
			rec, changed := o.look()
			if !yield(rec, nil) || rec.State.Final() {
				return
			}
			select {
			case <-changed:
			case <-o.done:
				if rec, _ = o.look(); rec.State.Final() {
					yield(rec, nil)
				} else {
					yield(rec, abandoned(rec)) // left to the next daemon
				}
				return
			case <-ctx.Done():
				yield(rec, context.Cause(ctx))
				return
			}
		}
	}
}

// watchStored returns an operation that does not run.
func (r *Runner) watchStored(ctx context.Context, id string, yield func(Record, error) bool) {
	rec, err := r.store.Operation(ctx, id)
	if err != nil {
		yield(Record{}, err)
		return
	}
	if yield(rec, nil) && !rec.State.Final() {
		yield(rec, abandoned(rec))
	}
}

// Wait returns an operation once it has ended. When ctx ends first, it returns
// the operation as it is then, with an error.
func (r *Runner) Wait(ctx context.Context, id string) (Record, error) {
	var last Record
	for rec, err := range r.Watch(ctx, id) {
		if err != nil {
			return rec, err
		}
		last = rec
	}
	return last, nil
}

// look returns the record and a channel that is closed at the next change.
func (o *Op) look() (Record, <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.rec.clone(), o.changed
}

// abandoned returns the error for an operation that has not ended and that
// nobody runs.
func abandoned(rec Record) error {
	return fault.New(fault.Failed, "operation %s is %s but does not run: vmsnapd stopped in the middle of it and has not recovered it yet", rec.ID, rec.State)
}
