package agent

import (
	"context"
	"errors"
	"time"

	"github.com/vmsnap/vmsnap/qga"
)

const (
	// wakeWithin bounds how long a restored guest is asked to thaw, and for its
	// agent. Its agent answers at once, unless a hook of its own hangs.
	wakeWithin = time.Minute
	// wakeOnce bounds one attempt.
	wakeOnce = 10 * time.Second
)

// wakeGuest thaws a guest that was frozen when its memory was saved, and sets its
// clock, which stood still since. It gives up after a while: the guest runs, and
// what is wrong is said.
func (r *restore) wakeGuest(ctx context.Context) error {
	if r.run.proc.GuestAgent.Path == "" {
		r.warn(warnClock, "", "the guest's clock is as it was at the snapshot: it has no agent's channel")
		return nil
	}
	ctx, stop := context.WithTimeout(ctx, wakeWithin)
	defer stop()
	var err error
	for first := true; ; first = false {
		if err = r.tryWake(ctx); err == nil {
			return nil
		}
		if !r.Memory.Frozen && !first {
			break // a guest without its agent runs all the same
		}
		select {
		case <-ctx.Done():
		case <-time.After(askAgain):
			continue
		}
		break
	}
	if r.Memory.Frozen {
		r.warn(warnThawUnresolved, "", "the guest was frozen when its memory was saved, and does not answer the thaw: vmsnap thaw "+r.vm.name()+" tries again: "+err.Error())
		return nil
	}
	r.warn(warnClock, "", "the guest's clock is as it was at the snapshot: "+err.Error())
	return nil
}

func (r *restore) tryWake(ctx context.Context) error {
	ctx, stop := context.WithTimeout(ctx, wakeOnce)
	defer stop()
	addr, err := r.run.proc.Address(r.run.proc.GuestAgent)
	if err != nil {
		return err
	}
	c, err := qga.Dial(ctx, addr, qga.DefaultLimits)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	if r.Memory.Frozen {
		if t := c.EndFreeze(ctx); t.ThawErr != nil {
			return errors.Join(t.StatusErr, t.ThawErr)
		}
	}
	if err := c.SetTime(ctx, time.Now()); err != nil {
		var refused *qga.CommandError
		if !errors.As(err, &refused) {
			return err
		}
		r.warn(warnClock, "", "the guest did not set its clock, or not all of it: "+refused.Error())
	}
	return nil
}
