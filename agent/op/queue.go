package op

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// Limits bound how many operations run at the same time. 0 is no limit. Light
// operations, and those that are resumed, run at once and are not counted.
type Limits struct {
	Operations int
	PerStorage int // that load the same file system or device
}

// Limit sets the limits of a Runner.
func Limit(l Limits) Option {
	return func(r *Runner) { r.queue.limits = l }
}

// Place says where an operation stands that waits for its turn.
type Place struct {
	Position int    // from 1; 0 when it does not wait
	Reason   string // what it waits for
}

// queue decides whose turn it is. It is guarded by the Runner's mu.
//
// Operations have their turn in the order in which they came, but for two
// things. An operation whose storage is at its limit lets others pass that load
// none of its storage, and nobody else, so that it does not starve. And a VM
// that has several waiting has one turn a round: a newcomer does not wait for
// all of them.
type queue struct {
	limits  Limits
	waiting []*Op
	running int
	loaded  map[string]int    // running operations by storage
	round   uint64            // of the last turn
	rounds  map[string]uint64 // of the last operation that came, by VM
}

// turn is what the queue keeps of an operation. A nil one runs without.
type turn struct {
	vm      string
	storage []string
	round   uint64
	begun   bool          // it is counted
	come    chan struct{} // closed when its turn has come
	left    chan struct{} // closed when it is left to the next daemon
}

func newTurn(spec Spec) *turn {
	if spec.Light {
		return nil
	}
	storage := slices.Clone(spec.Storage)
	slices.Sort(storage)
	return &turn{
		vm: cmp.Or(spec.VMID, spec.VMName), storage: slices.Compact(storage),
		come: make(chan struct{}), left: make(chan struct{}),
	}
}

// enter puts an operation into the queue.
func (q *queue) enter(o *Op) {
	t := o.turn
	if q.rounds == nil || len(q.waiting) == 0 {
		q.rounds = map[string]uint64{}
	}
	t.round = max(q.round, q.rounds[t.vm]) + 1
	q.rounds[t.vm] = t.round
	at := len(q.waiting)
	for at > 0 && q.waiting[at-1].turn.round > t.round {
		at--
	}
	q.waiting = slices.Insert(q.waiting, at, o)
	q.move()
}

// leave takes an operation out, if it still waits.
func (q *queue) leave(o *Op) {
	if at := slices.Index(q.waiting, o); at >= 0 {
		q.waiting = slices.Delete(q.waiting, at, at+1)
		o.stand(Place{})
		q.move()
	}
}

// end gives back what an operation has taken.
func (q *queue) end(o *Op) {
	t := o.turn
	if t == nil || !t.begun {
		return
	}
	t.begun = false
	q.running--
	for _, s := range t.storage {
		if q.loaded[s]--; q.loaded[s] == 0 {
			delete(q.loaded, s)
		}
	}
	q.move()
}

// move lets those begin whose turn it is, and tells the others where they stand.
func (q *queue) move() {
	wanted := map[string]bool{} // by those that stand before
	var waiting []*Op
	for _, o := range q.waiting {
		reason := q.full(o.turn, wanted)
		if reason == "" {
			q.begin(o.turn)
			o.stand(Place{})
			continue
		}
		for _, s := range o.turn.storage {
			wanted[s] = true
		}
		waiting = append(waiting, o)
		o.stand(Place{Position: len(waiting), Reason: reason})
	}
	q.waiting = waiting
}

// full says what keeps an operation from running, or returns nothing.
func (q *queue) full(t *turn, wanted map[string]bool) string {
	if q.limits.Operations > 0 && q.running >= q.limits.Operations {
		return fmt.Sprintf("%d operations run, as many as max-operations lets", q.running)
	}
	if q.limits.PerStorage == 0 {
		return ""
	}
	for _, s := range t.storage {
		if n := q.loaded[s]; n >= q.limits.PerStorage {
			return fmt.Sprintf("%d operations run on %s, as many as max-operations-per-storage lets", n, s)
		}
		if wanted[s] {
			return fmt.Sprintf("another waits before it for %s", s)
		}
	}
	return ""
}

func (q *queue) begin(t *turn) {
	t.begun = true
	q.round = max(q.round, t.round)
	q.running++
	for _, s := range t.storage {
		if q.loaded == nil {
			q.loaded = map[string]int{}
		}
		q.loaded[s]++
	}
	close(t.come)
}

// stand shows where the operation stands. It is not stored: the next daemon has
// a queue of its own.
func (o *Op) stand(at Place) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.rec.Queue == at || o.rec.State.Final() {
		return
	}
	o.rec.Queue = at
	o.rec.Revision++
	o.wake()
}

// awaitTurn returns when the operation may run, or the reason why it never will.
func (o *Op) awaitTurn(ctx context.Context) error {
	if o.turn == nil {
		return nil
	}
	select {
	case <-o.turn.come:
		return nil
	case <-o.turn.left:
		return ErrLeave
	case <-ctx.Done():
	}
	r := o.runner
	r.mu.Lock()
	defer r.mu.Unlock()
	r.queue.leave(o) // else its turn came at the same moment, and is given back at its end
	return context.Cause(ctx)
}

// dismiss empties the queue: those that wait are left to the next daemon. The
// caller holds r.mu.
func (r *Runner) dismiss() {
	for _, o := range r.queue.waiting {
		close(o.turn.left)
	}
	r.queue.waiting = nil
}

// Requeue takes over an operation that a daemon which is gone left before it
// began, and puts it into the queue again. Those that are requeued in the order
// of their Created keep it. spec says what it loads; the rest is the record's.
func (r *Runner) Requeue(ctx context.Context, rec Record, spec Spec, recipe Recipe) error {
	r.starts <- struct{}{}
	defer func() { <-r.starts }()
	if rec.State != Queued || !rec.Started.IsZero() {
		return fault.New(fault.Usage, "requeue operation %s: it is %s", rec.ID, rec.State)
	}
	o, err := r.take(rec.clone(), spec)
	if err != nil {
		return fmt.Errorf("requeue operation %s: %w", rec.ID, err)
	}
	o.launch(ctx, recipe)
	return nil
}
