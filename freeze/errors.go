package freeze

import (
	"errors"
	"fmt"

	"github.com/vmsnap/vmsnap/qga"
)

// The failures of a freeze. They arrive wrapped in an Error, beside those of
// package qga.
var (
	// ErrFreezeTimeout: the guest did not answer the freeze in time. It may
	// freeze later; the guard goes on thawing until the guest answers thawed.
	ErrFreezeTimeout = errors.New("the guest did not answer the freeze in time")
	// ErrNothingFrozen: the guest answered that it froze no file system.
	ErrNothingFrozen = errors.New("the guest froze no file system")
	// ErrAlreadyFrozen: someone else has frozen the guest. It was left so.
	ErrAlreadyFrozen = errors.New("the guest is frozen already")
	// ErrUnsupported: the guest agent does not serve the freeze commands.
	ErrUnsupported = errors.New("the guest agent cannot freeze")
	// ErrUnresolved: the guest has not answered thawed. Attempts go on.
	ErrUnresolved = errors.New("the guest may be frozen and does not answer")
	// ErrLease: the lease file could not be made durable. Nothing was sent.
	ErrLease = errors.New("the lease could not be written")
	// ErrAborted: a thaw was asked for before the guest had answered the freeze.
	ErrAborted = errors.New("the freeze was abandoned")
	// ErrGuard: the guard did not start, has died, or does not answer.
	ErrGuard = errors.New("the guard failed")
	// ErrUsed: the guard has served its freeze.
	ErrUsed = errors.New("the guard serves one freeze only")
	// ErrHeld: the lease belongs to another agent that is alive.
	ErrHeld = errors.New("the lease is held by a running agent")
)

// Error is a failure with one VM.
type Error struct {
	VM   string
	Step string // start guard, freeze, thaw, recover
	Err  error
}

// Error names step, VM and cause.
func (e *Error) Error() string { return fmt.Sprintf("%s %s: %v", e.Step, e.VM, e.Err) }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// kinds are the errors that keep their identity on the way from the guard to
// the agent, the most telling first.
var kinds = map[string]error{
	"freeze-timeout": ErrFreezeTimeout,
	"nothing-frozen": ErrNothingFrozen,
	"already-frozen": ErrAlreadyFrozen,
	"unsupported":    ErrUnsupported,
	"unresolved":     ErrUnresolved,
	"lease":          ErrLease,
	"aborted":        ErrAborted,
	"guard":          ErrGuard,
	"agent-timeout":  qga.ErrTimeout,
	"agent-gone":     qga.ErrGone,
	"agent-busy":     qga.ErrBusy,
	"too-large":      qga.ErrTooLarge,
	"too-deep":       qga.ErrTooDeep,
	"malformed":      qga.ErrMalformed,
}

// remoteError is an error as it travels over the pipe.
type remoteError struct {
	Message string            `json:"message"`
	Kinds   []string          `json:"kinds,omitempty"`
	Refused *qga.CommandError `json:"refused,omitempty"`
}

func toRemote(err error) *remoteError {
	if err == nil {
		return nil
	}
	r := &remoteError{Message: err.Error()}
	for name, kind := range kinds {
		if errors.Is(err, kind) {
			r.Kinds = append(r.Kinds, name)
		}
	}
	errors.As(err, &r.Refused)
	return r
}

// Error returns the message that the guard wrote.
func (r *remoteError) Error() string { return r.Message }

// Unwrap returns the kinds that the error had in the guard.
func (r *remoteError) Unwrap() []error {
	var errs []error
	for _, name := range r.Kinds {
		if kind := kinds[name]; kind != nil {
			errs = append(errs, kind)
		}
	}
	if r.Refused != nil {
		errs = append(errs, r.Refused)
	}
	return errs
}
