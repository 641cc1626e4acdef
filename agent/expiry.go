package agent

import (
	"context"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
)

// expiryRetry is when the deletion of an expired snapshot is tried again that could
// not be deleted, as one that others depend on.
const expiryRetry = 10 * time.Minute

// expireDue deletes the snapshots whose time has come, and returns when that of the
// next comes.
func (a *Agent) expireDue(ctx context.Context) (next time.Time, err error) {
	all, err := a.catalog.Expiring(ctx)
	if err != nil {
		return next, err
	}
	var due []catalog.Snapshot
	now := a.clock()
	for _, s := range all {
		if _, kept := s.Labels[keepLabel]; kept || s.Template {
			continue
		}
		if s.Expires.After(now) {
			next = s.Expires // the first of them
			break
		}
		due = append(due, s)
	}
	if len(due) > 0 && a.scheduler.expiring.TryLock() {
		a.group.Go(func() {
			defer a.scheduler.expiring.Unlock()
			for _, s := range due {
				a.expireOne(ctx, s)
			}
		})
	}
	return next, nil
}

// expireOne deletes a snapshot, unless that failed not long ago.
func (a *Agent) expireOne(ctx context.Context, s catalog.Snapshot) {
	notYet := a.scheduler.notYet
	if ctx.Err() != nil || a.clock().Before(notYet[s.ID]) {
		return
	}
	log := a.log.With("vm", s.VMName, "snapshot", s.Name)
	log.Info("a snapshot has expired", "expires", s.Expires)
	rec, err := a.deleter.DeleteSnapshot(ctx, s.ID, 0)
	if err == nil {
		if rec, err = a.ops.Wait(ctx, rec.ID); err == nil {
			err = failureOf(rec)
		}
	}
	if err != nil {
		notYet[s.ID] = a.clock().Add(expiryRetry)
		log.Warn("an expired snapshot is not deleted yet", "error", err)
		return
	}
	delete(notYet, s.ID)
}
