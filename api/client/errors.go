package client

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"strconv"
	"syscall"

	"connectrpc.com/connect"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// UnreachableError says that no connection to the daemon could be had.
type UnreachableError struct {
	Socket string
	Err    error
}

// Error names the socket and the cause.
func (e *UnreachableError) Error() string {
	return fmt.Sprintf("vmsnapd cannot be reached at %s: %v", e.Socket, e.Err)
}

// Unwrap returns the cause.
func (e *UnreachableError) Unwrap() error { return e.Err }

// detail returns the error with what to check.
func (e *UnreachableError) detail() *vmsnapv1.Error {
	d := &vmsnapv1.Error{Code: vmsnapv1.ErrorCode_ERROR_CODE_UNREACHABLE}
	switch {
	case errors.Is(e.Err, fs.ErrPermission):
		d.Code = vmsnapv1.ErrorCode_ERROR_CODE_DENIED
		d.Message = fmt.Sprintf("the socket %s may not be opened by this user", e.Socket)
		d.Hint = "join " + groupOf(e.Socket) + ", log in anew, or become root"
	case errors.Is(e.Err, fs.ErrNotExist):
		d.Message = fmt.Sprintf("vmsnapd cannot be reached: there is no socket %s", e.Socket)
		d.Hint = "start it (systemctl start vmsnapd), or name its socket with --socket or VMSNAP_SOCKET"
	case errors.Is(e.Err, syscall.ECONNREFUSED):
		d.Message = fmt.Sprintf("vmsnapd cannot be reached: nobody listens at the socket %s", e.Socket)
		d.Hint = "vmsnapd has died or is being restarted: systemctl status vmsnapd"
	default:
		d.Message = e.Error()
		d.Hint = "is vmsnapd running and answering? systemctl status vmsnapd"
	}
	return d
}

// groupOf names the group that may open a socket, and how to join it.
func groupOf(socket string) string {
	const unknown = "the group that owns the socket"
	fi, err := os.Stat(socket)
	if err != nil {
		return unknown
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok || st.Gid == 0 || fi.Mode()&0o020 == 0 {
		return unknown
	}
	g, err := user.LookupGroupId(strconv.FormatUint(uint64(st.Gid), 10))
	if err != nil {
		return unknown
	}
	return fmt.Sprintf("the group %s that owns the socket (usermod --append --groups %s USER)", g.Name, g.Name)
}

// OperationError is the end of an operation that did not succeed.
type OperationError struct {
	Operation *vmsnapv1.Operation // failed or cancelled
}

// Error returns the operation's own message.
func (e *OperationError) Error() string {
	if msg := e.Operation.GetError().GetMessage(); msg != "" {
		return msg
	}
	return fmt.Sprintf("operation %s did not succeed", e.Operation.GetId())
}

// ErrorOf returns what an error of this package or of a call says to its
// caller: a code to act on, a message, a hint, and for a busy VM the operation
// that holds it. It reports false for an error that is neither.
func ErrorOf(err error) (*vmsnapv1.Error, bool) {
	if failed, ok := errors.AsType[*OperationError](err); ok {
		if e := failed.Operation.GetError(); e != nil {
			return e, true
		}
		return &vmsnapv1.Error{Code: vmsnapv1.ErrorCode_ERROR_CODE_FAILED, Message: failed.Error(), OperationId: failed.Operation.GetId()}, true
	}
	if gone, ok := errors.AsType[*UnreachableError](err); ok && !errors.Is(err, context.Canceled) {
		return gone.detail(), true
	}
	call, ok := errors.AsType[*connect.Error](err)
	if !ok {
		return nil, false
	}
	if e := told(call); e != nil {
		return e, true
	}
	return &vmsnapv1.Error{Code: codeOf(call), Message: call.Message()}, true
}

// told returns what the daemon said of an error; nil when it said nothing.
func told(call *connect.Error) *vmsnapv1.Error {
	for _, d := range call.Details() {
		value, err := d.Value()
		if err != nil {
			continue
		}
		if e, ok := value.(*vmsnapv1.Error); ok {
			return e
		}
	}
	return nil
}

// codeOf returns the code of an error that did not come from the daemon's own
// handlers: the transport's, or that of a request that could not be decoded.
func codeOf(call *connect.Error) vmsnapv1.ErrorCode {
	switch call.Code() {
	case connect.CodeCanceled:
		return vmsnapv1.ErrorCode_ERROR_CODE_CANCELLED
	case connect.CodeInvalidArgument, connect.CodeResourceExhausted:
		return vmsnapv1.ErrorCode_ERROR_CODE_USAGE
	case connect.CodeDeadlineExceeded:
		return vmsnapv1.ErrorCode_ERROR_CODE_UNRESPONSIVE
	case connect.CodeUnimplemented:
		return vmsnapv1.ErrorCode_ERROR_CODE_UNSUPPORTED
	case connect.CodeUnavailable:
		return vmsnapv1.ErrorCode_ERROR_CODE_UNREACHABLE
	default:
		return vmsnapv1.ErrorCode_ERROR_CODE_FAILED
	}
}

// OutcomeUnknown reports whether a call failed so that it may have been carried
// out all the same: it was sent, and no answer came. Repeat it with the same
// request_id, or ask what became of it.
func OutcomeUnknown(err error) bool {
	if _, ok := errors.AsType[*UnreachableError](err); ok {
		return false
	}
	_, ok := errors.AsType[*connect.Error](err)
	return ok && !connect.IsWireError(err)
}
