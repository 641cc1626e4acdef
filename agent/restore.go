package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/launch"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/monitor"
)

// RestoreSnapshot starts a restore and returns its operation.
func (a *Agent) RestoreSnapshot(ctx context.Context, req RestoreRequest) (op.Record, error) {
	s, v, err := a.snapshotOf(ctx, req.Snapshot)
	if err != nil {
		return op.Record{}, err
	}
	spec := op.Spec{Kind: op.KindRestore, VMID: v.id, VMName: v.name(), Request: req, RequestID: req.RequestID, UID: req.UID}
	return a.changes(ctx, spec, v, func(ctx context.Context, o *op.Op) error {
		return a.newRestore(o, v, s, req, nil).to(ctx, s, req, nil)
	})
}

// to is the recipe. It runs alone on its VM. further, when not nil, adds to the
// plan.
//
// A restore is a cut whose overlays lie on the restore points instead of on the
// layers that are covered: those are kept, as they are, for the safety snapshot.
func (r *restore) to(ctx context.Context, s catalog.Snapshot, req RestoreRequest, further func(*restorePlan)) error {
	o := r.o
	var p *restorePlan
	err := o.Step(ctx, "preflight", func(ctx context.Context) (err error) {
		if p, err = r.planRestore(ctx, r.vm, s, req, true); err != nil {
			return err
		}
		if further != nil {
			further(p)
		}
		for _, w := range p.plan.Warnings {
			r.warn(w.Code, w.Disk, w.Message)
		}
		return p.blocker(false)
	})
	if p != nil {
		o.Cleanup(p.close)
	}
	if err != nil {
		return err
	}
	r.run, r.disks, r.Resume, r.LiftReset = p.run, p.disks, p.resume, p.rebooks
	hooks, err := r.restoreHooks(ctx, o, r.vm, s, req)
	if err != nil {
		return err
	}
	switch {
	case req.replaces():
		err = r.withMemory(ctx, s, p)
	case p.live:
		err = r.live(ctx, p.subset)
	default:
		err = r.stopped(ctx)
	}
	if err == nil {
		hooks.after(ctx) // else it comes after the reverts
	}
	return err
}

// restore is a restore being done.
type restore struct {
	*cut
	restoreState
	adopted bool                  // the VM was started in the restored state before the reset
	kept    []string              // ids of disks that an undo leaves with one more layer
	nets    []string              // the VM's network devices
	stage   string                // of a restore with memory: what was journalled last
	child   *launch.Launched      // what was started last
	locks   []*blockdev.Lock      // of the layers, while nobody may start the VM
	resets  *monitor.Subscription // to RESET, when a reset must end QEMU afterwards
}

// restoreState is what the journal keeps of a restore beside its cut.
type restoreState struct {
	Description string         // of the safety snapshot
	Resume      bool           // the guest is to run when all is done
	LiftReset   bool           // QEMU was started so that a reset ends it
	NoSafety    bool           // the layers that were active are not kept
	Preview     *previewState  `json:",omitempty"` // it is a trial
	Undo        *undoState     `json:",omitempty"` // it ends a trial
	Memory      *memoryRestore `json:",omitempty"` // the guest goes on from a snapshot's memory
}

// restoreEntry is what the journal keeps of a restore.
type restoreEntry struct {
	prepared
	restoreState
}

// The journal entries of a restore.
const (
	entryLay   = "lay"   // overlays are about to be made, and the guest to be stopped
	entryReset = "reset" // the launch paths lead to the overlays; the guest is about to be reset
)

// live swaps the disks under the running QEMU process. Until the guest is reset
// it could go on as if nothing had happened: whatever fails is taken back. From
// the reset on there is only the new state.
func (r *restore) live(ctx context.Context, subset bool) error {
	r.o.Plan(r.steps(subset))
	if subset && r.Resume {
		if err := r.o.Step(ctx, "guard", r.guardOthers); err != nil {
			return err
		}
	}
	if err := r.o.Step(ctx, "overlays", r.overlays); err != nil {
		return err
	}
	if err := r.joinSwap(ctx); err != nil {
		return err
	}
	if r.guard != nil {
		if err := r.o.Step(ctx, "freeze", r.freezeOthers); err != nil {
			return err
		}
	}
	if err := r.o.Step(ctx, "swap", r.swap); err != nil {
		return err
	}
	whole := context.WithoutCancel(ctx)
	if err := r.joinReset(whole); err != nil {
		return err
	}
	if err := r.o.Step(whole, "point", r.point); err != nil {
		return err
	}
	if err := r.o.Journal(whole, entryReset, r.entry()); err != nil {
		return err
	}
	r.o.DropReverts()
	if err := r.o.Step(whole, "reset", r.reset); err != nil {
		return err
	}
	return r.finish(whole)
}

// steps returns the number of steps that the restore will take.
func (r *restore) steps(subset bool) int {
	n := 7 // preflight, overlays, swap, point, reset, settle, commit
	if subset && r.Resume {
		n += 2 // guard, freeze
	}
	if r.LiftReset {
		n++
	}
	if r.Undo != nil {
		n++ // merge
	}
	return n
}

// keepsAs names the safety snapshot.
func (r *restore) keepsAs(name string) {
	r.automatic = true
	r.req = SnapshotRequest{Name: name, Description: r.Description}
	r.quiesce = catalog.Quiesce{Requested: string(QuiesceNone)}
}

func (r *restore) entry() restoreEntry { return restoreEntry{r.prepared(), r.restoreState} }

// guardOthers starts the guard of a freeze: for the disks that stay as they are,
// the reset is a power cut.
func (r *restore) guardOthers(ctx context.Context) error {
	g, err := r.startGuard(ctx, r.vm, r.run, r.o.ID(), nil, DefaultFreezeTimeout, DefaultLease)
	if err != nil {
		return r.othersUnfrozen(ctx, err)
	}
	r.guard = g
	r.o.Revert("end the guard", r.release)
	return nil
}

// freezeOthers freezes the guest, which will be reset while it is frozen.
func (r *restore) freezeOthers(ctx context.Context) error {
	frozen, err := r.guard.Freeze(ctx)
	if err != nil {
		if thaw := r.release(ctx); thaw != nil {
			r.thawUnresolved(thaw)
		}
		return r.othersUnfrozen(ctx, err)
	}
	r.setFrozen(r.vm, r.o.ID(), frozen, nil)
	return nil
}

func (r *restore) othersUnfrozen(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	r.warn(warnNotQuiesced, "", "for the disks that stay as they are the reset was a power cut, since the guest's file systems could not be frozen: "+err.Error())
	return nil
}

// overlays makes the overlays' files and their nodes in QEMU.
func (r *restore) overlays(ctx context.Context) (err error) {
	if r.session, err = r.vm.monitorOf(r.run); err != nil {
		return err
	}
	if r.captured, err = r.run.configuration(ctx, r.session); err != nil {
		return err
	}
	if r.config, err = json.Marshal(r.captured); err != nil {
		return err
	}
	if r.Preview != nil || r.Undo != nil {
		if r.nets, err = r.session.NetDevices(ctx); err != nil {
			return err
		}
	}
	if err := r.announceOverlays(ctx); err != nil {
		return err
	}
	for _, d := range r.disks {
		if err := d.makeNames(); err != nil {
			return r.failure(d, err)
		}
		if err := d.build(ctx, r.session); err != nil {
			return r.failure(d, err)
		}
	}
	for i, l := range r.layings() {
		if err := l.Open(ctx, r.session); err != nil {
			return r.failure(r.disks[i], err)
		}
	}
	return nil
}

// announceOverlays chooses all names and journals them. From here on there may be
// something to take back.
func (r *restore) announceOverlays(ctx context.Context) error {
	for i, d := range r.disks {
		d.name(r.o.ID(), i)
	}
	if err := r.o.Journal(ctx, entryLay, r.entry()); err != nil {
		return err
	}
	r.o.RevertAtLength("take the restore back", r.untilTakenBack)
	return nil
}

// swap stops the guest and lays its disks on the restore points: first all of
// them on empty overlays, then all overlays on other layers. QEMU does each for
// all disks or for none.
func (r *restore) swap(ctx context.Context) error {
	if !discover.Same(r.run.proc.PID, r.run.proc.StartTime) {
		return fault.New(fault.Unresponsive, "VM %s: its QEMU process %d is gone", r.vm.name(), r.run.proc.PID)
	}
	if err := r.o.PointOfNoReturn(); err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	if err := r.session.Stop(ctx); err != nil {
		return err
	}
	r.cutAt = time.Now()
	pairs := make([]blockdev.Pair, len(r.disks))
	for i, d := range r.disks {
		pairs[i] = blockdev.Pair{Base: d.BaseNode, Overlay: d.overlay().Node}
	}
	if err := blockdev.Cut(ctx, r.session, pairs); err != nil {
		return fault.New(kindOf(err), "VM %s: swap the disks: %w", r.vm.name(), err)
	}
	if err := r.standsStill(ctx); err != nil {
		return err
	}
	if err := blockdev.Lay(ctx, r.session, r.layings()); err != nil {
		return fault.New(kindOf(err), "VM %s: swap the disks: %w", r.vm.name(), err)
	}
	return nil
}

// standsStill fails if somebody else has let the guest run.
func (r *restore) standsStill(ctx context.Context) error {
	st, err := r.session.QueryStatus(ctx)
	if err == nil && st.Status == monitor.RunStateRunning {
		err = fault.New(fault.Busy, "VM %s: somebody let it run while its disks were being swapped", r.vm.name()).
			WithHint("vmsnapd must be the only one that stops and resumes the VM meanwhile")
	}
	return err
}

// layings are the overlays with the layers that they are to lie on.
func (r *restore) layings() []blockdev.Laying {
	var all []blockdev.Laying
	for _, d := range r.disks {
		l := blockdev.Laying{Overlay: d.overlay()}
		for i, b := range d.On {
			l.Chain = append(l.Chain, blockdev.Below{
				Node: fmt.Sprintf("%s%s-%s%d", nodePrefix, d.OverlayID, "on", i), Path: b.Path, Format: b.Format, Device: b.Device,
			})
		}
		all = append(all, l)
	}
	return all
}

// point makes the launch paths lead to the overlays. They are all changed, or a
// start fails: between the first and the last change the launch path of one disk
// leads nowhere.
func (r *restore) point(context.Context) error {
	return pointAll(r.disks)
}

// reset resets the guest and lets it run. It is asked again until QEMU has
// answered or is gone: then the restored state is what the next start finds.
func (r *restore) reset(ctx context.Context) error {
	err := r.untilDone(r.tryReset)(ctx)
	if g := r.guard; g != nil {
		r.guard = nil
		r.endFreeze(r.vm, g, g.GuestReset())
	}
	return err
}

func (r *restore) tryReset(ctx context.Context) error {
	if err := r.awaitAnswer(ctx); err != nil {
		return err
	}
	s, err := r.vm.monitorOf(r.run)
	if err != nil && !discover.Same(r.run.proc.PID, r.run.proc.StartTime) {
		r.session = nil
		r.warn(warnEnded, "", "QEMU ended before the guest was reset; the restored state is what the next start finds")
		return nil
	}
	if err != nil {
		return err
	}
	r.session = s
	if st, err := s.QueryStatus(ctx); err != nil || st.Status == monitor.RunStateRunning {
		return err // it runs: an earlier attempt has come to its end
	}
	if r.LiftReset {
		if err := s.SetRebootAction(ctx, monitor.RebootReset); err != nil {
			return err
		}
		if r.resets != nil {
			r.resets.Close()
		}
		r.resets = s.Subscribe(8, "RESET")
		r.o.Cleanup(r.resets.Close)
	}
	if err := s.ResetAndWait(ctx); err != nil {
		return err
	}
	if r.Preview != nil && r.Preview.Isolated || r.Undo != nil && r.Undo.Isolated {
		if err := setLinks(ctx, s, r.nets, r.Undo != nil); err != nil {
			return err
		}
	}
	if !r.Resume {
		return nil
	}
	return s.Cont(ctx)
}

// firmwareResets is how long a firmware may take to reset the machine again.
// SeaBIOS does when it finds that it has run since the machine was switched on
// (tryReboot in its src/post.c): with -no-reboot that would end QEMU.
const firmwareResets = 10 * time.Second

// endAtReset makes a reset end QEMU again, once the firmware has had the time for
// its own.
func (r *restore) endAtReset(ctx context.Context) error {
	s := r.session
	if s == nil {
		return nil
	}
	if !r.Resume {
		r.warn(warnResets, "", "QEMU was started with -no-reboot; until it is started again a reboot of the guest resets it and does not end QEMU")
		return nil
	}
	wait, cancel := context.WithTimeout(ctx, firmwareResets)
	defer cancel()
	s.AwaitGuestReset(wait, r.resets)
	err := s.SetRebootAction(ctx, monitor.RebootShutdown)
	if errors.Is(err, monitor.ErrGone) {
		return nil
	}
	return err
}

// finish protects what was active, and enters the new layers into the catalog,
// with the safety snapshot. The disks lie on the overlays by now: what fails is
// tried again until it works, or until the agent stops, which leaves it to the
// recovery of the next.
func (r *restore) finish(ctx context.Context) error {
	if err := r.o.Step(ctx, "settle", r.untilDone(r.settle)); err != nil {
		return err
	}
	if r.LiftReset {
		if err := r.o.Step(ctx, "firmware", r.untilDone(r.endAtReset)); err != nil {
			return err
		}
	}
	if r.Undo != nil && r.Memory == nil {
		if err := r.o.Step(ctx, "merge", r.untilDone(r.fold)); err != nil {
			return err
		}
	}
	return r.o.Step(ctx, "commit", r.untilDone(r.commit))
}

// settle closes the layers that were active in QEMU, and protects them.
func (r *restore) settle(ctx context.Context) error {
	for _, d := range r.disks {
		if r.session != nil {
			names := append([]string{d.dir.Path(d.Launch), d.baseDir.Path(d.Base)}, d.Opened...)
			err := blockdev.DropUnused(ctx, r.session, names)
			if errors.Is(err, monitor.ErrGone) {
				r.session = nil
			} else if err != nil {
				return err
			}
		}
		if r.NoSafety && d.Ours {
			continue // it is removed next
		}
		if err := d.protect(); err != nil {
			r.warn(warnNoImmutable, d.Device, err.Error())
		}
	}
	return nil
}

// commit enters the layers into the catalog, with the safety snapshot, or
// without the layers that nothing needs any more.
func (r *restore) commit(ctx context.Context) error {
	switch {
	case r.Preview != nil:
		return r.recordPreview(ctx)
	case r.Undo != nil:
		return r.recordUndo(ctx)
	case !r.NoSafety:
		return r.cut.commit(ctx)
	}
	layers, disks, err := r.entries(ctx, &catalog.Snapshot{})
	if err != nil {
		return err
	}
	err = r.catalog.Update(ctx, func(tx *catalog.Tx) error {
		if err := putLayers(ctx, tx, layers, disks); err != nil {
			return err
		}
		for _, d := range r.disks {
			if !d.Ours {
				continue
			}
			if err := tx.DeleteLayer(ctx, d.BaseID); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return r.removeActive()
}

// removeActive removes the files of the layers that were active and are not
// kept. Those that somebody else has made stay.
func (r *restore) removeActive() error {
	var errs []error
	for _, d := range r.disks {
		if d.Ours {
			errs = append(errs, d.baseDir.Remove(d.Base), d.baseDir.Sync())
		}
	}
	return errors.Join(errs...)
}
