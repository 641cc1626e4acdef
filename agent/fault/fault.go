// Package fault defines the kinds of failure that a caller of the agent can
// act on. Each layer adds its own context to an error; the kind says what the
// caller should do about it. The RPC layer maps kinds to Connect codes, the
// command line to exit codes, and metrics to label values, each in one place.
package fault

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
)

// Kind is what a caller can act on.
type Kind string

// The kinds of failure.
const (
	Failed        Kind = "failed"         // anything without a kind of its own
	Usage         Kind = "usage"          // the request itself is wrong
	Partial       Kind = "partial"        // done, but not for every disk that was asked for
	NotFound      Kind = "not-found"      // no such VM, snapshot, disk or operation
	NotQuiesced   Kind = "not-quiesced"   // a verified freeze was required and not had
	NoSpace       Kind = "no-space"       // a file system is full or would be
	Denied        Kind = "denied"         // the caller's role, or the host, does not permit it
	Unresponsive  Kind = "unresponsive"   // QEMU or the guest does not answer
	Busy          Kind = "busy"           // another operation or client is at work
	HasDependants Kind = "has-dependants" // something else depends on it
	Exists        Kind = "exists"         // the name is taken
	Unsupported   Kind = "unsupported"    // this VM, disk or QEMU cannot do it
	TooLate       Kind = "too-late"       // the operation is past the point of no return
	Cancelled     Kind = "cancelled"      // the caller cancelled it
)

// Error is a failure of a kind, with a message for an operator.
type Error struct {
	Kind    Kind
	Message string // what happened, to which VM and disk
	Hint    string // what to do about it; may be empty
	Err     error  // the cause; may be nil
}

// New returns an error of a kind. A %w in the format becomes its cause; several
// are joined.
func New(kind Kind, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	cause := errors.Unwrap(err)
	if several, ok := err.(interface{ Unwrap() []error }); ok {
		cause = errors.Join(several.Unwrap()...)
	}
	return &Error{Kind: kind, Message: err.Error(), Err: cause}
}

// WithHint returns the error with advice on what to do.
func (e *Error) WithHint(format string, args ...any) *Error {
	c := *e
	c.Hint = fmt.Sprintf(format, args...)
	return &c
}

// About returns the error with the VM that it is about.
func (e *Error) About(vm string) *Error {
	c := *e
	c.Message = "VM " + vm + ": " + e.Message
	return &c
}

// Error returns the message. The cause is part of the message already when it
// was given by %w.
func (e *Error) Error() string { return e.Message }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Of returns the kind of the outermost Error in err's chain, Cancelled for a
// cancelled context, NoSpace for a full file system or quota, and Failed for
// everything else.
func Of(err error) Kind {
	var e *Error
	switch {
	case errors.As(err, &e):
		return e.Kind
	case errors.Is(err, context.Canceled):
		return Cancelled
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return NoSpace
	default:
		return Failed
	}
}

// Hint returns the advice of every Error in err's chain, outermost first.
func Hint(err error) string {
	var hints []string
	for err != nil {
		var e *Error
		if !errors.As(err, &e) {
			break
		}
		if e.Hint != "" {
			hints = append(hints, e.Hint)
		}
		err = e.Err
	}
	return strings.Join(hints, "; ")
}
