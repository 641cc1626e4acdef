package main

import (
	"context"
	"errors"

	"connectrpc.com/connect"

	"github.com/vmsnap/vmsnap/api/client"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// watch shows an operation's progress until it ends or ctx does.
func (a *app) watch(ctx context.Context, daemon *client.Client, operation *vmsnapv1.Operation) (*vmsnapv1.Operation, error) {
	show := a.showProgress(operation)
	defer show.close()
	return a.follow(ctx, daemon, operation, show)
}

func (a *app) follow(ctx context.Context, daemon *client.Client, operation *vmsnapv1.Operation, show progress) (*vmsnapv1.Operation, error) {
	last, err := daemon.Follow(ctx, operation.GetId(), show.update)
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return last, &exitError{
			code:    vmsnapv1.ErrorCode_ERROR_CODE_CANCELLED,
			message: "operation " + operation.GetId() + " is left to itself",
			hint:    "vmsnap operation watch " + operation.GetId(),
			err:     err,
		}
	}
	return last, err
}

// stay is watch for an operation that this command began: the first interrupt
// cancels the operation, and its end is waited for; a second one leaves it.
func (a *app) stay(daemon *client.Client, operation *vmsnapv1.Operation) (*vmsnapv1.Operation, error) {
	show := a.showProgress(operation)
	defer show.close()
	cancelled := make(chan struct{})
	stop := context.AfterFunc(a.asked, func() {
		defer close(cancelled)
		a.cancel(daemon, operation.GetId(), show)
	})
	last, err := a.follow(a.forced, daemon, operation, show)
	if !stop() {
		<-cancelled
	}
	return last, err
}

// cancel asks for an operation to be cancelled, and says what came of it.
func (a *app) cancel(daemon *client.Client, id string, show progress) {
	show.note("cancelling; Ctrl-C again leaves the operation to itself")
	ctx, cancel := context.WithTimeout(a.forced, cancelTimeout)
	defer cancel()
	_, err := daemon.Operations().CancelOperation(ctx, connect.NewRequest(&vmsnapv1.CancelOperationRequest{Id: id}))
	if err != nil && a.forced.Err() == nil {
		_, message, _ := explain(err)
		show.note("not cancelled: " + message)
	}
}
