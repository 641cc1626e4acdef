package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/vmsnap/vmsnap/api/client"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

const (
	// An agent that is restarted is back within seconds. Nothing announces it.
	askAgain = 250 * time.Millisecond
	// An agent that does not answer a question that it need not ask anybody about.
	callLimit = 15 * time.Second
	// An operation that a restart cut off is tried so often.
	attempts = 5
)

var quiesces = map[string]vmsnapv1.Quiesce{
	"require": vmsnapv1.Quiesce_QUIESCE_REQUIRE, "prefer": vmsnapv1.Quiesce_QUIESCE_PREFER, "none": vmsnapv1.Quiesce_QUIESCE_NONE,
}

// round is one snapshot of each VM.
type round struct {
	settings

	mu     sync.Mutex
	out    io.Writer
	failed []error
}

func newRound(s settings, out io.Writer) *round { return &round{settings: s, out: out} }

// say writes a line of progress.
func (r *round) say(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, _ = fmt.Fprintf(r.out, format+"\n", args...)
}

func (r *round) fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failed = append(r.failed, err)
}

// take takes the round at all agents at once, and returns what did not work.
func (r *round) take(ctx context.Context) []error {
	var working sync.WaitGroup
	for _, a := range r.agents {
		working.Go(func() {
			c := client.New(a.socket)
			defer c.Close()
			if err := r.takeAt(ctx, a, c); err != nil {
				r.fail(fmt.Errorf("%s: %w", a.name, err))
			}
		})
	}
	working.Wait()
	return r.failed
}

// takeAt takes the round at one agent, all its VMs at once: how many operations
// run at the same time is the agent's own affair.
func (r *round) takeAt(ctx context.Context, a agent, c *client.Client) error {
	vms, err := r.vms(ctx, a, c)
	if err != nil {
		return fmt.Errorf("its VMs: %w", err)
	}
	var working sync.WaitGroup
	for _, vm := range vms {
		working.Go(func() {
			if err := r.snapshot(ctx, a, c, vm); err != nil {
				r.fail(fmt.Errorf("%s/%s: %w", a.name, vm.GetName(), err))
			}
		})
	}
	working.Wait()
	return nil
}

// vms asks an agent for its VMs until it answers.
func (r *round) vms(ctx context.Context, a agent, c *client.Client) ([]*vmsnapv1.VM, error) {
	var chosen []*vmsnapv1.VM
	err := r.insist(ctx, a.name, func(ctx context.Context) error {
		res, err := c.VMs().ListVMs(ctx, connect.NewRequest(&vmsnapv1.ListVMsRequest{}))
		if err != nil {
			return err
		}
		chosen = nil
		for _, vm := range res.Msg.GetVms() {
			if ok, err := path.Match(r.pattern, vm.GetName()); ok && err == nil {
				chosen = append(chosen, vm)
			}
		}
		return nil
	})
	return chosen, err
}

// insist calls an agent until the call gets through. Only calls that may be
// repeated come here: those that change nothing, and those with a request id.
func (r *round) insist(ctx context.Context, who string, call func(context.Context) error) error {
	for told := false; ; told = true {
		limited, cancel := context.WithTimeout(ctx, callLimit)
		err := call(limited)
		cancel()
		if err == nil || ctx.Err() != nil || !passes(err) {
			return errors.Join(err, ctx.Err())
		}
		if !told {
			r.say("%s: asked again, since %v", who, err)
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-time.After(askAgain):
		}
	}
}

// passes reports whether an error is one of an agent that is being restarted, or
// hangs. The answer to a call may have been lost with it.
func passes(err error) bool {
	if client.OutcomeUnknown(err) {
		return true
	}
	told, ok := client.ErrorOf(err)
	return ok && told.GetCode() == vmsnapv1.ErrorCode_ERROR_CODE_UNREACHABLE
}

// snapshot takes the snapshot of one VM.
func (r *round) snapshot(ctx context.Context, a agent, c *client.Client, vm *vmsnapv1.VM) error {
	who := a.name + "/" + vm.GetName()
	for attempt := 1; ; attempt++ {
		operation, err := r.attempt(ctx, c, who, vm, attempt)
		if err == nil {
			r.say("%s: %s taken, snapshot %s", who, r.round, operation.GetSnapshotId())
			return nil
		}
		taken, asked := r.isTaken(ctx, c, who, vm)
		switch {
		case asked != nil:
			return errors.Join(err, asked)
		case taken: // by an earlier run of this round, or by an operation whose end was not seen
			r.say("%s: %s is there", who, r.round)
			return nil
		case attempt == attempts || !wasCutOff(err):
			return err
		}
		r.say("%s: tried once more, since %v", who, err)
	}
}

// wasCutOff reports whether an operation failed by its agent's end, which has
// taken it back. Other failures come again.
func wasCutOff(err error) bool {
	failed, ok := errors.AsType[*client.OperationError](err)
	return ok && failed.Operation.GetError().GetCode() == vmsnapv1.ErrorCode_ERROR_CODE_FAILED
}

// attempt begins an operation, or finds the one that was begun before, and follows
// it to its end.
func (r *round) attempt(ctx context.Context, c *client.Client, who string, vm *vmsnapv1.VM, attempt int) (*vmsnapv1.Operation, error) {
	request := &vmsnapv1.CreateSnapshotRequest{
		Vm: vm.GetId(), Name: r.round, Quiesce: quiesces[r.quiesce], RequestId: fmt.Sprintf("%s %s %d", r.round, vm.GetId(), attempt),
	}
	for {
		var operation *vmsnapv1.Operation
		err := r.insist(ctx, who, func(ctx context.Context) error {
			res, err := c.Snapshots().CreateSnapshot(ctx, connect.NewRequest(request))
			if err != nil {
				return err
			}
			operation = res.Msg.GetOperation()
			return nil
		})
		if err == nil {
			return c.Follow(ctx, operation.GetId(), func(o *vmsnapv1.Operation) { r.progress(who, o) })
		}
		told, _ := client.ErrorOf(err)
		if told.GetCode() != vmsnapv1.ErrorCode_ERROR_CODE_BUSY || told.GetOperationId() == "" {
			return nil, err
		}
		r.say("%s: waits for operation %s", who, told.GetOperationId())
		if _, err := c.Wait(ctx, told.GetOperationId()); err != nil && !ended(err) {
			return nil, err
		}
	}
}

// ended reports whether an operation that was waited for has come to its end,
// whichever it was.
func ended(err error) bool {
	_, is := errors.AsType[*client.OperationError](err)
	return is
}

// progress shows an operation.
func (r *round) progress(who string, o *vmsnapv1.Operation) {
	p := o.GetProgress()
	if p.GetTotal() == 0 {
		r.say("%s: %s", who, o.GetState())
		return
	}
	r.say("%s: %s, %d of %d %s", who, o.GetState(), p.GetDone(), p.GetTotal(), p.GetUnit())
}

// isTaken reports whether the VM has its snapshot of this round.
func (r *round) isTaken(ctx context.Context, c *client.Client, who string, vm *vmsnapv1.VM) (bool, error) {
	taken := false
	err := r.insist(ctx, who, func(ctx context.Context) error {
		res, err := c.Snapshots().ListSnapshots(ctx, connect.NewRequest(&vmsnapv1.ListSnapshotsRequest{Vm: vm.GetId()}))
		if err != nil {
			return err
		}
		for _, s := range res.Msg.GetSnapshots() {
			taken = taken || s.GetName() == r.round
		}
		return nil
	})
	return taken, err
}
