package freeze

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// Guard is the agent's handle on a guard process. It is made by Start.
type Guard struct {
	hello
	cfg     Config
	log     hclog.Logger
	cmd     *exec.Cmd
	pipe    *pipe
	process Process
	ready   readiness

	frozen     chan report // the answer to Freeze, at most one
	thawed     chan report // the answer to Thaw, at most one
	unresolved chan struct{}
	done       chan struct{}
	outcome    Outcome // final once done is closed

	mu       sync.Mutex
	froze    bool // Freeze was called
	alarmed  bool // unresolved is closed
	replaced int  // how many guards were lost before this one
}

func newGuard(cfg Config, h hello, cmd *exec.Cmd, p *pipe) *Guard {
	return &Guard{
		hello: h, cfg: cfg, cmd: cmd, pipe: p,
		log:        cfg.logger().With("vm", h.Request.VM, "operation", h.Request.Operation, "lease", h.ID),
		frozen:     make(chan report, 1),
		thawed:     make(chan report, 1),
		unresolved: make(chan struct{}),
		done:       make(chan struct{}),
	}
}

// Filesystems returns what the guest had mounted when the guard was started. It
// is empty if the guest agent does not tell.
func (g *Guard) Filesystems() []Filesystem { return slices.Clone(g.ready.Filesystems) }

// LeaseID names the lease, its file and the guard's scope.
func (g *Guard) LeaseID() string { return g.ID }

// Process returns the guard process.
func (g *Guard) Process() Process { return g.process }

// Scope returns the systemd scope that the guard runs in, or why it has none;
// without one it ends together with the agent's control group.
func (g *Guard) Scope() (name, none string) { return g.ready.Scope, g.ready.NoScope }

// Freeze freezes the guest. It fails with ErrFreezeTimeout, ErrNothingFrozen,
// ErrAlreadyFrozen, ErrLease, ErrAborted, ErrGuard, a *qga.CommandError or an
// error of package qga. On every error but ErrAlreadyFrozen the guard makes
// sure by itself that the guest is thawed; until Done it may not be. Cancelling
// the context abandons the freeze.
func (g *Guard) Freeze(ctx context.Context) (Frozen, error) {
	answer, err := g.freeze(ctx)
	if err != nil {
		return Frozen{}, &Error{VM: g.Request.VM, Step: "freeze", Err: err}
	}
	return answer, nil
}

func (g *Guard) freeze(ctx context.Context) (Frozen, error) {
	if err := g.spend(); err != nil {
		return Frozen{}, err
	}
	if err := g.pipe.write(orderFreeze, sendTimeout); err != nil {
		return Frozen{}, fmt.Errorf("%w: %w", ErrGuard, err)
	}
	limit := syncTimeout + leaseTimeout + g.Request.FreezeTimeout + statusTimeout + guardGrace
	hung := time.NewTimer(limit)
	defer hung.Stop()
	select {
	case r := <-g.frozen:
		time.AfterFunc(g.Request.Lease+overdue, g.endIfHung)
		return frozenIn(r)
	case <-g.done:
		return g.died()
	case <-hung.C:
		g.kill()
		return Frozen{}, fmt.Errorf("%w: no answer within %s", ErrGuard, limit)
	case <-ctx.Done():
		g.orderThaw()
		return Frozen{}, fmt.Errorf("%w: %w", ErrAborted, context.Cause(ctx))
	}
}

// spend makes sure that a guard serves one freeze.
func (g *Guard) spend() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.froze {
		return ErrUsed
	}
	g.froze = true
	return nil
}

func frozenIn(r report) (Frozen, error) {
	switch {
	case r.Err != nil:
		return Frozen{}, r.Err
	case r.Frozen == nil:
		return Frozen{}, fmt.Errorf("%w: an empty answer", ErrGuard)
	}
	return *r.Frozen, nil
}

// Thaw thaws the guest. It returns without an error if and only if the freeze
// is over: the guest has answered thawed, or its QEMU has ended. Whether it had
// lasted until then is Thawed.Verified; it had not if the lease has ended
// before. ErrUnresolved means that attempts go on.
func (g *Guard) Thaw(ctx context.Context) (Thawed, error) {
	answer, err := g.thaw(ctx)
	if err != nil {
		return Thawed{}, &Error{VM: g.Request.VM, Step: "thaw", Err: err}
	}
	return answer, nil
}

func (g *Guard) thaw(ctx context.Context) (Thawed, error) {
	g.orderThaw()
	limit := 2*statusTimeout + thawTimeout + guardGrace
	hung := time.NewTimer(limit)
	defer hung.Stop()
	select {
	case r := <-g.thawed:
		return thawedIn(r)
	case <-g.done:
	case <-g.unresolved:
	case <-hung.C:
		g.kill()
		return Thawed{}, fmt.Errorf("%w: %w: no answer within %s", ErrUnresolved, ErrGuard, limit)
	case <-ctx.Done():
		return Thawed{}, fmt.Errorf("%w: %w", ErrUnresolved, context.Cause(ctx))
	}
	return g.late()
}

func thawedIn(r report) (Thawed, error) {
	switch {
	case r.Err != nil:
		return Thawed{}, r.Err
	case r.Thawed == nil:
		return Thawed{}, fmt.Errorf("%w: an empty answer", ErrGuard)
	}
	return *r.Thawed, nil
}

// GuestReset tells the guard that the guest was reset: the freeze is over, and
// there may be nobody in the guest who could answer a thaw. When the guard had
// begun to thaw before, it goes on until it is answered, as after Close.
func (g *Guard) GuestReset() error {
	if err := g.pipe.write(orderEnd, sendTimeout); err != nil {
		g.log.Debug("guard does not take the end", "error", err)
	}
	return g.Close()
}

// late is the answer to a thaw that the guard did not answer, because it was
// thawing already. It may have answered all the same, just before it ended.
func (g *Guard) late() (Thawed, error) {
	select {
	case r := <-g.thawed:
		return thawedIn(r)
	default:
	}
	outcome, over := g.ended()
	switch {
	case !over:
		return Thawed{}, ErrUnresolved
	case !outcome.End.Resolved():
		return Thawed{}, fmt.Errorf("%w: %s", ErrUnresolved, outcome.Reason)
	}
	return Thawed{Verified: outcome.Verified, Window: outcome.Window, Reason: outcome.Reason}, nil
}

// orderThaw sends the order. A guard that cannot take it has ended, or is hung
// and found out by the deadline.
func (g *Guard) orderThaw() {
	if err := g.pipe.write(orderThaw, sendTimeout); err != nil {
		g.log.Debug("guard does not take the thaw", "error", err)
	}
}

// Unresolved is closed when the guest has not answered a thaw in time, and may
// be frozen for longer than was agreed. Attempts go on until Done.
func (g *Guard) Unresolved() <-chan struct{} { return g.unresolved }

// Done is closed when the freeze is over, or no guard can be kept running.
func (g *Guard) Done() <-chan struct{} { return g.done }

// Outcome waits for Done and returns how the freeze ended.
func (g *Guard) Outcome() Outcome {
	<-g.done
	return g.outcome
}

// Close ends the guard, after a thaw if there was none. With ErrUnresolved the
// guest does not answer: the guard goes on, and Done will tell. It may be
// called more than once.
func (g *Guard) Close() error {
	// The half that is left open brings the guard's last words. An error means
	// that it has spoken them.
	_ = g.pipe.closeWrite()
	hung := time.NewTimer(closeTimeout)
	defer hung.Stop()
	select {
	case <-g.done:
	case <-g.unresolved:
	case <-hung.C:
		g.kill()
		return g.stillFrozen(fmt.Errorf("%w: it does not end within %s", ErrGuard, closeTimeout))
	}
	outcome, over := g.ended()
	switch {
	case !over:
		return g.stillFrozen(errors.New("the guard goes on"))
	case !outcome.End.Resolved():
		return g.stillFrozen(errors.New(outcome.Reason))
	}
	return nil
}

func (g *Guard) stillFrozen(err error) error {
	return &Error{VM: g.Request.VM, Step: "thaw", Err: fmt.Errorf("%w: %w", ErrUnresolved, err)}
}

// died is the answer to a freeze whose guard has ended, which may have answered
// just before.
func (g *Guard) died() (Frozen, error) {
	select {
	case r := <-g.frozen:
		return frozenIn(r)
	default:
		return Frozen{}, fmt.Errorf("%w: %s", ErrGuard, g.outcome.Reason)
	}
}

// ended tells whether the freeze is over, and how.
func (g *Guard) ended() (Outcome, bool) {
	select {
	case <-g.done:
		return g.outcome, true
	default:
		return Outcome{}, false
	}
}
