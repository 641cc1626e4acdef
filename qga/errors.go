package qga

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
)

// The ways in which a command fails without an answer that can be used. They
// arrive wrapped in an OpError.
var (
	// ErrTimeout: the guest agent did not answer in time. Its reply may still
	// come, and the command may still run.
	ErrTimeout = errors.New("the guest agent does not answer")
	// ErrTooLarge: the reply is longer than Limits allow.
	ErrTooLarge = errors.New("the guest agent's reply is too large")
	// ErrTooDeep: the reply is nested deeper than Limits.Depth.
	ErrTooDeep = errors.New("the guest agent's reply is nested too deeply")
	// ErrMalformed: the reply is not what the protocol says it should be.
	ErrMalformed = errors.New("the guest agent's reply is malformed")
	// ErrGone: the connection has ended, so QEMU has, or Close was called.
	ErrGone = errors.New("the guest agent's socket is closed")
	// ErrBusy: other clients hold the socket and fill its queue.
	ErrBusy = errors.New("the guest agent's socket is held by another client")
)

// Classes of CommandError (QEMU, qapi/error.json).
const (
	ClassGeneric         = "GenericError"
	ClassCommandNotFound = "CommandNotFound" // unknown, disabled, or refused because the guest is frozen
)

// CommandError is the guest agent's own refusal of a command. The client stays
// in step.
type CommandError struct {
	Command string
	Class   string // to be matched; see the Class constants
	Desc    string // for people; text of the guest, cleaned and cut
}

// Error tells what was refused and why.
func (e *CommandError) Error() string {
	return fmt.Sprintf("the guest agent refused %s: %s (%s)", e.Command, e.Desc, e.Class)
}

// OpError is the failure of one command.
type OpError struct {
	Command string
	// Sent tells that the command, or part of it, may have reached the guest.
	// Unless Err is a CommandError it may then have run, or may still run.
	Sent bool
	Err  error
}

// Error names the command and the cause.
func (e *OpError) Error() string {
	var refused *CommandError
	if errors.As(e.Err, &refused) {
		return e.Err.Error()
	}
	return e.Command + ": " + e.Err.Error()
}

// Unwrap returns the cause.
func (e *OpError) Unwrap() error { return e.Err }

// transportError gives a failed read or write its meaning.
func transportError(ctx context.Context, err error) error {
	switch {
	case errors.Is(ctx.Err(), context.Canceled):
		return context.Cause(ctx)
	case errors.Is(err, os.ErrDeadlineExceeded), ctx.Err() != nil:
		return fmt.Errorf("%w: %w", ErrTimeout, context.DeadlineExceeded)
	case errors.Is(err, io.EOF):
		return ErrGone
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE),
		errors.Is(err, net.ErrClosed), errors.Is(err, io.ErrClosedPipe):
		return fmt.Errorf("%w: %w", ErrGone, err)
	default:
		return err
	}
}
