package freeze

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/vmsnap/vmsnap/qga"
)

// freeze does what the agent ordered, and lives until it is over.
func (k *keeper) freeze(ctx context.Context) Outcome {
	if err := k.ready(ctx); err != nil {
		k.forget()
		k.tell(report{Kind: reportFreeze, Err: toRemote(err)})
		return Outcome{End: Unused, Reason: err.Error()}
	}
	count, err := k.send(ctx)
	var refused *qga.CommandError
	if errors.As(err, &refused) && k.frozenByOthers(refused) {
		k.forget()
		k.tell(report{Kind: reportFreeze, Err: toRemote(ErrAlreadyFrozen)})
		return Outcome{End: Unused, Reason: ErrAlreadyFrozen.Error()}
	}
	if err != nil && ctx.Err() != nil {
		return k.thawUntilAnswered(AgentGone, "the agent closed its pipe before the guest had answered the freeze")
	}
	if err != nil {
		k.log.Warn("freeze failed, thawing", "error", err)
		k.tell(report{Kind: reportFreeze, Err: toRemote(err)})
		return k.thawUntilAnswered(FreezeFailed, err.Error())
	}
	lease := time.NewTimer(k.Request.Lease)
	defer lease.Stop()
	at := time.Now()
	k.tell(report{Kind: reportFreeze, Frozen: &Frozen{
		Count: count, Total: max(k.total, count), At: at, Deadline: at.Add(k.Request.Lease),
	}})
	select {
	case <-k.thawAsked:
		return k.thaw(count)
	case <-k.endAsked:
		k.forget()
		return Outcome{End: GuestReset, Reason: "the guest was reset"}
	case <-lease.C:
		return k.thawUntilAnswered(LeaseExpired, fmt.Sprintf("the lease of %s ended before the thaw was asked for", k.Request.Lease))
	case <-k.Request.QEMU.ended(k.Request.Lease):
		return k.thawUntilAnswered(VMGone, "the QEMU process has ended")
	case <-ctx.Done():
		return k.thawUntilAnswered(AgentGone, "the agent closed its pipe")
	}
}

// ready makes sure that the guest agent answers now, and that the intent is on
// disk. After it the freeze may be sent.
func (k *keeper) ready(ctx context.Context) error {
	if err := k.sync(ctx, syncTimeout); err != nil {
		return err
	}
	if err := k.announce(); err != nil {
		return fmt.Errorf("%w: %w", ErrLease, err)
	}
	return nil
}

// send sends the freeze and waits for the reply, an order to thaw, or the
// agent's end.
func (k *keeper) send(ctx context.Context) (int, error) {
	ctx, abandon := context.WithCancelCause(ctx)
	defer abandon(nil)
	answered := make(chan struct{})
	defer close(answered)
	go func() {
		select {
		case <-k.thawAsked:
			abandon(ErrAborted)
		case <-answered:
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, k.Request.FreezeTimeout)
	defer cancel()
	k.requested = time.Now()
	count, err := k.guest.Freeze(ctx, k.Request.Mountpoints)
	switch {
	case errors.Is(err, qga.ErrTimeout):
		return 0, fmt.Errorf("%w (%s): %w", ErrFreezeTimeout, k.Request.FreezeTimeout, err)
	case err == nil && count == 0:
		return 0, ErrNothingFrozen
	}
	if k.total > 0 { // the guest may claim what it likes, but not two things
		count = min(count, k.total)
	}
	return count, err
}

// frozenByOthers tells whether a refusal means that the guest was frozen when
// our freeze came: guest agents then do not know the command.
func (k *keeper) frozenByOthers(refused *qga.CommandError) bool {
	if refused.Class != qga.ClassCommandNotFound {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), statusTimeout)
	defer cancel()
	state, err := k.guest.FreezeStatus(ctx)
	return err == nil && state == qga.Frozen
}

// thaw is the ordered end: ask, thaw, ask again.
func (k *keeper) thaw(frozen int) Outcome {
	ctx := context.Background() // the guest is thawed whatever becomes of the agent
	answer := k.guest.EndFreeze(ctx)
	result := Thawed{Window: time.Since(k.requested)}
	result.Reason = doubt(frozen, answer)
	result.Verified = result.Reason == ""
	if err := k.confirm(ctx); err != nil {
		err = fmt.Errorf("%w: %w", ErrUnresolved, errors.Join(answer.ThawErr, err))
		k.tell(report{Kind: reportThaw, Err: toRemote(err)})
		return k.thawUntilAnswered(OnRequest, err.Error())
	}
	k.tell(report{Kind: reportThaw, Thawed: &result})
	k.forget()
	return Outcome{End: OnRequest, Verified: result.Verified, Reason: result.Reason, Window: result.Window}
}

// doubt says why a freeze may not have lasted until the thaw, or nothing.
func doubt(frozen int, answer qga.Thawing) string {
	switch {
	case answer.StatusErr != nil:
		return fmt.Sprintf("the guest did not say whether it was still frozen: %v", answer.StatusErr)
	case answer.Was != qga.Frozen:
		return "the guest was not frozen any more"
	case answer.ThawErr != nil:
		// Windows' VSS reports here that it gave up after its 10 seconds.
		return fmt.Sprintf("the thaw failed: %v", answer.ThawErr)
	case answer.Count < frozen:
		return fmt.Sprintf("of %d frozen file systems only %d were still frozen", frozen, answer.Count)
	}
	return ""
}

func (k *keeper) thawOnce(ctx context.Context) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, thawTimeout)
	defer cancel()
	return k.guest.Thaw(ctx)
}

// confirm fails unless the guest answers thawed.
func (k *keeper) confirm(ctx context.Context) error {
	state, err := k.guest.FreezeStatus(ctx)
	if err == nil && state != qga.Thawed {
		err = fmt.Errorf("the guest still says %s", state)
	}
	return err
}
