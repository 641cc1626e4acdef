package op

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// Op is a running operation as its recipe sees it.
type Op struct {
	runner *Runner
	id     string
	vmID   string
	turn   *turn // nil: it runs without
	log    hclog.Logger

	done    chan struct{} // closed when it has ended
	save    *throttle     // writes the record in the background
	publish *throttle     // tells watchers of progress
	saving  sync.Mutex    // held over each write, so that the end is the last

	mu        sync.Mutex
	rec       Record
	changed   chan struct{} // closed and replaced when watchers should look
	abort     context.CancelCauseFunc
	cancelled error  // why it was cancelled; nil when it was not
	tooLate   string // why a cancel comes too late; empty when it does not
	recovered bool   // it was taken over by recovery
	wasAsked  bool   // a cancel was acknowledged before it was taken over
	leaves    bool   // a stop of the daemon does not cancel it
	pausable  bool   // the recipe looks at whether it is paused
	yields    bool   // it rests for a reason of its own
	unsaved   bool   // it has ended and the store does not know
	reverts   []reversion
	cleanups  []func()
	failed    func(context.Context, Failure) // may be nil
	plan      uint64                         // steps announced; 0 when not announced
	ended     uint64                         // steps that have ended
	meter     meter
}

func newOp(r *Runner, rec Record) *Op {
	o := &Op{
		runner:  r,
		id:      rec.ID,
		vmID:    rec.VMID,
		log:     r.log.With("operation", rec.ID, "vm", rec.VMName),
		done:    make(chan struct{}),
		rec:     rec,
		changed: make(chan struct{}),
	}
	o.save = newThrottle(saveInterval, o.saveNow)
	o.publish = newThrottle(publishInterval, o.publishNow)
	return o
}

// ID returns the operation's id: eight hexadecimal digits.
func (o *Op) ID() string { return o.id }

// Logger returns a logger whose lines carry the operation and the VM.
func (o *Op) Logger() hclog.Logger { return o.log }

// Plan announces the number of steps. The progress then counts them, unless a
// step reports a progress of its own while it runs.
func (o *Op) Plan(steps int) {
	o.change(func(rec *Record) {
		o.plan = uint64(max(steps, 0))
		o.countSteps(rec)
	})
}

// countSteps makes the progress that of the steps. The caller holds o.mu.
func (o *Op) countSteps(rec *Record) {
	if o.plan > 0 {
		rec.Progress = Progress{Done: min(o.ended, o.plan), Total: o.plan, Unit: "steps"}
	}
}

// Step runs one named part of the operation and records its times and how it
// went. It does not start when the operation was cancelled. It returns the error
// of f as it is.
func (o *Op) Step(ctx context.Context, name string, f func(ctx context.Context) error) error {
	if err := o.proceed(ctx); err != nil {
		return err
	}
	return o.StepInAnyCase(ctx, name, f)
}

// StepInAnyCase is Step for what is owed also when the operation was cancelled
// or has failed. The caller gives it a context that has not ended.
func (o *Op) StepInAnyCase(ctx context.Context, name string, f func(ctx context.Context) error) error {
	var index int
	started := time.Now()
	o.change(func(rec *Record) {
		index = len(rec.Steps)
		rec.Steps = append(rec.Steps, Step{Name: name, Started: now()})
	})
	err := fmt.Errorf("step %s did not return", name) // what stands when f panics
	defer func() { o.endStep(index, name, time.Since(started), err) }()
	err = f(ctx)
	return err
}

// Output records what a program has printed that the newest step ran.
func (o *Op) Output(text string) {
	o.change(func(rec *Record) {
		if n := len(rec.Steps); n > 0 {
			rec.Steps[n-1].Output = text
		}
	})
}

// proceed returns why no further step may start, or nil.
func (o *Op) proceed(ctx context.Context) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.cancelled != nil && o.rec.State == Cancelling {
		return o.cancelled
	}
	return context.Cause(ctx)
}

func (o *Op) endStep(index int, name string, took time.Duration, err error) {
	o.change(func(rec *Record) {
		rec.Steps[index].Ended = now()
		if err != nil {
			rec.Steps[index].Error = err.Error()
		}
		o.ended++
		o.countSteps(rec)
	})
	if err != nil {
		o.log.Warn("step failed", "step", name, "took", took, "error", err)
		return
	}
	o.log.Info("step", "step", name, "took", took)
}

// Journal records an intent. It is durable when Journal returns nil; a cancel
// does not abort it. The kind and the data are the recipe's and recovery's own.
func (o *Op) Journal(ctx context.Context, kind string, data any) error {
	b, err := json.Marshal(data)
	if err != nil {
		return fmt.Errorf("journal %s: %w", kind, err)
	}
	ctx, done := detach(ctx, storeTimeout)
	defer done()
	if _, err := o.runner.store.AppendJournal(ctx, o.id, kind, b); err != nil {
		return fmt.Errorf("journal %s: %w", kind, err)
	}
	return nil
}

// Warn records something that the caller should know.
func (o *Op) Warn(w Warning) {
	known := false // from another attempt at the same
	o.change(func(rec *Record) {
		if known = slices.Contains(rec.Warnings, w); !known {
			rec.Warnings = append(rec.Warnings, w)
		}
	})
	if !known {
		o.log.Warn(w.Message, "code", w.Code, "disk", w.Disk)
	}
}

// SetPartial records that not everything that was asked for was done.
func (o *Op) SetPartial() { o.change(func(rec *Record) { rec.Partial = true }) }

// SetSnapshot records the id of the snapshot that the operation makes.
func (o *Op) SetSnapshot(id string) { o.change(func(rec *Record) { rec.Snapshot = id }) }

// Progress reports how far the running step is, in total units, 0 when their
// number is unknown. It is cheap: report as often as you like. The rate and the
// time left are measured over the last seconds. When the step ends, the progress
// is that of the steps again, if they were announced.
func (o *Op) Progress(done, total uint64, unit string) { o.ProgressOfPass(0, done, total, unit) }

// ProgressOfPass is Progress for work that goes over the same again: what was
// done in one pass may have to be done again in the next. Passes count from 1.
func (o *Op) ProgressOfPass(pass int, done, total uint64, unit string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.rec.State.Final() {
		return
	}
	o.rec.Progress = o.meter.progress(time.Now(), done, total, unit)
	o.rec.Progress.Pass = pass
	o.rec.Revision++
	o.publish.touch()
}

// PointOfNoReturn asks whether the operation may do what cannot be cancelled
// any more. When a cancel was acknowledged before, it returns that as an error,
// and the recipe must return it. Else from here on Cancel answers fault.TooLate
// and does not cancel the recipe's context. The reverts stay; see DropReverts.
func (o *Op) PointOfNoReturn() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.cancelled != nil {
		return o.cancelled
	}
	o.tooLate = "it is past the point of no return"
	return nil
}

// LeaveAtStop says that the recipe watches for the daemon's stop by itself, and
// returns ErrLeave then: a stop does not cancel the operation.
func (o *Op) LeaveAtStop() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.leaves = true
}

// LetCancel lets an operation that was taken over be cancelled, as it could be
// before. Its recipe sees to what that means.
func (o *Op) LetCancel() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.tooLate = ""
}

// cancel acknowledges a cancel.
func (o *Op) cancel(reason string) (Record, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.cancelled != nil && !o.rec.State.Final() {
		return o.rec.clone(), nil
	}
	state, err := next(o.rec.State, eventCancel)
	switch {
	case o.rec.State.Final():
		return o.rec.clone(), tooLate(o.id, "it has ended: "+string(o.rec.State))
	case o.tooLate != "":
		return o.rec.clone(), tooLate(o.id, o.tooLate)
	case err != nil:
		return o.rec.clone(), tooLate(o.id, "it has failed and is being reverted")
	}
	message := fmt.Sprintf("operation %s was cancelled", o.id)
	if reason != "" {
		message += ": " + reason
	}
	o.cancelled = fault.New(fault.Cancelled, "%s", message)
	o.rec.State, o.rec.Paused = state, false
	o.tell()
	o.abort(o.cancelled)
	return o.rec.clone(), nil
}

// tooLate returns the error for a cancel that changes nothing any more.
func tooLate(id, why string) error {
	return fault.New(fault.TooLate, "operation %s cannot be cancelled: %s", id, why)
}

// change changes the record and tells everyone. What a stray goroutine reports
// after the end is dropped.
func (o *Op) change(f func(rec *Record)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.rec.State.Final() {
		return
	}
	f(&o.rec)
	o.tell()
}

// tell counts a change, wakes watchers and has the record written in a while.
// The caller holds o.mu.
func (o *Op) tell() {
	o.rec.Revision++
	o.wake()
	o.save.touch()
}

// wake has watchers look. The caller holds o.mu.
func (o *Op) wake() {
	close(o.changed)
	o.changed = make(chan struct{})
}

func (o *Op) publishNow() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.rec.State.Final() {
		o.wake()
		o.save.touch()
	}
}

// unrecorded returns the record of an operation whose end the store refused.
func (o *Op) unrecorded() (Record, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.rec.clone(), o.unsaved
}

// record returns a copy of the record.
func (o *Op) record() Record {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.rec.clone()
}
