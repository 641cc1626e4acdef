package freeze

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/vmsnap/vmsnap/qga"
)

// thawUntilAnswered thaws until the guest answers thawed or its QEMU has ended,
// however long that takes.
func (k *keeper) thawUntilAnswered(end End, reason string) Outcome {
	ctx := context.Background()
	patience, pause := firstPatience, firstPause
	for attempt := 1; ; attempt++ {
		err := k.attempt(ctx, patience)
		if err == nil {
			break
		}
		if !k.Request.QEMU.Alive() {
			end, reason = VMGone, "the QEMU process has ended"
			break
		}
		k.alarm(err, attempt)
		if !errors.Is(err, qga.ErrTimeout) { // else it was a pause already
			k.Request.QEMU.awaitEnd(pause)
			pause = min(2*pause, lastPause)
		}
		patience = min(2*patience, lastPatience)
	}
	outcome := Outcome{End: end, Reason: reason}
	if !k.requested.IsZero() {
		outcome.Window = time.Since(k.requested)
	}
	k.forget()
	return outcome
}

// attempt is one try, on a new connection if the old one has ended. A guest
// agent that is busy answers the synchronisation the moment it is not: the
// patience is for that.
func (k *keeper) attempt(ctx context.Context, patience time.Duration) (err error) {
	if k.guest == nil {
		if k.guest, err = qga.Dial(ctx, k.Request.AgentSocket, qga.DefaultLimits); err != nil {
			return err
		}
	}
	defer func() {
		if errors.Is(err, qga.ErrGone) {
			_ = k.guest.Close() // it is
			k.guest = nil
		}
	}()
	if err := k.sync(ctx, patience); err != nil {
		return err
	}
	// A failed thaw may have thawed all the same, as on Windows: the question
	// decides.
	_, thawErr := k.thawOnce(ctx)
	if err := k.confirm(ctx); err != nil {
		return errors.Join(thawErr, err)
	}
	return nil
}

// alarm tells everyone that the guest may be frozen for longer than agreed: the
// agent, the log, and whoever reads the lease file.
func (k *keeper) alarm(cause error, attempt int) {
	k.log.Error("guest may be frozen and does not answer, trying again", "attempt", attempt, "error", cause)
	if k.alarmed {
		return
	}
	k.alarmed = true
	k.tell(report{Kind: reportUnresolved, Err: toRemote(cause)})
	k.lease.State, k.lease.Problem = LeaseUnresolved, cause.Error()
	if err := k.lease.write(k.Dir); err != nil {
		k.log.Error("lease file cannot be updated", "error", err)
	}
}

// recover takes the place of a guard that was lost.
func (k *keeper) recover(ctx context.Context) Outcome {
	k.lease, k.leased = *k.Recover, true
	ready := k.moveOut(ctx)
	self, err := ProcessOf(os.Getpid())
	if err == nil {
		k.lease.Guard, k.lease.Owner = self, k.Owner
		err = k.lease.write(k.Dir)
	}
	if err != nil {
		// Thawing comes first; the lease names a dead guard, which is harmless.
		k.log.Error("lease file cannot be updated", "error", err)
	}
	k.tell(report{Kind: reportReady, Ready: &ready})
	return k.thawUntilAnswered(ByRecovery, "the guard before was lost")
}
