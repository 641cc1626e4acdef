package op

import (
	"context"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// Pausable says that the recipe looks at Rests. Nobody can pause an operation
// before. One that was paused when its daemon ended is paused still.
func (o *Op) Pausable() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.pausable = true
}

// Rests reports whether the operation is to rest, and returns a channel that is
// closed when something about the operation changes, this included.
func (o *Op) Rests() (rests bool, changed <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.rec.Paused || o.yields, o.changed
}

// Yield makes the operation rest, or go on, for a reason of its own. It is not
// shown as paused.
func (o *Op) Yield(rests bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.yields != rests {
		o.yields = rests
		o.wake()
	}
}

// Pause asks an operation to rest until GoOn, and returns without waiting for
// that. It fails with fault.Unsupported when its kind cannot, and with
// fault.TooLate when it has ended. A second pause changes nothing.
func (r *Runner) Pause(ctx context.Context, id string) (Record, error) { return r.rest(ctx, id, true) }

// GoOn lets an operation go on that rests. One that does not is let be.
func (r *Runner) GoOn(ctx context.Context, id string) (Record, error) { return r.rest(ctx, id, false) }

func (r *Runner) rest(ctx context.Context, id string, paused bool) (Record, error) {
	if o := r.live(id); o != nil {
		return o.rest(paused)
	}
	rec, err := r.store.Operation(ctx, id)
	if err != nil {
		return Record{}, err
	}
	if rec.State.Final() {
		return rec, fault.New(fault.TooLate, "operation %s has ended: %s", id, rec.State)
	}
	return rec, abandoned(rec)
}

func (o *Op) rest(paused bool) (Record, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case o.rec.State.Final():
		return o.rec.clone(), fault.New(fault.TooLate, "operation %s has ended: %s", o.id, o.rec.State)
	case o.rec.Paused == paused:
		return o.rec.clone(), nil
	case paused && !o.pausable:
		return o.rec.clone(), fault.New(fault.Unsupported, "operation %s cannot be paused: nothing of the kind %s can that has come this far", o.id, o.rec.Kind)
	case paused && o.cancelled != nil:
		return o.rec.clone(), fault.New(fault.TooLate, "operation %s is being cancelled", o.id)
	}
	o.rec.Paused = paused
	o.tell()
	return o.rec.clone(), nil
}
