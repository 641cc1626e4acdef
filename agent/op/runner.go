package op

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// The time limits of this package.
const (
	// storeTimeout bounds a write that a cancel must not abort. A write is one
	// fsync; half a minute is that of a disk on its way out.
	storeTimeout = 30 * time.Second
	// defaultRevertTimeout bounds one revert: a few commands to QEMU or the
	// guest, each with a deadline of its own.
	defaultRevertTimeout = 30 * time.Second
	// saveInterval is the least time between two writes in the background.
	saveInterval = time.Second
	// publishInterval is the least time between two changes of the progress
	// alone that watchers are told of.
	publishInterval = 250 * time.Millisecond
)

// Recipe does the work of an operation and tells o about it. ctx is cancelled,
// with a cause of the kind fault.Cancelled, when the operation is. A recipe that
// has returned must not leave goroutines behind that still do its work.
type Recipe func(ctx context.Context, o *Op) error

// Spec says what to start.
type Spec struct {
	Kind      Kind
	VMID      string // held while the operation runs; empty for work on no VM
	VMName    string
	Request   any    // recorded as JSON
	RequestID string // the caller's idempotency key; may be empty
	UID       uint32 // who asks; request ids are per user

	Light   bool     // it costs the host next to nothing, and never waits for its turn
	Storage []string // file systems and devices that it loads
}

// Runner runs operations, at most one at a time on each VM, and no more at a time
// than its limits let.
type Runner struct {
	store         Store
	log           hclog.Logger
	revertTimeout time.Duration
	newID         func() string

	starts chan struct{} // holds a token while an operation is being recorded

	mu       sync.Mutex
	stopping bool
	ops      map[string]*Op // by id: those that run, and those whose end is not recorded
	byVM     map[string]*Op // by VM id: those that run, or wait for their turn
	queue    queue
}

// Option changes how a Runner works.
type Option func(*Runner)

// RevertTimeout sets the deadline of each revert. It is half a minute by default.
func RevertTimeout(d time.Duration) Option {
	return func(r *Runner) { r.revertTimeout = d }
}

// NewRunner returns a runner that keeps its operations in store.
func NewRunner(store Store, logger hclog.Logger, opts ...Option) *Runner {
	r := &Runner{
		store:         store,
		log:           logger,
		revertTimeout: defaultRevertTimeout,
		newID:         newID,
		starts:        make(chan struct{}, 1),
		ops:           make(map[string]*Op),
		byVM:          make(map[string]*Op),
	}
	for _, o := range opts {
		o(r)
	}
	return r
}

// Start records an operation and runs its recipe. It returns once the operation
// is durable; the recipe runs on, with the values of ctx but not its end.
//
// While another operation holds the VM it fails with fault.Busy, whose cause is
// a *BusyError. When the user has given the request id before, for the same
// kind, VM and request, it returns that operation and runs nothing; with other
// arguments it fails with fault.Usage.
func (r *Runner) Start(ctx context.Context, spec Spec, recipe Recipe) (Record, error) {
	request, err := json.Marshal(spec.Request)
	if err != nil {
		return Record{}, fault.New(fault.Usage, "encode the request: %w", err)
	}
	select {
	case r.starts <- struct{}{}:
		defer func() { <-r.starts }()
	case <-ctx.Done():
		return Record{}, context.Cause(ctx)
	}
	if rec, ok, err := r.replay(ctx, spec, request); ok || err != nil {
		return rec, err
	}
	if err := r.admit(spec.VMID, spec.VMName); err != nil {
		return Record{}, err
	}
	if err := r.saveEnds(ctx); err != nil {
		return Record{}, fmt.Errorf("record the end of an earlier operation: %w", err)
	}
	rec, err := r.create(ctx, spec, request)
	if err != nil {
		return Record{}, err
	}
	o, err := r.take(rec, spec)
	if err != nil {
		return Record{}, r.reject(ctx, rec, err)
	}
	rec = o.record()
	o.launch(ctx, recipe)
	return rec, nil
}

// replay returns the operation that the request id stands for.
func (r *Runner) replay(ctx context.Context, spec Spec, request json.RawMessage) (Record, bool, error) {
	if spec.RequestID == "" {
		return Record{}, false, nil
	}
	first, ok, err := r.store.OperationByRequest(ctx, spec.UID, spec.RequestID)
	if err != nil {
		return Record{}, false, fmt.Errorf("look up request id %q: %w", spec.RequestID, err)
	}
	if !ok {
		return Record{}, false, nil
	}
	if first.Kind != spec.Kind || first.VMID != spec.VMID || !sameJSON(first.Request, request) {
		return Record{}, false, fault.New(fault.Usage,
			"request id %q was used before, for %s operation %s with other arguments", spec.RequestID, first.Kind, first.ID).
			WithHint("use a new request id for a new request")
	}
	rec, err := r.Operation(ctx, first.ID)
	return rec, err == nil, err
}

// admit says whether an operation may start on a VM.
func (r *Runner) admit(vmID, vmName string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.admitLocked(vmID, vmName)
}

func (r *Runner) admitLocked(vmID, vmName string) error {
	if r.stopping {
		return fault.New(fault.Busy, "vmsnapd is stopping").WithHint("try again when it has started")
	}
	if holder := r.byVM[vmID]; holder != nil {
		return busy(vmName, holder.ID())
	}
	return nil
}

// create records a new operation. A write whose outcome is in doubt is settled
// by asking the store.
func (r *Runner) create(ctx context.Context, spec Spec, request json.RawMessage) (Record, error) {
	ctx, done := detach(ctx, storeTimeout)
	defer done()
	id, err := r.freeID(ctx)
	if err != nil {
		return Record{}, err
	}
	rec := Record{
		ID: id, Kind: spec.Kind, VMID: spec.VMID, VMName: spec.VMName,
		State: Queued, Request: request, RequestID: spec.RequestID, UID: spec.UID,
		Created: now(), Revision: 1,
	}
	if err := r.store.CreateOperation(ctx, rec); err != nil {
		if _, found := r.store.Operation(ctx, id); found != nil {
			return Record{}, fmt.Errorf("record the operation: %w", err)
		}
		r.log.Warn("operation was recorded in spite of an error", "operation", id, "error", err)
	}
	return rec, nil
}

// freeID returns an id that no operation has.
func (r *Runner) freeID(ctx context.Context) (string, error) {
	for {
		id := r.newID()
		_, err := r.store.Operation(ctx, id)
		switch {
		case err == nil:
		case fault.Of(err) == fault.NotFound:
			return id, nil
		default:
			return "", fmt.Errorf("choose an operation id: %w", err)
		}
	}
}

// take makes an operation out of a record, holds its VM for it, and has it wait
// for its turn.
func (r *Runner) take(rec Record, spec Spec) (*Op, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.admitLocked(rec.VMID, rec.VMName); err != nil {
		return nil, err
	}
	o := newOp(r, rec)
	r.ops[rec.ID] = o
	if rec.VMID != "" {
		r.byVM[rec.VMID] = o
	}
	if o.turn = newTurn(spec); o.turn != nil {
		r.queue.enter(o)
	}
	return o, nil
}

// reject ends an operation that was recorded and then found no way to run.
func (r *Runner) reject(ctx context.Context, rec Record, cause error) error {
	rec.State, rec.Failure, rec.Ended = Failed, failureOf(cause), now()
	rec.Revision++
	ctx, done := detach(ctx, storeTimeout)
	defer done()
	return errors.Join(cause, r.store.UpdateOperation(ctx, rec))
}

// Resume takes over an unfinished operation that a daemon which is gone left in
// the store, and runs a recovery recipe under its id. It cannot be cancelled,
// and the recipe runs even when the store fails. When the recipe returns nil
// the operation has succeeded, else it failed, or was cancelled if a cancel had
// been acknowledged before and the recipe returns an error of that kind.
func (r *Runner) Resume(rec Record, recipe Recipe) error {
	r.starts <- struct{}{}
	defer func() { <-r.starts }()
	if _, err := next(rec.State, eventResume); err != nil {
		return fault.New(fault.Usage, "resume operation %s: %w", rec.ID, err)
	}
	if r.live(rec.ID) != nil {
		return fault.New(fault.Usage, "resume operation %s: it runs already", rec.ID)
	}
	o, err := r.take(rec.clone(), Spec{Light: true})
	if err != nil {
		return fmt.Errorf("resume operation %s: %w", rec.ID, err)
	}
	o.takeOver()
	o.launch(context.Background(), recipe)
	return nil
}

// Running returns the id of the operation that holds a VM.
func (r *Runner) Running(vmID string) (id string, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	o := r.byVM[vmID]
	if o == nil {
		return "", false
	}
	return o.ID(), true
}

// Operation returns what is known of an operation now, or fault.NotFound.
func (r *Runner) Operation(ctx context.Context, id string) (Record, error) {
	if o := r.live(id); o != nil {
		return o.record(), nil
	}
	return r.store.Operation(ctx, id)
}

// Operations returns the operations that the filter lets through as they are
// now, newest first.
func (r *Runner) Operations(ctx context.Context, f Filter) ([]Record, error) {
	// Looked up before the store is asked, so that an operation that ends in
	// between is shown ended and not as the store last heard of it.
	r.mu.Lock()
	live := maps.Clone(r.ops)
	r.mu.Unlock()
	recs, err := r.store.Operations(ctx, f)
	if err != nil {
		return nil, err
	}
	for i, rec := range recs {
		if o := live[rec.ID]; o != nil {
			recs[i] = o.record()
		}
	}
	if f.Active {
		recs = slices.DeleteFunc(recs, func(rec Record) bool { return rec.State.Final() })
	}
	return recs, nil
}

// Cancel asks an operation to stop and returns without waiting for it. It fails
// with fault.TooLate when the operation is past its point of no return, is
// being reverted after a failure, or has ended. A second cancel changes nothing.
func (r *Runner) Cancel(ctx context.Context, id string) (Record, error) {
	if o := r.live(id); o != nil {
		return o.cancel("")
	}
	rec, err := r.store.Operation(ctx, id)
	if err != nil {
		return Record{}, err
	}
	if rec.State.Final() {
		return rec, tooLate(id, "it has ended: "+string(rec.State))
	}
	return rec, abandoned(rec)
}

// Shutdown ends all work: it lets no operation start, leaves those that wait for
// their turn to the next daemon, cancels those that are not past their point of no return, and waits until all have ended. When ctx
// ends first it fails and names those that still run; they stay unfinished in
// the store.
func (r *Runner) Shutdown(ctx context.Context) error {
	r.mu.Lock()
	r.stopping = true
	waiting := slices.Clone(r.queue.waiting)
	r.dismiss()
	ops := slices.Collect(maps.Values(r.ops))
	r.mu.Unlock()
	for _, o := range ops {
		if slices.Contains(waiting, o) || o.leavesAtStop() {
			continue
		}
		if _, err := o.cancel("vmsnapd is stopping"); err != nil {
			o.log.Info("waiting for the operation to end", "because", err)
		}
	}
	var left []string
	for _, o := range ops {
		if !o.endsBefore(ctx) {
			left = append(left, o.ID())
		}
	}
	if len(left) > 0 {
		slices.Sort(left)
		return fault.New(fault.Busy, "operations still run: %s: %w", strings.Join(left, ", "), context.Cause(ctx))
	}
	return r.saveEnds(ctx)
}

// saveEnds records the ends that the store refused when they came.
func (r *Runner) saveEnds(ctx context.Context) error {
	r.mu.Lock()
	ops := slices.Collect(maps.Values(r.ops))
	r.mu.Unlock()
	var errs []error
	for _, o := range ops {
		rec, unsaved := o.unrecorded()
		if !unsaved {
			continue
		}
		if err := r.store.UpdateOperation(ctx, rec); err != nil {
			errs = append(errs, fmt.Errorf("operation %s: %w", rec.ID, err))
			continue
		}
		r.forget(o)
	}
	return errors.Join(errs...)
}

// live returns an operation that runs or whose end is not recorded, or nil.
func (r *Runner) live(id string) *Op {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.ops[id]
}

// free lets go of the operation's VM.
func (r *Runner) free(o *Op) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.byVM[o.vmID] == o {
		delete(r.byVM, o.vmID)
	}
	r.queue.end(o)
}

// forget drops an operation whose end is recorded.
func (r *Runner) forget(o *Op) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.ops, o.id)
}

// newID returns eight random hexadecimal digits.
func newID() string {
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails: it ends the program instead
	return hex.EncodeToString(b[:])
}

// detach returns a context with the values of ctx, an end of its own, and no
// other.
func detach(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), d)
}

// now is the present as it is recorded: UTC, without a monotonic reading.
func now() time.Time { return time.Now().UTC().Round(0) }
