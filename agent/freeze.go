package agent

import (
	"context"
	"errors"
	"time"

	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/hook"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/freeze"
	"github.com/vmsnap/vmsnap/monitor"
	"github.com/vmsnap/vmsnap/qga"
)

// held is a freeze that an operator asked for.
type held struct {
	frozen chan FreezeView // receives the freeze once
	thaw   chan struct{}   // receives the request to thaw
	result ThawResult      // valid once the operation has ended
}

// Freeze freezes a guest until Thaw or the end of the lease. It returns when
// the guest is frozen. The freeze is an operation: it keeps others off the VM,
// and cancelling it thaws.
func (a *Agent) Freeze(ctx context.Context, req FreezeRequest) (FreezeView, error) {
	v, err := a.find(req.VM)
	if err != nil {
		return FreezeView{}, err
	}
	if err := checkFreezeTimes(&req.FreezeTimeout, &req.Lease); err != nil {
		return FreezeView{}, err
	}
	h := &held{frozen: make(chan FreezeView, 1), thaw: make(chan struct{}, 1)}
	rec, err := a.begin(ctx, op.Spec{Kind: op.KindFreeze, VMID: v.id, VMName: v.name(), Request: req, UID: req.UID, Light: true},
		func(ctx context.Context, o *op.Op) error { return a.hold(ctx, o, v, req, h) })
	if err != nil {
		return FreezeView{}, err
	}
	ended := make(chan op.Record, 1)
	go func() {
		if rec, err := a.ops.Wait(ctx, rec.ID); err == nil {
			ended <- rec
		}
	}()
	select {
	case f := <-h.frozen:
		if ctx.Err() == nil {
			return f, nil
		}
	case rec := <-ended:
		return FreezeView{}, failureOf(rec)
	case <-ctx.Done():
	}
	// The caller is gone, and does not know of the freeze: nobody would thaw.
	_, err = a.ops.Cancel(context.WithoutCancel(ctx), rec.ID)
	return FreezeView{}, errors.Join(context.Cause(ctx), err)
}

// failureOf turns the end of an operation into an error; nil when it succeeded.
func failureOf(rec op.Record) error {
	if rec.Failure == nil {
		return nil
	}
	return fault.New(rec.Failure.Kind, "%s", rec.Failure.Message).WithHint("%s", rec.Failure.Hint)
}

// hold is the recipe of Freeze.
func (a *Agent) hold(ctx context.Context, o *op.Op, v *vm, req FreezeRequest, h *held) error {
	r, err := v.known(ctx)
	if err != nil {
		return err
	}
	if r == nil {
		return fault.New(fault.Unsupported, "VM %s is stopped: there is no guest to freeze", v.name())
	}
	hooks := a.hooksOf(o, v, op.KindFreeze, req.UID)
	o.Plan(3 + hooks.count(hook.PreFreeze, hook.PostThaw))
	if err := hooks.before(ctx, hook.PreFreeze, hook.PostThaw); err != nil {
		return err
	}
	err = a.holdFrozen(ctx, o, v, r, req, h)
	hooks.after(ctx)
	return err
}

// holdFrozen freezes, and thaws at the latest when it returns.
func (a *Agent) holdFrozen(ctx context.Context, o *op.Op, v *vm, r *run, req FreezeRequest, h *held) error {
	var guard *freeze.Guard
	err := o.Step(ctx, "freeze", func(ctx context.Context) error {
		s, err := v.monitorOf(r)
		if err != nil {
			return err
		}
		if st, err := s.QueryStatus(ctx); err != nil {
			return fault.New(fault.Unresponsive, "VM %s: %w", v.name(), err)
		} else if st.Status != monitor.RunStateRunning {
			return fault.New(fault.Unsupported, "VM %s is %s: its guest cannot be frozen", v.name(), st.Status)
		}
		if guard, err = a.startGuard(ctx, v, r, o.ID(), req.Mountpoints, req.FreezeTimeout, req.Lease); err != nil {
			return fault.New(fault.NotQuiesced, "VM %s cannot be frozen: %w", v.name(), err)
		}
		frozen, err := guard.Freeze(ctx)
		if err != nil {
			thaw := guard.Close()
			a.endFreeze(v, guard, thaw)
			return errors.Join(fault.New(fault.NotQuiesced, "VM %s cannot be frozen: %w", v.name(), err), thaw)
		}
		h.frozen <- a.setFrozen(v, o.ID(), frozen, h)
		return nil
	})
	if err != nil {
		return err
	}
	defer func() { a.endFreeze(v, guard, guard.Close()) }()
	err = o.Step(ctx, "frozen", func(ctx context.Context) error { return h.untilThaw(ctx, v.name(), guard, req.Lease) })
	if err != nil {
		return err
	}
	return o.Step(context.WithoutCancel(ctx), "thaw", func(ctx context.Context) error {
		thawed, err := guard.Thaw(ctx)
		if err != nil {
			return fault.New(fault.Unresponsive, "VM %s: thaw: %w", v.name(), err).WithHint(hintUnresolved)
		}
		h.result = ThawResult{WasFrozen: thawed.Verified, Window: thawed.Window}
		if a.cfg.OnFreezeWindow != nil {
			a.cfg.OnFreezeWindow(thawed.Window)
		}
		return nil
	})
}

// hintUnresolved is what there is to do about a guest that may be frozen.
const hintUnresolved = "it is thawed as soon as its guest agent answers; look for a freeze hook that hangs, or restart qemu-ga"

// untilThaw returns when somebody asks for the thaw. That the freeze ends in
// any other way, or does not end with the lease, is a failure.
func (h *held) untilThaw(ctx context.Context, vm string, guard *freeze.Guard, lease time.Duration) error {
	select {
	case <-h.thaw:
		return nil
	case <-guard.Unresolved():
		return fault.New(fault.Unresponsive, "VM %s: the freeze was to end (lease %s), and the guest does not answer the thaw", vm, lease).
			WithHint(hintUnresolved)
	case <-guard.Done():
	case <-ctx.Done():
		return errors.Join(context.Cause(ctx), guard.Close())
	}
	if o := guard.Outcome(); o.End != freeze.LeaseExpired {
		return fault.New(fault.Failed, "VM %s is not held frozen any more: %s", vm, o.Reason)
	}
	return fault.New(fault.Failed, "VM %s was thawed by its lease of %s: nobody asked for the thaw before", vm, lease)
}

// Thaw ends a freeze. A guest that is frozen by something else, or by an agent
// that is long gone, is thawed as well: that is what an operator means.
func (a *Agent) Thaw(ctx context.Context, ref string) (ThawResult, error) {
	v, err := a.find(ref)
	if err != nil {
		return ThawResult{}, err
	}
	v.mu.Lock()
	h, f := v.held, v.freeze
	v.mu.Unlock()
	switch {
	case h != nil:
		select {
		case h.thaw <- struct{}{}:
		default: // somebody else asked already
		}
		rec, err := a.ops.Wait(ctx, f.Operation)
		if err != nil {
			return ThawResult{}, err
		}
		return h.result, failureOf(rec)
	case f != nil && !f.Unresolved:
		return ThawResult{}, fault.New(fault.Busy, "VM %s is frozen by operation %s, which thaws it", v.name(), f.Operation).
			WithHint("vmsnap operation cancel %s ends it", f.Operation)
	}
	return a.thawForeign(ctx, v)
}

// thawForeign thaws a guest that the agent did not freeze.
func (a *Agent) thawForeign(ctx context.Context, v *vm) (ThawResult, error) {
	r, err := v.alone()
	if err != nil {
		return ThawResult{}, err
	}
	if r == nil || r.proc.GuestAgent.Path == "" {
		return ThawResult{}, fault.New(fault.Unsupported, "VM %s has no guest agent to ask for a thaw", v.name())
	}
	addr, err := r.proc.Address(r.proc.GuestAgent)
	if err != nil {
		return ThawResult{}, err
	}
	c, err := qga.Dial(ctx, addr, qga.DefaultLimits)
	if err != nil {
		return ThawResult{}, fault.New(fault.Unresponsive, "VM %s: %w", v.name(), err)
	}
	defer func() { _ = c.Close() }()
	status, err := c.FreezeStatus(ctx)
	if err != nil {
		return ThawResult{}, fault.New(fault.Unresponsive, "VM %s: %w", v.name(), err)
	}
	if status == qga.Thawed {
		return ThawResult{}, nil
	}
	if _, err := c.Thaw(ctx); err != nil {
		return ThawResult{}, fault.New(fault.Unresponsive, "VM %s: %w", v.name(), err)
	}
	return ThawResult{WasFrozen: true}, nil
}

// startGuard starts the process that will hold the freeze.
func (a *Agent) startGuard(ctx context.Context, v *vm, r *run, operation string, mountpoints []string, timeout, lease time.Duration) (*freeze.Guard, error) {
	if r.proc.GuestAgent.Path == "" {
		return nil, fault.New(fault.NotQuiesced, "the VM has no guest-agent channel").
			WithHint("give it a virtserialport named org.qemu.guest_agent.0 and run qemu-ga in the guest")
	}
	addr, err := r.proc.Address(r.proc.GuestAgent)
	if err != nil {
		return nil, err
	}
	return freeze.Start(ctx, a.cfg.Freezing, freeze.Request{
		VM: v.name(), VMID: v.id, Operation: operation, AgentSocket: addr,
		QEMU:        freeze.Process{PID: r.proc.PID, StartTime: r.proc.StartTime},
		Mountpoints: mountpoints, FreezeTimeout: timeout, Lease: lease,
	})
}

// setFrozen shows the VM as frozen.
func (a *Agent) setFrozen(v *vm, operation string, f freeze.Frozen, h *held) FreezeView {
	view := FreezeView{Since: f.At, Deadline: f.Deadline, Frozen: f.Count, Total: f.Total, Operation: operation}
	v.mu.Lock()
	v.freeze, v.held = &view, h
	v.mu.Unlock()
	a.tellFrozen(v, view, h)
	return view
}

// endFreeze shows the VM as thawed, or, when the guest has not answered the
// thaw, as unresolved until the guard says that it has.
func (a *Agent) endFreeze(v *vm, g *freeze.Guard, thaw error) {
	a.tellThawed(v, thaw)
	v.mu.Lock()
	v.held = nil
	if thaw == nil {
		v.freeze = nil
		v.mu.Unlock()
		return
	}
	f := FreezeView{Since: time.Now()}
	if v.freeze != nil {
		f = *v.freeze
	}
	f.Unresolved = true
	v.freeze = &f
	v.mu.Unlock()
	a.awaitThaw(v, g)
}

// awaitThaw shows the VM as thawed when the guard says so. The guard outlives
// the agent, so nobody waits for this.
func (a *Agent) awaitThaw(v *vm, g *freeze.Guard) {
	go func() {
		if !g.Outcome().End.Resolved() {
			return
		}
		a.tellThawed(v, nil)
		v.mu.Lock()
		v.freeze = nil
		v.mu.Unlock()
	}()
}
