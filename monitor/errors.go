package monitor

import (
	"errors"
	"fmt"
)

// Errors that a caller can act on. They are found with errors.Is in what Dial
// and the methods of Session return.
var (
	// ErrBusy: something listens, but no greeting came by the deadline. Another
	// client holds the monitor, or QEMU is stopped or hung.
	ErrBusy = errors.New("no greeting: another client holds the monitor, or QEMU is stopped")

	// ErrGone: nothing listens on the socket, or QEMU closed the connection. A
	// command with this error and without ErrOutcomeUnknown was never sent in
	// full, or only asked a question.
	ErrGone = errors.New("QEMU is gone")

	// ErrUnresponsive: no reply came by the deadline, and nothing can have
	// changed: the command only asks a question, or it was never written in
	// full because QEMU stopped reading.
	ErrUnresponsive = errors.New("QEMU does not answer")

	// ErrOutcomeUnknown: a command with effects was sent in full, and the
	// deadline, the caller's cancellation or the connection's end came before a
	// reply that could be understood. It may have been executed, or may be
	// later. The cause is wrapped beside it.
	ErrOutcomeUnknown = errors.New("outcome unknown")

	// ErrClosed: the session was closed on this side.
	ErrClosed = errors.New("session closed")

	// ErrTooLarge: QEMU sent a message over the reply limit. The session has
	// ended.
	ErrTooLarge = errors.New("message over the size limit")
)

// A CommandError is QEMU's refusal of a command: it was not carried out.
type CommandError struct {
	Command string // such as "blockdev-add"
	Class   string // QEMU's error class: GenericError, CommandNotFound, DeviceNotFound, …
	Desc    string // QEMU's text for humans; it differs between versions
}

// Error classes of QMP (QapiErrorClass in qapi/error.json).
const (
	ClassGeneric         = "GenericError"
	ClassCommandNotFound = "CommandNotFound"
	ClassDeviceNotFound  = "DeviceNotFound"
	ClassDeviceNotActive = "DeviceNotActive"
	ClassKVMMissingCap   = "KVMMissingCap"
)

// Error gives the command and QEMU's text, and the class where it says more
// than that there was an error.
func (e *CommandError) Error() string {
	if e.Class == ClassGeneric || e.Class == "" {
		return fmt.Sprintf("qmp %s: %s", e.Command, e.Desc)
	}
	return fmt.Sprintf("qmp %s: %s (%s)", e.Command, e.Desc, e.Class)
}

// An OpError says in which operation the session failed and why.
type OpError struct {
	Op  string // the QMP command, or "connect" or "greeting"
	Err error  // the cause
}

// Error gives the operation and its cause.
func (e *OpError) Error() string { return "qmp " + e.Op + ": " + e.Err.Error() }

// Unwrap returns the cause.
func (e *OpError) Unwrap() error { return e.Err }

// A ProtocolError ends a session whose peer does not speak QMP.
type ProtocolError struct {
	Reason  string
	Excerpt []byte // the beginning of what was received; may be empty
}

// Error gives the reason and the quoted beginning of what was received.
func (e *ProtocolError) Error() string {
	if len(e.Excerpt) == 0 {
		return "not QMP: " + e.Reason
	}
	return fmt.Sprintf("not QMP: %s: %q", e.Reason, e.Excerpt)
}

// caused joins a sentinel and its cause into one line.
func caused(sentinel, cause error) error {
	return fmt.Errorf("%w: %w", sentinel, cause)
}
