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
	"github.com/vmsnap/vmsnap/agent/hook"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/freeze"
	"github.com/vmsnap/vmsnap/monitor"
)

// CreateSnapshot starts a snapshot and returns its operation.
func (a *Agent) CreateSnapshot(ctx context.Context, req SnapshotRequest) (op.Record, error) {
	v, err := a.find(req.VM)
	if err != nil {
		return op.Record{}, err
	}
	if err := a.checkRequest(&req); err != nil {
		return op.Record{}, err
	}
	spec := op.Spec{Kind: op.KindSnapshot, VMID: v.id, VMName: v.name(), Request: req, RequestID: req.RequestID, UID: req.UID}
	return a.begin(ctx, spec, a.snapshotRecipe(v, req))
}

// snapshotRecipe is the recipe of a request that was checked.
func (a *Agent) snapshotRecipe(v *vm, req SnapshotRequest) op.Recipe {
	return func(ctx context.Context, o *op.Op) error {
		v.change(ctx, a, o)
		return a.snapshot(ctx, o, v, req, nil)
	}
}

// change keeps others from taking the VM's disks as they are meanwhile for what
// they will be.
func (v *vm) change(ctx context.Context, a *Agent, o *op.Op) {
	v.changing.Lock()
	o.Cleanup(func() {
		v.changing.Unlock()
		a.lookAgain(context.WithoutCancel(ctx), v)
	})
}

// snapshot is the recipe. It runs alone on its VM, or m keeps it together with
// those of a group.
func (a *Agent) snapshot(ctx context.Context, o *op.Op, v *vm, req SnapshotRequest, m *member) error {
	c := &cut{Agent: a, o: o, vm: v, req: req, member: m, quiesce: catalog.Quiesce{Requested: string(req.Quiesce)}}
	if req.Name == "" {
		c.req.Name = generatedName(time.Now(), o.ID())
	}
	var p *preflight
	err := o.Step(ctx, "preflight", func(ctx context.Context) (err error) {
		if p, err = a.preflight(ctx, v, c.req, true); err != nil {
			return err
		}
		for _, w := range p.plan.Warnings {
			c.warn(w.Code, w.Disk, w.Message)
		}
		return p.blocker(req.Strict)
	})
	if p != nil {
		o.Cleanup(p.close)
	}
	if err != nil {
		return err
	}
	c.run, c.disks, c.excluded, c.partial, c.memory = p.run, p.disks, p.excluded, p.partial, p.memory
	c.hooked()
	if !p.live && m != nil {
		return fault.New(fault.Unsupported, "VM %s is stopped, and a group is cut of VMs that run", v.name()).
			WithHint("leave it out, or take the others with --best-effort")
	}
	if !p.live {
		return c.takeStopped(ctx, p.plan.Consistency == catalog.Offline)
	}
	return c.take(ctx, p.cannot)
}

// cut is a snapshot being taken.
type cut struct {
	*Agent
	o         *op.Op
	vm        *vm
	run       *run // nil for a stopped VM
	session   *monitor.Session
	req       SnapshotRequest
	captured  configuration   // of a VM that runs
	config    json.RawMessage // the same, or of a stopped VM what is known
	disks     []*cutDisk
	excluded  []catalog.SnapshotDisk
	warnings  []op.Warning
	partial   bool // a disk that was asked for dropped out
	automatic bool // nobody asked for the snapshot
	offline   bool // stopped by a shutdown that was witnessed
	quiesce   catalog.Quiesce
	guard     *freeze.Guard // nil when nothing is frozen
	launch    *launchGuard  // from before the transaction until the launch paths are right
	memory    *memory       // nil when memory is not saved
	hooks     *hooks
	member    *member           // nil when it is not taken together with others
	groupCut  *catalog.GroupCut // what the group came to
	discarded bool              // an earlier agent had begun to merge it back
	taken     *catalog.Snapshot // once it is in the catalog
	done      bool              // the transaction took place
	settled   bool              // for good
	frozen    freeze.Frozen
	cutAt     time.Time
}

func (c *cut) warn(code, disk, message string) {
	w := op.Warning{Code: code, Disk: disk, Message: message}
	if slices.Contains(c.warnings, w) {
		return // another attempt at the same
	}
	c.warnings = append(c.warnings, w)
	c.o.Warn(w)
}

// failure gives an error of one disk a kind and the words an operator needs.
func (c *cut) failure(d *cutDisk, err error) error {
	return fault.New(kindOf(err), "VM %s: disk %s: %w", c.vm.name(), d.Device, err)
}

// take builds the overlays, freezes, cuts, thaws, settles and commits.
// cannotFreeze says why the guest is not even asked to freeze.
//
// Until the transaction is sent every effect has its revert. From then on the
// overlays may hold what the guest writes: they are reverted only if QEMU
// answers that the transaction failed, and adopted in every other case.
func (c *cut) take(ctx context.Context, cannotFreeze string) error {
	c.o.Plan(c.steps(cannotFreeze))
	err := c.toCut(ctx, cannotFreeze)
	if !c.done {
		c.member.drop(err)
		return c.beforeReverts(ctx, err)
	}
	// The cut has happened, and the guest is thawed whatever comes next.
	whole := context.WithoutCancel(ctx)
	c.joinThaw(whole)
	if c.guard != nil {
		thaw := c.o.Step(whole, "thaw", c.thawGuest)
		if err = errors.Join(err, thaw); thaw != nil {
			err = errors.Join(err, c.release(whole))
		}
	}
	c.run.hush(hushAfter)
	defer c.hooks.after(whole) // when it has not come to where they belong
	if err == nil {
		err = c.joinEnd(whole)
	}
	switch {
	case err != nil:
		return err
	case c.memory != nil:
		return c.finishWithMemory(ctx)
	default:
		if err := c.finish(whole); err != nil {
			return err
		}
		c.ended(whole)
		return nil
	}
}

// steps returns the number of steps that the snapshot will take.
func (c *cut) steps(cannotFreeze string) int {
	n := 5 // preflight, overlays, cut, settle, commit
	if cannotFreeze == "" && c.req.Quiesce != QuiesceNone {
		n += 3 // guard, freeze, thaw
	}
	if c.memory != nil {
		n += 2 // target, memory
	}
	if c.req.Compress || c.memory != nil && c.memory.Recipient != "" {
		n++ // compress or encrypt
	}
	return n + c.hooks.count(hook.PreFreeze, hook.PostThaw, hook.PostSnapshot)
}

// toCut does everything up to the cut, and the cut.
func (c *cut) toCut(ctx context.Context, cannotFreeze string) error {
	if err := c.hooks.before(ctx, hook.PreFreeze, hook.PostThaw); err != nil {
		return err
	}
	if cannotFreeze != "" {
		c.notQuiesced(cannotFreeze)
	} else if c.req.Quiesce != QuiesceNone {
		if err := c.o.Step(ctx, "guard", c.guardGuest); err != nil {
			return err
		}
	}
	if err := c.o.Step(ctx, "overlays", c.build); err != nil {
		return err
	}
	if c.memory != nil {
		if err := c.o.Step(ctx, "target", c.prepareMemory); err != nil {
			return err
		}
	}
	if err := c.joinFreeze(ctx); err != nil {
		return err
	}
	c.run.hush(hushWindow)
	if c.guard != nil {
		if err := c.o.Step(ctx, "freeze", c.freezeGuest); err != nil {
			return err
		}
	}
	if err := c.joinCut(ctx); err != nil {
		return err
	}
	c.run.hush(hushWindow)
	if c.memory != nil {
		return c.o.Step(ctx, "cut", c.transactWithMemory)
	}
	return c.o.Step(ctx, "cut", c.transact)
}

// build makes the overlays' files and their nodes in QEMU.
func (c *cut) build(ctx context.Context) (err error) {
	if c.session, err = c.vm.monitorOf(c.run); err != nil {
		return err
	}
	if c.captured, err = c.run.configuration(ctx, c.session); err != nil {
		return err
	}
	if c.config, err = json.Marshal(c.captured); err != nil {
		return err
	}
	for i, d := range c.disks {
		d.name(c.o.ID(), i)
	}
	if err := c.o.Journal(ctx, entryPrepare, c.prepared()); err != nil {
		return err
	}
	var built []*cutDisk
	for _, d := range c.disks {
		err := c.buildOne(ctx, d)
		switch {
		case err == nil:
			built = append(built, d)
		case c.req.AllowPartial && ctx.Err() == nil && !errors.Is(err, errLeftOver):
			c.partial = true
			c.warn(warnDropped, d.Device, "left out: "+err.Error())
			c.excluded = append(c.excluded, d.leftOut())
		default:
			return c.failure(d, err)
		}
	}
	if c.disks = built; len(built) == 0 {
		return fault.New(fault.Failed, "VM %s: every disk dropped out", c.vm.name())
	}
	if c.launch, err = startLaunchGuard(ctx, c.cfg.LaunchGuard, c.launchGuardLock(c.o.ID()), c.disks); err != nil {
		return err
	}
	c.o.Revert("release the launch guard", func(context.Context) error { return c.launch.release() })
	return nil
}

// errLeftOver means that a failed overlay could not be taken back at once.
var errLeftOver = errors.New("not all of it could be taken back")

// buildOne makes one overlay. What it made is taken back by its revert, but at
// once when it fails and the snapshot goes on without it.
func (c *cut) buildOne(ctx context.Context, d *cutDisk) error {
	if err := d.makeNames(); err != nil {
		return err
	}
	c.o.Revert("remove overlay "+d.Overlay, func(ctx context.Context) error { return c.unbuild(ctx, d) })
	err := d.build(ctx, c.session)
	if err == nil {
		return nil
	}
	if !c.req.AllowPartial {
		return err // the revert is next
	}
	if undone := c.unbuild(ctx, d); undone != nil {
		return errors.Join(err, errLeftOver, undone)
	}
	return err
}

// unbuild removes one overlay's nodes and files. A file that a living QEMU has
// open stays.
func (c *cut) unbuild(ctx context.Context, d *cutDisk) error {
	for c.run != nil && discover.Same(c.run.proc.PID, c.run.proc.StartTime) {
		s, err := c.vm.monitorOf(c.run)
		if err == nil {
			err = d.overlay().Remove(ctx, s)
		}
		if err == nil {
			break
		}
		if kindOf(err) != fault.Unresponsive {
			return err
		}
		if waited := c.awaitAnswer(ctx); waited != nil {
			return errors.Join(err, waited)
		}
	}
	return d.removeNames()
}

// guardGuest starts the guard. It comes before the overlays, because a guest
// that was just asked what it has mounted takes longer to freeze.
func (c *cut) guardGuest(ctx context.Context) error {
	g, err := c.startGuard(ctx, c.vm, c.run, c.o.ID(), c.req.Mountpoints, c.req.FreezeTimeout, c.req.Lease)
	if err != nil {
		return c.unfrozen(ctx, err)
	}
	c.guard = g
	c.o.Revert("end the guard", c.release)
	return nil
}

// release ends the guard, which thaws what it has frozen.
func (c *cut) release(context.Context) error {
	g := c.guard
	if g == nil {
		return nil // it has been told to end
	}
	c.guard = nil
	err := g.Close()
	c.endFreeze(c.vm, g, err)
	return err
}

// unfrozen is what becomes of a guest that cannot be frozen: without
// quiesce=require it is recorded and does not stop the snapshot.
func (c *cut) unfrozen(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case c.req.Quiesce == QuiesceRequire:
		return fault.New(fault.NotQuiesced, "VM %s cannot be quiesced: %w", c.vm.name(), err).
			WithHint("--quiesce=prefer takes a crash-consistent snapshot instead")
	}
	c.notQuiesced(err.Error())
	return nil
}

// freezeGuest freezes under a lease.
func (c *cut) freezeGuest(ctx context.Context) error {
	// The intent of the cut is durable before the guest is frozen, so that
	// nothing has to reach the disk while it is.
	if c.member == nil { // else it is
		if err := c.announce(ctx); err != nil {
			return err
		}
	}
	c.o.Revert("thaw the guest", c.release) // before anything else is reverted
	frozen, err := c.guard.Freeze(ctx)
	if err != nil {
		if thaw := c.release(ctx); thaw != nil {
			c.thawUnresolved(thaw)
		}
		return c.unfrozen(ctx, err)
	}
	c.frozen = frozen
	c.setFrozen(c.vm, c.o.ID(), frozen, nil)
	return nil
}

// thawUnresolved records that the guest may stay frozen.
func (c *cut) thawUnresolved(err error) {
	c.warn(warnThawUnresolved, "", "the guard goes on thawing the guest: "+err.Error())
}

func (c *cut) notQuiesced(reason string) {
	if c.quiesce.Reason == "" {
		c.quiesce.Reason = reason
	}
	c.warn(warnNotQuiesced, "", "the guest's file systems were not frozen at the cut: "+reason)
}

// announce journals that the transaction is about to be sent.
func (c *cut) announce(ctx context.Context) error {
	return c.o.Journal(ctx, entryCut, c.prepared())
}

// transact sends the transaction. It is the only thing between freeze and
// thaw, but for pointing the launch paths: a frozen guest writes nothing, so
// whatever dies before the thaw, a launch path never names a layer that lacks
// something the guest was told is on disk. For a guest that is not frozen the
// launch guard closes the gap.
func (c *cut) transact(ctx context.Context) error {
	if c.guard == nil && c.member == nil {
		if err := c.announce(ctx); err != nil {
			return err
		}
	}
	return c.send(ctx)
}

// send sends the transaction. From here on a snapshot of disks alone cannot be
// cancelled; one with memory is taken back by merging.
func (c *cut) send(ctx context.Context) error {
	if !discover.Same(c.run.proc.PID, c.run.proc.StartTime) {
		return fault.New(fault.Unresponsive, "VM %s: its QEMU process %d is gone", c.vm.name(), c.run.proc.PID)
	}
	if c.memory == nil {
		if err := c.o.PointOfNoReturn(); err != nil {
			return err
		}
	}
	pairs := make([]blockdev.Pair, len(c.disks))
	for i, d := range c.disks {
		pairs[i] = blockdev.Pair{Base: d.BaseNode, Overlay: d.overlay().Node}
	}
	ctx = context.WithoutCancel(ctx)
	c.cutAt = time.Now()
	err := blockdev.Cut(ctx, c.session, pairs)
	var refused *monitor.CommandError
	switch {
	case errors.As(err, &refused):
		return fault.New(fault.Failed, "VM %s: QEMU refused the cut: %w", c.vm.name(), err)
	case err != nil:
		if happened, err := c.reconcile(ctx, err); err != nil || !happened {
			return err
		}
	}
	c.member.transaction(c.cutAt, time.Now())
	c.done = true
	c.o.DropReverts()
	c.revertable()
	if c.memory != nil {
		c.o.RevertAtLength("merge the overlays back", c.mergeBack)
		c.o.RevertAtLength("discard the memory", c.discardMemory)
	}
	for _, d := range c.disks {
		if err := d.coverLaunch(); err != nil {
			c.o.Logger().Warn("launch path", "disk", d.Device, "error", err) // settle tries again
		}
	}
	return nil
}

// thawGuest asks whether the guest is frozen still, and thaws it. Only a
// verified answer earns the label.
func (c *cut) thawGuest(ctx context.Context) error {
	thawed, err := c.guard.Thaw(ctx)
	c.quiesce.Frozen, c.quiesce.Total, c.quiesce.Window = c.frozen.Count, c.frozen.Total, thawed.Window
	switch {
	case err != nil:
		c.notQuiesced("the thaw went wrong")
		c.thawUnresolved(err)
	case !thawed.Verified:
		c.notQuiesced(thawed.Reason)
	}
	if err == nil && c.cfg.OnFreezeWindow != nil {
		c.cfg.OnFreezeWindow(thawed.Window)
	}
	c.endFreeze(c.vm, c.guard, err)
	if err := c.o.Journal(ctx, entryThawed, c.quiesce); err != nil {
		c.o.Logger().Warn("recovery would take the guest for not frozen", "error", err)
	}
	return nil
}
