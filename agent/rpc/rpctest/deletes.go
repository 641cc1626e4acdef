package rpctest

import (
	"context"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
)

// DeleteSnapshots is an error unless it is scripted.
func (b *Backend) DeleteSnapshots(ctx context.Context, req agent.DeleteRequest) (op.Record, error) {
	if f := b.scripted().Delete; f != nil {
		return f(ctx, req)
	}
	return op.Record{}, fault.New(fault.Unsupported, "no script for deleting snapshots")
}

// PlanDelete is an error unless it is scripted.
func (b *Backend) PlanDelete(ctx context.Context, req agent.DeleteRequest) (agent.DeletePlan, error) {
	if f := b.scripted().PlanDelete; f != nil {
		return f(ctx, req)
	}
	return agent.DeletePlan{}, fault.New(fault.Unsupported, "no script for planning deletions")
}

// PauseOperation pauses an operation that has not ended.
func (b *Backend) PauseOperation(_ context.Context, id string) (op.Record, error) {
	return b.rest(id, true)
}

// ResumeOperation lets it go on.
func (b *Backend) ResumeOperation(_ context.Context, id string) (op.Record, error) {
	return b.rest(id, false)
}

func (b *Backend) rest(id string, paused bool) (op.Record, error) {
	r, _, err := b.operation(id)
	switch {
	case err != nil:
		return r, err
	case r.State.Final():
		return r, fault.New(fault.TooLate, "operation %s has ended already", id)
	}
	r.Paused = paused
	return b.PutOperation(r), nil
}
