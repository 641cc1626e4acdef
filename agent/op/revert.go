package op

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// reversion undoes one effect.
type reversion struct {
	what string
	f    func(ctx context.Context) error
	long bool // it has no deadline
}

// Revert pushes what undoes an effect: "delete overlay node". When the recipe
// fails, the reverts run, the last one first, each with a deadline of its own on
// a context that a cancel does not end; one that fails does not keep the others
// from running. f must heed its context and must accept that the effect never
// came about.
func (o *Op) Revert(what string, f func(ctx context.Context) error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.reverts = append(o.reverts, reversion{what: what, f: f})
}

// RevertAtLength is Revert for what moves data: it has no deadline, and reports
// its progress. f may return ErrLeave, which leaves it, and what would be
// reverted after it, to the next daemon.
func (o *Op) RevertAtLength(what string, f func(ctx context.Context) error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.reverts = append(o.reverts, reversion{what: what, f: f, long: true})
}

// DropReverts forgets all reverts: what was done stays.
func (o *Op) DropReverts() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.reverts = nil
}

// revertAll runs the reverts and returns their errors, joined. The state says so
// only when there are any.
func (o *Op) revertAll(ctx context.Context, why Failure) error {
	r, ok := o.popRevert()
	if !ok {
		return nil
	}
	o.change(func(rec *Record) {
		rec.State = must(next(rec.State, eventRevert))
		rec.Failure = &why
	})
	var errs []error
	for ; ok; r, ok = o.popRevert() {
		err := o.revertOne(ctx, r)
		if errors.Is(err, ErrLeave) {
			return err
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", r.what, err))
		}
	}
	return errors.Join(errs...)
}

func (o *Op) revertOne(ctx context.Context, r reversion) error {
	if r.long {
		ctx = context.WithoutCancel(ctx)
	} else {
		var done context.CancelFunc
		ctx, done = detach(ctx, o.runner.revertTimeout)
		defer done()
	}
	err := guarded(o, func() error { return r.f(ctx) })
	if err != nil && !errors.Is(err, ErrLeave) {
		o.log.Error("revert failed", "revert", r.what, "error", err)
	}
	if err != nil {
		return err
	}
	o.log.Info("reverted", "revert", r.what)
	return nil
}

// popRevert returns the newest revert.
func (o *Op) popRevert() (reversion, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	last := len(o.reverts) - 1
	if last < 0 {
		return reversion{}, false
	}
	r := o.reverts[last]
	o.reverts = o.reverts[:last]
	return r, true
}

// oneLine renders joined errors for a message.
func oneLine(err error) string {
	return strings.ReplaceAll(err.Error(), "\n", "; ")
}
