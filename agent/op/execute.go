package op

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// errEnded is the cause of the end of a recipe's context after its return.
var errEnded = errors.New("the operation has ended")

// ErrLeave is what a recipe returns that cannot come to an end before the daemon
// does. The operation stays unfinished in the store, and nothing is reverted, so
// that the next daemon takes it over. It goes on holding its VM.
var ErrLeave = errors.New("the operation is left to the next daemon")

// launch runs the recipe, from the durable start to the durable end.
func (o *Op) launch(ctx context.Context, recipe Recipe) {
	ctx, abort := context.WithCancelCause(context.WithoutCancel(ctx))
	o.mu.Lock()
	o.abort = abort
	o.mu.Unlock()
	go func() {
		defer close(o.done)
		defer abort(errEnded)
		err := o.awaitTurn(ctx)
		if err == nil {
			err = o.begin(ctx)
		}
		if err == nil {
			err = guarded(o, func() error { return recipe(ctx, o) })
		}
		o.end(ctx, err)
	}()
}

// Cleanup pushes what is to be done just before the operation ends, or is left
// to the next daemon: after the reverts, which may need what it releases, and
// also when there is nothing to revert. The last one comes first.
func (o *Op) Cleanup(f func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.cleanups = append(o.cleanups, f)
}

// OnFailure sets what is called when the operation has failed or was cancelled,
// and all that could be reverted is. It is not called for an operation that is
// left to the next daemon. f bounds its own time.
func (o *Op) OnFailure(f func(ctx context.Context, why Failure)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.failed = f
}

// tellFailed calls what OnFailure has set.
func (o *Op) tellFailed(ctx context.Context, why Failure) {
	o.mu.Lock()
	f := o.failed
	o.mu.Unlock()
	if f == nil {
		return
	}
	// A panic is logged, and the operation ends as it would have.
	_ = guarded(o, func() error { f(context.WithoutCancel(ctx), why); return nil })
}

func (o *Op) cleanUp() {
	o.mu.Lock()
	cleanups := o.cleanups
	o.cleanups = nil
	o.mu.Unlock()
	for _, f := range slices.Backward(cleanups) {
		f()
	}
}

// endsBefore waits for the operation or for ctx, and reports whether the
// operation has ended.
func (o *Op) endsBefore(ctx context.Context) bool {
	select {
	case <-o.done:
		return true
	case <-ctx.Done():
	}
	select { // both may be so
	case <-o.done:
		return true
	default:
		return false
	}
}

// takeOver turns a record that a crash left unfinished into a running one.
func (o *Op) takeOver() {
	o.mu.Lock()
	defer o.mu.Unlock()
	rec := &o.rec
	o.recovered = true
	o.tooLate = "it was interrupted and is being recovered"
	o.wasAsked = rec.State == Cancelling ||
		rec.State == Reverting && rec.Failure != nil && rec.Failure.Kind == fault.Cancelled
	rec.Failure = nil
	for i := range rec.Steps {
		if s := &rec.Steps[i]; s.Ended.IsZero() {
			s.Ended, s.Error = now(), "interrupted"
		}
	}
	o.ended = uint64(len(rec.Steps))
}

// begin makes the operation running, durably and then visibly.
func (o *Op) begin(ctx context.Context) error {
	o.saving.Lock()
	defer o.saving.Unlock()
	e := eventRun
	if o.recovered {
		e = eventResume
	}
	rec := o.record()
	if rec.State != Cancelling || o.recovered {
		rec.State = must(next(rec.State, e))
	}
	if rec.Started.IsZero() {
		rec.Started = now()
	}
	rec.Revision++
	if err := o.write(ctx, rec); err != nil && !o.recovered {
		return fmt.Errorf("record the start of the operation: %w", err)
	}
	if err := o.show(rec); err != nil {
		return err
	}
	o.log.Info("operation runs", "kind", rec.Kind, "uid", rec.UID, "resumed", o.recovered)
	return nil
}

// show makes the recorded start visible, unless a cancel came in between.
func (o *Op) show(started Record) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.cancelled != nil {
		return o.cancelled
	}
	o.rec.State, o.rec.Started = started.State, started.Started
	o.tell()
	return nil
}

// end reverts what a failed recipe left behind and makes the end durable and
// then visible.
func (o *Op) end(ctx context.Context, err error) {
	if err == nil {
		o.cleanUp()
		o.close(ctx, eventSucceed, nil)
		return
	}
	if errors.Is(err, ErrLeave) {
		o.cleanUp()
		o.leave()
		return
	}
	failure, e := failureOf(err), eventFail
	if o.gaveIn(err) {
		failure.Kind, e = fault.Cancelled, eventStop
	} else if failure.Kind == fault.Cancelled {
		failure.Kind = fault.Failed // nobody cancelled it
	}
	undone := o.revertAll(ctx, *failure)
	if errors.Is(undone, ErrLeave) {
		o.cleanUp()
		o.leave()
		return
	}
	if undone != nil {
		failure.Message += "; reverting failed: " + oneLine(undone)
		if e == eventStop {
			// Something of it is left, so it must not pass for cancelled.
			failure.Kind, e = fault.Failed, eventFail
		}
	}
	o.cleanUp()
	o.tellFailed(ctx, *failure)
	o.close(ctx, e, failure)
}

// leave keeps the operation as it is in the store: unfinished, with its journal.
func (o *Op) leave() {
	o.save.stop()
	o.publish.stop()
	o.saving.Lock() // what is being written is the last
	defer o.saving.Unlock()
	o.runner.forget(o)
	o.log.Warn("the operation is left to the next daemon")
}

// leavesAtStop reports whether the recipe notices a stop by itself.
func (o *Op) leavesAtStop() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.leaves
}

// gaveIn reports whether err is the recipe's way to say that it noticed the
// cancel.
func (o *Op) gaveIn(err error) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.cancelled == nil && !o.wasAsked {
		return false
	}
	return errors.Is(err, context.Canceled) || fault.Of(err) == fault.Cancelled ||
		o.cancelled != nil && errors.Is(err, o.cancelled)
}

// close ends the operation: recorded first, then the VM freed, then seen.
func (o *Op) close(ctx context.Context, e event, failure *Failure) {
	o.mu.Lock()
	o.tooLate = "it is ending"
	rec := o.rec.clone()
	o.mu.Unlock()
	o.save.stop()
	o.publish.stop()

	o.saving.Lock()
	defer o.saving.Unlock()
	rec.State = must(next(rec.State, e))
	rec.Paused = false
	rec.Failure = failure
	rec.Ended = now()
	rec.Revision++
	err := o.write(ctx, rec)
	if err != nil {
		rec.Warnings = append(rec.Warnings, Warning{
			Code:    "end-not-recorded",
			Message: "the end of the operation could not be recorded: " + err.Error(),
		})
	}
	o.runner.free(o)
	o.mu.Lock()
	o.rec = rec
	o.reverts = nil
	o.unsaved = err != nil
	o.wake()
	o.mu.Unlock()
	o.logEnd(rec)
	if err == nil {
		o.runner.forget(o) // Shutdown does not wait for it from here on
	}
}

func (o *Op) logEnd(rec Record) {
	args := []any{"kind", rec.Kind, "state", rec.State, "took", rec.Ended.Sub(rec.Created)}
	if rec.Failure != nil {
		args = append(args, "reason", rec.Failure.Kind, "error", rec.Failure.Message)
	}
	if rec.State == Failed {
		o.log.Error("operation ended", args...)
		return
	}
	o.log.Info("operation ended", args...)
}

// saveNow writes the record in the background.
func (o *Op) saveNow() {
	o.saving.Lock()
	defer o.saving.Unlock()
	rec := o.record()
	if rec.State.Final() {
		return
	}
	// A failure is logged; the next change is written with the record anyway.
	_ = o.write(context.Background(), rec)
}

// write writes a record. The caller holds o.saving.
func (o *Op) write(ctx context.Context, rec Record) error {
	ctx, done := detach(ctx, storeTimeout)
	defer done()
	err := o.runner.store.UpdateOperation(ctx, rec)
	if err != nil {
		o.log.Error("operation was not recorded", "state", rec.State, "error", err)
	}
	return err
}

// guarded calls f and turns a panic into an error, its stack into a log line.
func guarded(o *Op, f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			o.log.Error("panic", "panic", p, "stack", string(debug.Stack()))
			err = fmt.Errorf("internal error: %v", p)
		}
	}()
	return f()
}

// failureOf describes an error.
func failureOf(err error) *Failure {
	return &Failure{Kind: fault.Of(err), Message: err.Error(), Hint: fault.Hint(err)}
}

// must returns a state that the order of calls guarantees.
func must(s State, err error) State {
	if err != nil {
		panic(err)
	}
	return s
}
