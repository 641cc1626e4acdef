package memdump

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/vmsnap/vmsnap/monitor"
)

// A StateError says that a VM stands still for a reason that a pause is not,
// such as an I/O error or its shutdown. It was left so.
type StateError struct{ State monitor.RunState }

// Error names the run state.
func (e *StateError) Error() string {
	return fmt.Sprintf("the VM stands still in state %q, which is not a pause", e.State)
}

// Resume lets a VM run that a save of its memory has paused, and returns when
// QEMU says that it runs and no migration is under way that would stop it. It
// tells whether the VM had to be resumed.
//
//   - A paused VM is continued, and so is one that a completed save left in
//     postmigrate.
//   - A migration that is not a background save is cancelled, since with nobody
//     to finish it it would stop the VM, or has done so: QEMU resumes a VM by
//     itself that waits before its switchover.
//   - A background save goes on: it stops nothing, and QEMU before 8.1 would
//     freeze the guest for good when it is cancelled. But memory that was not
//     tracked yet is then later than the disks.
//   - Any other state that is not running is a *StateError.
//
// The caller must know that the VM ran before the pause, that nobody else has
// paused it since and, above all, that it was not migrated to another host: to
// continue it here too would destroy its disks. It may be called again after
// any error.
func Resume(ctx context.Context, s *monitor.Session) (resumed bool, err error) {
	r := resumer{Session: s}
	for {
		again, err := r.look(ctx)
		if err != nil || again == 0 {
			return r.resumed, err
		}
		select {
		case <-time.After(again): // QEMU announces none of what is awaited here
		case <-ctx.Done():
			return r.resumed, fmt.Errorf("resume: %w", context.Cause(ctx))
		}
	}
}

// Between two looks at a VM.
const (
	atOnce = time.Nanosecond
	// resumePoll is short beside what a guest feels, and long beside a query.
	resumePoll = 5 * time.Millisecond
)

type resumer struct {
	*monitor.Session
	resumed   bool
	cancelled bool
}

// look does the next step, and says how long to wait before the one after it:
// 0 if there is none.
func (r *resumer) look(ctx context.Context) (time.Duration, error) {
	st, err := r.QueryStatus(ctx)
	if err != nil {
		return 0, err
	}
	switch st.Status {
	case monitor.RunStateRunning, monitor.RunStateSuspended:
		// A guest in S3 sleeps by its own will; cont has no effect on it.
		ending, err := r.cancel(ctx)
		if err != nil || !ending {
			return 0, err
		}
		return resumePoll, nil
	case monitor.RunStatePaused, monitor.RunStatePostMigrate,
		monitor.RunStatePrelaunch: // what a reset makes of paused
		r.resumed = true
		return atOnce, r.Cont(ctx)
	case monitor.RunStateFinishMigrate:
		r.resumed = true
		_, err := r.cancel(ctx)
		return resumePoll, err
	case monitor.RunStateSaveVM, monitor.RunStateRestoreVM:
		return resumePoll, nil // QEMU is at it, and comes back by itself
	default:
		return 0, &StateError{st.Status}
	}
}

// cancel ends a migration that would stop the VM, and says whether there is
// one that has not ended yet.
func (r *resumer) cancel(ctx context.Context) (ending bool, err error) {
	m, err := r.QueryMigrate(ctx)
	if err != nil {
		return false, err
	}
	switch m.Status {
	case monitor.MigrationSetup, monitor.MigrationActive, monitor.MigrationPreSwitch,
		monitor.MigrationDevice, monitor.MigrationWaitUnplug:
	case monitor.MigrationCancelling:
		return true, nil
	default:
		return false, nil
	}
	background, err := r.background(ctx)
	if err != nil || background {
		return false, err
	}
	if r.cancelled {
		return true, nil
	}
	r.cancelled = true
	return true, r.Execute(ctx, "migrate_cancel", nil, nil)
}

// background tells whether the migration that is under way is a background
// save. Capabilities cannot be changed meanwhile.
func (r *resumer) background(ctx context.Context) (bool, error) {
	var capabilities []struct {
		Capability string `json:"capability"`
		State      bool   `json:"state"`
	}
	if err := r.Execute(ctx, "query-migrate-capabilities", nil, &capabilities); err != nil {
		return false, err
	}
	for _, c := range capabilities {
		if c.Capability == "background-snapshot" {
			return c.State, nil
		}
	}
	return false, errors.New("query-migrate-capabilities: no background-snapshot")
}
