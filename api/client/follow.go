package client

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"connectrpc.com/connect"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// How a broken stream is resumed.
const (
	resumeFirst = 100 * time.Millisecond // a restart takes a moment
	resumeMax   = 2 * time.Second
	// A daemon that has been away for so long is not just restarting.
	outageLimit = 2 * time.Minute
)

// Wait waits for an operation to end. See Follow.
func (c *Client) Wait(ctx context.Context, id string) (*vmsnapv1.Operation, error) {
	return c.Follow(ctx, id, func(*vmsnapv1.Operation) {})
}

// Follow calls changed with an operation as it is now and after each change
// that it sees (changes in quick succession may come as one), and returns it
// when it has ended. One that failed or was cancelled is returned together
// with an *OperationError; one that is partial is not an error.
//
// A broken stream is resumed, also over a restart of the daemon, which resumes
// or reverts its operations by itself. Follow gives up with the last error
// when the daemon stays away for two minutes, when the daemon refuses, and
// when ctx ends; the operation goes on all the same, and is returned as it was
// last seen, nil if it never was.
func (c *Client) Follow(ctx context.Context, id string, changed func(*vmsnapv1.Operation)) (*vmsnapv1.Operation, error) {
	f := following{client: c, id: id, changed: changed, heard: time.Now()}
	wait := resumeFirst
	for {
		heard := f.heard
		err := f.stream(ctx)
		if ended(f.last) {
			return f.last, outcome(f.last)
		}
		if !resumable(ctx, err) {
			return f.last, err
		}
		if f.heard != heard {
			wait = resumeFirst
		} else if time.Since(f.heard) > outageLimit {
			return f.last, fmt.Errorf("operation %s was lost sight of: %w", id, err)
		}
		select {
		case <-ctx.Done():
			return f.last, ctx.Err()
		case <-time.After(wait):
		}
		wait = min(2*wait, resumeMax)
	}
}

// following is what Follow knows over all of its streams.
type following struct {
	client  *Client
	id      string
	changed func(*vmsnapv1.Operation)
	last    *vmsnapv1.Operation
	heard   time.Time
}

// errCutShort is for a stream that ended well while the operation had not.
var errCutShort = errors.New("the stream ended before the operation")

// stream follows the operation over one stream.
func (f *following) stream(ctx context.Context) error {
	stream, err := f.client.operations.WatchOperation(ctx, connect.NewRequest(&vmsnapv1.WatchOperationRequest{Id: f.id}))
	if err != nil {
		return err
	}
	defer func() { _ = stream.Close() }()
	for stream.Receive() {
		f.heard = time.Now()
		operation := stream.Msg().GetOperation()
		if f.last != nil && f.last.GetRevision() == operation.GetRevision() && f.last.GetState() == operation.GetState() {
			continue // seen before the stream broke
		}
		f.last = operation
		f.changed(operation)
		if ended(operation) {
			return nil
		}
	}
	if err := stream.Err(); err != nil {
		return err
	}
	return errCutShort
}

// resumable reports whether another stream may bring what this one did not:
// the transport failed, or the daemon said that it is going away.
func resumable(ctx context.Context, err error) bool {
	if ctx.Err() != nil || errors.Is(err, fs.ErrPermission) {
		return false
	}
	call, ok := errors.AsType[*connect.Error](err)
	if !ok || !connect.IsWireError(err) {
		return !errors.Is(err, context.Canceled)
	}
	return told(call).GetCode() == vmsnapv1.ErrorCode_ERROR_CODE_UNREACHABLE
}

func ended(operation *vmsnapv1.Operation) bool {
	switch operation.GetState() {
	case vmsnapv1.OperationState_OPERATION_STATE_SUCCEEDED,
		vmsnapv1.OperationState_OPERATION_STATE_FAILED,
		vmsnapv1.OperationState_OPERATION_STATE_CANCELLED:
		return true
	default:
		return false
	}
}

func outcome(operation *vmsnapv1.Operation) error {
	if operation.GetState() == vmsnapv1.OperationState_OPERATION_STATE_SUCCEEDED {
		return nil
	}
	return &OperationError{Operation: operation}
}
