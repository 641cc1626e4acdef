package freeze

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"
)

// Recovered is what became of one outstanding lease.
type Recovered struct {
	Lease Lease
	// Guard is the one that thaws now. It is nil if none was needed, or none
	// could be started.
	Guard *Guard
	// Outcome is how the freeze ended, if it is over; else Err tells why not.
	Outcome Outcome
	// Err is ErrUnresolved while Guard goes on, also after this process has
	// ended; ErrHeld if the lease belongs to another agent that is alive.
	Err error
}

// Resolved tells whether the guest is known not to be frozen any more.
func (r Recovered) Resolved() bool { return r.Err == nil }

// Recover ends what dead agents left frozen. It is for an agent that starts,
// and for the clean-up after one that stopped. The leases are taken on side by
// side: the guard of each is given a moment to finish and then killed, because
// it holds the only connection to the guest agent, and a new one thaws. The
// error is about leases that could not be read; the others are taken on all the
// same. Freezes that this process holds itself are ended too.
func Recover(ctx context.Context, cfg Config) ([]Recovered, error) {
	if err := cfg.check(); err != nil {
		return nil, &Error{VM: "leases", Step: "recover", Err: err}
	}
	leases, err := Leases(cfg.Dir)
	recoveries := make([]Recovered, len(leases))
	var all sync.WaitGroup
	for i, lease := range leases {
		all.Go(func() { recoveries[i] = recoverLease(ctx, cfg, lease) })
	}
	all.Wait()
	if err != nil {
		err = &Error{VM: "leases", Step: "recover", Err: err}
	}
	return recoveries, err
}

func recoverLease(ctx context.Context, cfg Config, lease Lease) Recovered {
	r := Recovered{Lease: lease}
	var err error
	r.Guard, r.Outcome, err = resolve(ctx, cfg, lease)
	if err != nil {
		r.Err = &Error{VM: lease.Request.VM, Step: "recover", Err: err}
	}
	return r
}

func resolve(ctx context.Context, cfg Config, lease Lease) (*Guard, Outcome, error) {
	boot, err := bootID()
	if err != nil {
		return nil, Outcome{}, err
	}
	if lease.Boot != boot {
		return nil, Outcome{End: VMGone, Reason: "the host was booted since"}, lease.remove(cfg.Dir)
	}
	if lease.Owner.PID != os.Getpid() && lease.Owner.Alive() {
		return nil, Outcome{}, fmt.Errorf("%w: process %d", ErrHeld, lease.Owner.PID)
	}
	if err := lease.Guard.end(ctx, endGrace); err != nil {
		return nil, Outcome{}, fmt.Errorf("%w: %w", ErrUnresolved, err)
	}
	lease, found, err := findLease(cfg.Dir, lease.ID)
	switch {
	case err != nil:
		return nil, Outcome{}, err
	case !found:
		return nil, Outcome{End: AgentGone, Reason: "its guard thawed by itself"}, nil
	case !lease.Request.QEMU.Alive():
		return nil, Outcome{End: VMGone, Reason: "the QEMU process has ended"}, lease.remove(cfg.Dir)
	}
	g, err := startRecovery(ctx, cfg, lease, 0)
	if err != nil {
		return nil, Outcome{}, errors.Join(ErrUnresolved, err)
	}
	limit := time.NewTimer(recoverTimeout)
	defer limit.Stop()
	select {
	case <-g.done:
	case <-g.unresolved:
	case <-limit.C:
	case <-ctx.Done():
	}
	if outcome, over := g.ended(); over && outcome.End.Resolved() {
		return g, outcome, nil
	}
	return g, Outcome{}, ErrUnresolved
}

// startRecovery runs a guard that does nothing but thaw.
func startRecovery(ctx context.Context, cfg Config, lease Lease, replaced int) (*Guard, error) {
	return start(ctx, cfg, lease.Request, &lease, replaced)
}

// findLease reads one lease, if it is still there.
func findLease(dir, id string) (Lease, bool, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return Lease{}, false, err
	}
	defer func() { _ = root.Close() }()
	lease, err := readLease(root, id+".json")
	if errors.Is(err, fs.ErrNotExist) {
		return Lease{}, false, nil
	}
	return lease, err == nil, err
}
