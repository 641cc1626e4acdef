package agent

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/freeze"
)

// thawLeftovers thaws every guest that an earlier agent left frozen. It runs
// before anything else: a frozen guest is an outage.
func (a *Agent) thawLeftovers(ctx context.Context) []freeze.Recovered {
	recoveries, err := freeze.Recover(ctx, a.cfg.Freezing)
	if err != nil {
		a.log.Error("freezes that an earlier run left behind", "error", err)
	}
	for _, r := range recoveries {
		q := r.Lease.Request
		a.tellLeftover(r)
		if r.Resolved() {
			a.log.Warn("a freeze was left behind", "vm", q.VM, "operation", q.Operation, "outcome", string(r.Outcome.End))
			continue
		}
		a.log.Error("a guest may still be frozen", "vm", q.VM, "operation", q.Operation, "error", r.Err)
	}
	return recoveries
}

// showUnresolved marks the VMs whose guests could not be thawed yet.
func (a *Agent) showUnresolved(recoveries []freeze.Recovered) {
	for _, r := range recoveries {
		a.mu.RLock()
		v := a.vms[r.Lease.Request.VMID]
		a.mu.RUnlock()
		if v == nil || r.Guard == nil || r.Resolved() {
			continue
		}
		v.mu.Lock() // the metrics are served already
		v.freeze = &FreezeView{Since: r.Lease.Since, Deadline: r.Lease.Deadline, Operation: r.Lease.Request.Operation, Unresolved: true}
		v.mu.Unlock()
		a.awaitThaw(v, r.Guard)
	}
}

// recover takes every operation over that an earlier agent left unfinished, to
// finish or revert it, and settles what stopped while no agent ran. It does not
// wait: a VM whose QEMU hangs keeps only its own operation from ending.
func (a *Agent) recover(ctx context.Context) {
	records, err := a.catalog.Operations(ctx, op.Filter{Active: true})
	if err != nil {
		a.log.Error("unfinished operations cannot be read", "error", err)
		return
	}
	a.mu.RLock()
	defer a.mu.RUnlock()
	taken := map[string]bool{}
	for _, rec := range slices.Backward(records) { // the oldest first: those that wait keep their order
		v := a.vms[rec.VMID]
		if rec.State == op.Queued && rec.Started.IsZero() {
			if err := a.requeue(ctx, v, rec); err != nil {
				a.log.Error("an operation that waited cannot be taken up", "operation", rec.ID, "vm", rec.VMName, "error", err)
			}
			continue
		}
		err := a.ops.Resume(rec, func(ctx context.Context, o *op.Op) error {
			a.attended(ctx, o, v, rec.Kind, rec.UID)
			err := a.recoverOne(ctx, o, v, rec)
			if !errors.Is(err, op.ErrLeave) {
				a.keepManifests(ctx, o, v, rec.Kind)
			}
			return err
		})
		if err != nil {
			a.log.Error("an unfinished operation cannot be taken over", "operation", rec.ID, "vm", rec.VMName, "error", err)
			continue
		}
		if v == nil {
			continue
		}
		taken[rec.VMID] = true
		a.group.Go(func() {
			if _, err := a.ops.Wait(ctx, rec.ID); err != nil {
				a.log.Warn("recovery was not awaited", "operation", rec.ID, "error", err)
			}
			a.recovered(ctx, v)
		})
	}
	for id, v := range a.vms {
		if !taken[id] {
			a.group.Go(func() { a.recovered(ctx, v) })
		}
	}
}

// recovered lets others change a VM's disks again.
func (a *Agent) recovered(ctx context.Context, v *vm) {
	v.release()
	if r, err := v.alone(); err == nil && r == nil {
		a.dropDetached(ctx, v, nil)
	}
	a.settleStopped(ctx, v)
	a.lookAgain(ctx, v)
}

// release lets go of the layers that were held since the agent's start.
func (v *vm) release() {
	if v.unfinished.CompareAndSwap(true, false) {
		v.changing.Unlock()
	}
}

// giveUpRecovery releases the VMs that recovery has not come to before the agent
// stops, so that nothing waits for them. No operation can start any more.
func (a *Agent) giveUpRecovery() {
	a.mu.RLock()
	defer a.mu.RUnlock()
	for _, v := range a.vms {
		v.release()
	}
}

// recoverOne brings one unfinished operation to its end.
func (a *Agent) recoverOne(ctx context.Context, o *op.Op, v *vm, rec op.Record) error {
	interrupted := errInterrupted()
	entries, err := a.journalOf(ctx, o)
	if err != nil {
		return err
	}
	a.recoverHooks(ctx, o, entries) // the guest is thawed
	switch rec.Kind {
	case op.KindGroup:
		return a.recoverGroup(ctx, rec)
	case op.KindGroupRestore:
		return a.recoverGroupRestore(ctx, rec)
	}
	if v == nil || rec.Kind == op.KindFreeze {
		return interrupted // the lease has been dealt with already
	}
	if err := awaitLaunchGuard(ctx, a.launchGuardLock(rec.ID)); err != nil {
		return err
	}
	var done string // the snapshot, when only the settling may be missing
	err = a.untilRecovered(ctx, o, func(ctx context.Context) (err error) {
		if done, err = a.committed(ctx, v, rec.ID); err != nil || done == "" && rec.Kind != op.KindSettle && rec.Kind != op.KindRepair {
			return err
		}
		return a.recoverSettling(ctx, o, entries)
	})
	switch {
	case err != nil:
		return err
	case rec.Kind == op.KindSettle, rec.Kind == op.KindRepair: // what else a repair does is one step each
		return interrupted
	case done != "":
		o.SetSnapshot(done)
		if rec.Kind == op.KindPreviewCommit {
			return a.discardOf(entries)
		}
		if rec.Kind == op.KindSnapshot {
			a.recoverEnded(ctx, o, v, rec, entries, done)
		}
		return nil
	}
	switch rec.Kind {
	case op.KindPreviewCommit:
		return a.recoverPreviewCommit(ctx, o, v)
	case op.KindRestore, op.KindPreview, op.KindPreviewUndo:
		return a.recoverRestore(ctx, o, v, rec, entries)
	case op.KindAttach:
		return a.recoverAttach(ctx, o, v, entries)
	case op.KindDetach:
		return a.recoverDetach(ctx, o, v, entries)
	case op.KindClone:
		return a.recoverClone(ctx, o, rec, entries)
	case op.KindDelete, op.KindUpkeep:
		return a.recoverDelete(ctx, o, v, rec, entries)
	case op.KindExport:
		return a.recoverExport(o, entries)
	}
	c := &cut{Agent: a, o: o, vm: v, cutAt: rec.Started}
	c.hooked()
	last, sent, err := c.load(ctx, rec, entries)
	if err != nil {
		return err
	}
	o.Cleanup(c.closeDirs)
	if len(c.disks) == 0 {
		return interrupted
	}
	if err := c.untilRecovered(ctx, o, func(ctx context.Context) error { return c.findProcess(ctx, last) }); err != nil {
		return err
	}
	if c.memory != nil {
		return c.recoverMemory(ctx, last, sent)
	}
	if c.discarded {
		c.done = true
		o.RevertAtLength("merge the overlays back", c.mergeBack)
		return interrupted
	}
	if !sent {
		return errors.Join(o.Step(ctx, "take back", c.takeBack), interrupted)
	}
	if happened, err := c.happened(ctx, last); err != nil {
		return err
	} else if !happened {
		return errors.Join(o.Step(ctx, "take back", c.takeBack), interrupted)
	}
	c.warn(warnAdopted, "", "vmsnapd ended after the cut; the snapshot was completed when it came back")
	if err := c.finish(ctx); err != nil {
		return err
	}
	c.ended(ctx)
	return nil
}

// journalOf returns what an operation that is taken over has journalled.
func (a *Agent) journalOf(ctx context.Context, o *op.Op) (entries []op.Entry, err error) {
	err = a.untilRecovered(ctx, o, func(ctx context.Context) error {
		entries, err = a.catalog.Journal(ctx, o.ID())
		return err
	})
	return entries, err
}

func errInterrupted() error {
	return fault.New(fault.Failed, "vmsnapd ended while the operation ran; it was taken back")
}

// committed returns the id of the snapshot that an operation has entered into
// the catalog, or "".
func (a *Agent) committed(ctx context.Context, v *vm, operation string) (string, error) {
	all, err := a.catalog.Snapshots(ctx, v.id)
	for _, s := range all {
		if s.Operation == operation {
			return s.ID, err
		}
	}
	return "", err
}

// load brings a cut back from its journal, and says whether its transaction
// may have been sent.
func (c *cut) load(ctx context.Context, rec op.Record, entries []op.Entry) (p prepared, sent bool, err error) {
	if err := json.Unmarshal(rec.Request, &c.req); err != nil {
		return p, false, err
	}
	c.hooks.choose(c.req)
	if g := c.req.Group; g != nil {
		c.groupCut = &catalog.GroupCut{Operation: g.Operation, Name: g.Name} // nobody knows the skew any more
	}
	c.req.UID, c.hooks.in.Operation.UID, c.hooks.in.Recovered = rec.UID, rec.UID, true
	c.quiesce = catalog.Quiesce{Requested: string(c.req.Quiesce), Reason: "vmsnapd ended before the guest confirmed that it was frozen at the cut"}
	for _, e := range entries {
		switch e.Kind {
		case entryPrepare, entryCut:
			p = prepared{}
			if err := json.Unmarshal(e.Data, &p); err != nil {
				return p, false, err
			}
			c.disks, c.excluded, c.partial, c.offline = p.Disks, p.Excluded, p.Partial, p.Offline
			c.req.Name, c.config = p.Name, p.Config
			if e.Kind == entryCut {
				sent, c.cutAt = true, e.Time
			}
		case entryDiscard:
			c.discarded = true
		case entryThawed:
			if err := json.Unmarshal(e.Data, &c.quiesce); err != nil {
				return p, false, err
			}
		}
	}
	for _, d := range c.disks {
		if err := c.untilRecovered(ctx, c.o, func(context.Context) error { return d.open() }); err != nil {
			return p, false, c.failure(d, err)
		}
	}
	return p, sent, c.loadMemory(entries)
}

func (c *cut) closeDirs() {
	for _, d := range c.disks {
		_ = d.close()
	}
}

// findProcess finds the QEMU process of the cut again, if it still runs, and
// waits for its monitor.
func (c *cut) findProcess(ctx context.Context, p prepared) error {
	if p.PID == 0 || !discover.Same(p.PID, p.StartTime) {
		return nil
	}
	_, r := c.runOf(discover.Process{PID: p.PID, StartTime: p.StartTime})
	if r == nil {
		return fault.New(fault.Failed, "VM %s: process %d runs and was not found", c.vm.name(), p.PID)
	}
	c.run = r
	for wait := askSoon; ; wait = min(2*wait, askAgain) {
		s, err := c.vm.monitorOf(r)
		if err == nil {
			c.session = s
			return nil
		}
		if !discover.Same(r.proc.PID, r.proc.StartTime) {
			c.run = nil
			return nil
		}
		if wait == askAgain {
			c.o.Logger().Warn("waiting for the VM's monitor", "error", err)
		}
		select {
		case <-c.stopping:
			return op.ErrLeave
		case <-time.After(wait):
		}
	}
}

// happened says whether a transaction that may have been sent took place.
func (c *cut) happened(ctx context.Context, p prepared) (happened bool, err error) {
	err = c.untilRecovered(ctx, c.o, func(ctx context.Context) (err error) {
		happened, err = c.seemsToHaveHappened(ctx, p)
		return err
	})
	return happened, err
}

func (c *cut) seemsToHaveHappened(ctx context.Context, p prepared) (bool, error) {
	g, err := c.askGraph(ctx, p)
	if err != nil {
		return false, err
	}
	if c.run == nil {
		return c.happenedBeforeEnd()
	}
	if !c.inUse(g) {
		return false, nil
	}
	for _, d := range c.disks {
		b := g.Nodes[g.Nodes[d.overlay().Node].Child("backing")]
		if b == nil {
			return false, fault.New(fault.Failed, "VM %s: disk %s: QEMU does not describe the layer below %s", c.vm.name(), d.Device, d.Overlay)
		}
		d.base = blockdev.Layer{Node: b, File: g.Nodes[b.Child("file")], Filename: b.Filename}
	}
	return true, nil
}

// askGraph asks QEMU for its block graph until it answers or is gone. An answer
// that does not come is no answer.
func (c *cut) askGraph(ctx context.Context, p prepared) (*blockdev.Graph, error) {
	for c.run != nil {
		g, err := blockdev.ReadGraph(ctx, c.session)
		if err == nil || ctx.Err() != nil {
			return g, err
		}
		c.o.Logger().Warn("QEMU does not tell its block graph", "error", err)
		c.run, c.session = nil, nil
		select {
		case <-c.stopping:
			return nil, op.ErrLeave
		case <-time.After(askAgain):
		}
		if err := c.findProcess(ctx, p); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

// happenedBeforeEnd decides for a QEMU that is gone. Overlays are adopted: an
// empty one equals its base. Only when a QEMU has been started on the base
// since, which wrote to it, is an empty overlay given up; one that holds data
// is then an error that no program should decide.
func (c *cut) happenedBeforeEnd() (bool, error) {
	r, err := c.vm.alone()
	if err != nil || r == nil {
		return err == nil, err
	}
	for _, d := range c.disks {
		launch, err := d.dir.Lead(d.Launch)
		if err != nil {
			return false, c.failure(d, err)
		}
		overlay, err := d.overlayDir.Stat(d.Overlay)
		if err != nil {
			return false, c.failure(d, err)
		}
		base, err := blockdev.DenyNewWriters(d.Prefix + d.baseDir.Path(d.Base))
		if err != nil {
			return false, c.failure(d, err)
		}
		written, err := base.Written()
		if err := errors.Join(err, base.Close()); err != nil {
			return false, c.failure(d, err)
		}
		if !written && (launch.FileID == overlay.FileID || d.Settle != SettleLive) {
			continue // the VM came up on the overlay, or could not come up at all
		}
		empty, err := blockdev.IsEmpty(d.Prefix + d.overlayDir.Path(d.Overlay))
		if err != nil {
			return false, c.failure(d, err)
		}
		if !empty {
			return false, &undecidable{fault.New(fault.Failed, "VM %s: disk %s was started on %s although the overlay %s holds newer data; both files are kept",
				c.vm.name(), d.Device, d.dir.Path(d.Launch), d.overlayDir.Path(d.Overlay)).
				WithHint("stop the VM, and decide which of the two states is wanted")}
		}
		return false, nil
	}
	return true, nil
}

// undecidable is an error of recovery that no program should decide on.
type undecidable struct{ err error }

func (e *undecidable) Error() string { return e.err.Error() }

func (e *undecidable) Unwrap() error { return e.err }

// untilRecovered tries f until it works or there is something for a person to
// decide. Only the journal knows what the operation has made, and it is dropped
// when the operation ends; so an operation ends without having been recovered
// only when somebody cancels it.
func (a *Agent) untilRecovered(ctx context.Context, o *op.Op, f func(context.Context) error) error {
	for told := false; ; told = true {
		err := f(ctx)
		if _, decide := errors.AsType[*undecidable](err); err == nil || decide || errors.Is(err, op.ErrLeave) {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		o.Logger().Error("an operation that was interrupted cannot be recovered yet", "error", err)
		if !told { // the log has the rest: this may go on for hours
			o.Warn(op.Warning{Code: warnRecoveryWaits, Message: "what an earlier vmsnapd left unfinished cannot be finished or taken back yet; it is tried again each second: " + err.Error()})
		}
		select {
		case <-a.stopping:
			return op.ErrLeave
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(askAgain):
		}
	}
}

// takeBack removes everything that the cut made.
func (c *cut) takeBack(ctx context.Context) error {
	return c.untilRecovered(ctx, c.o, c.tryTakeBack)
}

func (c *cut) tryTakeBack(ctx context.Context) error {
	var errs []error
	for _, d := range c.disks {
		errs = append(errs, c.unbuild(ctx, d))
	}
	return errors.Join(errs...)
}
