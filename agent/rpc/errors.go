package rpc

import (
	"context"
	"errors"

	"connectrpc.com/connect"

	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// form is how a kind of failure is told on the wire.
type form struct {
	connect connect.Code       // for clients that know only their protocol
	code    vmsnapv1.ErrorCode // for ours; its number is the command line's exit code
}

// wire has every kind of failure. The kind itself is the metrics' label.
var wire = map[fault.Kind]form{
	fault.Failed:        {connect.CodeInternal, vmsnapv1.ErrorCode_ERROR_CODE_FAILED},
	fault.Usage:         {connect.CodeInvalidArgument, vmsnapv1.ErrorCode_ERROR_CODE_USAGE},
	fault.Partial:       {connect.CodeDataLoss, vmsnapv1.ErrorCode_ERROR_CODE_PARTIAL},
	fault.NotFound:      {connect.CodeNotFound, vmsnapv1.ErrorCode_ERROR_CODE_NOT_FOUND},
	fault.NotQuiesced:   {connect.CodeFailedPrecondition, vmsnapv1.ErrorCode_ERROR_CODE_NOT_QUIESCED},
	fault.NoSpace:       {connect.CodeResourceExhausted, vmsnapv1.ErrorCode_ERROR_CODE_NO_SPACE},
	fault.Denied:        {connect.CodePermissionDenied, vmsnapv1.ErrorCode_ERROR_CODE_DENIED},
	fault.Unresponsive:  {connect.CodeDeadlineExceeded, vmsnapv1.ErrorCode_ERROR_CODE_UNRESPONSIVE},
	fault.TooLate:       {connect.CodeFailedPrecondition, vmsnapv1.ErrorCode_ERROR_CODE_TOO_LATE},
	fault.Busy:          {connect.CodeAborted, vmsnapv1.ErrorCode_ERROR_CODE_BUSY},
	fault.HasDependants: {connect.CodeFailedPrecondition, vmsnapv1.ErrorCode_ERROR_CODE_HAS_DEPENDANTS},
	fault.Exists:        {connect.CodeAlreadyExists, vmsnapv1.ErrorCode_ERROR_CODE_EXISTS},
	fault.Unsupported:   {connect.CodeUnimplemented, vmsnapv1.ErrorCode_ERROR_CODE_UNSUPPORTED},
	fault.Cancelled:     {connect.CodeCanceled, vmsnapv1.ErrorCode_ERROR_CODE_CANCELLED},
}

// formOf returns how a kind is told; a kind that the table lacks is a failure
// like any other.
func formOf(kind fault.Kind) form {
	if f, ok := wire[kind]; ok {
		return f
	}
	return wire[fault.Failed]
}

// kindOf returns an error's kind. A deadline that passed without anybody
// saying more means that something did not answer.
func kindOf(err error) fault.Kind {
	kind := fault.Of(err)
	if kind == fault.Failed && errors.Is(err, context.DeadlineExceeded) {
		return fault.Unresponsive
	}
	return kind
}

// detailOf returns what is told of an error beside its Connect code.
func detailOf(err error) *vmsnapv1.Error {
	detail := &vmsnapv1.Error{
		Code:    formOf(kindOf(err)).code,
		Message: text(err.Error()),
		Hint:    text(fault.Hint(err)),
	}
	var busy *op.BusyError
	if errors.As(err, &busy) {
		detail.OperationId = text(busy.Operation)
	}
	return detail
}

// wireError returns an error in its form on the wire. One that has it already
// is returned as it is.
func wireError(err error) error {
	var done *connect.Error
	if errors.As(err, &done) {
		return done
	}
	return newWireError(formOf(kindOf(err)).connect, detailOf(err))
}

func newWireError(code connect.Code, detail *vmsnapv1.Error) error {
	e := connect.NewError(code, errors.New(detail.GetMessage()))
	d, err := connect.NewErrorDetail(detail)
	if err != nil {
		return errors.Join(e, err)
	}
	e.AddDetail(d)
	return e
}

// errStopping ends the streams of a daemon that stops. Clients resume them
// with its successor.
func errStopping() error {
	return newWireError(connect.CodeUnavailable, &vmsnapv1.Error{
		Code:    vmsnapv1.ErrorCode_ERROR_CODE_UNREACHABLE,
		Message: "vmsnapd is stopping",
		Hint:    "the operation goes on or is resumed when vmsnapd is back; watch it again then",
	})
}
