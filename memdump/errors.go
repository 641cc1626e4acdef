package memdump

import (
	"errors"
	"fmt"
)

// Errors that a caller can act on, found with errors.Is.
var (
	// ErrBusy: a migration of this VM is under way, someone's or a save of ours
	// that has not ended.
	ErrBusy = errors.New("a migration of this VM is under way")

	// ErrFailed: QEMU gave up saving. The error is a *FailedError, which has
	// QEMU's reason. The guest runs again if it ran before.
	ErrFailed = errors.New("QEMU could not save the memory")

	// ErrCancelled: the save was cancelled, by Cancel or by another client.
	ErrCancelled = errors.New("the save was cancelled")

	// ErrNotConverging: the guest changes its memory faster than precopy can
	// save it, within the pause that is allowed.
	ErrNotConverging = errors.New("the guest changes its memory faster than it can be saved")

	// ErrResumed: the guest ran on before its memory was certain to be saved,
	// because the guard or another client resumed it. The memory is not that of
	// the cut and must be discarded; the guest is unharmed.
	ErrResumed = errors.New("the VM was resumed before its memory was captured")

	// ErrStillPaused: the VM was not seen to run again after a pause. The guard
	// and Resume go on trying.
	ErrStillPaused = errors.New("the VM may still be paused")

	// ErrUnsafeTarget: on this version of QEMU a save into this file could
	// freeze the guest for good, so it is not begun.
	ErrUnsafeTarget = errors.New("this QEMU may freeze the guest for good when it cannot write")

	// ErrQEMUEnded: the process has ended, and its number may be another's.
	ErrQEMUEnded = errors.New("the QEMU process has ended")
)

// An UnsuitableError says that a VM cannot be saved by a strategy, or, if
// Strategy is "", by none.
type UnsuitableError struct {
	Strategy Strategy
	Reason   string // what stands against it
	Err      error  // QEMU's refusal, if it was asked
}

// Error gives the strategy and the reason.
func (e *UnsuitableError) Error() string {
	if e.Strategy == "" {
		return "memory cannot be saved: " + e.Reason
	}
	return fmt.Sprintf("memory strategy %s cannot be used: %s", e.Strategy, e.Reason)
}

// Unwrap returns QEMU's refusal, or nil.
func (e *UnsuitableError) Unwrap() error { return e.Err }

// A FailedError is a save that QEMU gave up.
type FailedError struct {
	Desc string // QEMU's reason for humans; "" if it gave none
}

// Error gives QEMU's reason.
func (e *FailedError) Error() string {
	if e.Desc == "" {
		return ErrFailed.Error() + ", and gives no reason"
	}
	return ErrFailed.Error() + ": " + e.Desc
}

// Is makes a FailedError an ErrFailed.
func (e *FailedError) Is(target error) bool { return target == ErrFailed }
