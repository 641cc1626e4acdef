package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/monitor"
)

// untilTakenBack takes the restore back, and tries until it works: the guest
// stands still meanwhile.
func (r *restore) untilTakenBack(ctx context.Context) error {
	return r.untilRecovered(ctx, r.o, r.takeBack)
}

// takeBack brings the VM back to where it was, from wherever the restore was
// left. It can be done again after it was interrupted.
func (r *restore) takeBack(ctx context.Context) error {
	if r.run != nil && !discover.Same(r.run.proc.PID, r.run.proc.StartTime) {
		r.run, r.session = nil, nil
	}
	if r.run == nil {
		if happened, err := r.runsRestored(); err != nil {
			return err
		} else if happened {
			r.adopted = true
			return errors.Join(r.settle(ctx), r.commit(ctx))
		}
	}
	if err := pointBack(r.disks); err != nil {
		return err
	}
	if r.run != nil {
		if err := r.swapBack(ctx); err != nil {
			return err
		}
	}
	if r.guard != nil {
		if err := r.release(ctx); err != nil {
			r.thawUnresolved(err)
		}
	}
	var errs []error
	for _, d := range r.disks {
		errs = append(errs, r.unbuild(ctx, d))
	}
	return errors.Join(errs...)
}

// runsRestored reports whether the VM was started again, in the restored state:
// the launch paths lead to it before the guest is reset.
func (r *restore) runsRestored() (bool, error) {
	other, err := r.vm.alone()
	if err != nil || other == nil {
		return false, err
	}
	for _, d := range r.disks {
		lock, err := blockdev.LockNoWriters(d.Prefix + d.overlayDir.Path(d.Overlay))
		if errors.Is(err, blockdev.ErrLocked) {
			return true, nil
		}
		if err == nil {
			err = lock.Close()
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, r.failure(d, err)
		}
	}
	return false, nil
}

// swapBack lays the disks of the running QEMU process on the layers that were
// active, and lets the guest go on.
func (r *restore) swapBack(ctx context.Context) error {
	if err := r.awaitAnswer(ctx); err != nil {
		return err
	}
	s, err := r.vm.monitorOf(r.run)
	if err != nil {
		return err
	}
	r.session = s
	g, err := blockdev.ReadGraph(ctx, s)
	if err != nil {
		return err
	}
	var laid []blockdev.Laying // those that lie on the restore points
	var covering []int
	for i, l := range r.layings() {
		top := g.Nodes[l.Overlay.Node]
		if top == nil || top.Child("backing") == "" {
			continue
		}
		covering = append(covering, i)
		if top.Child("backing") == l.Chain[0].Node {
			back, err := r.wasOn(ctx, i)
			if err != nil {
				return err
			}
			if err := back.Open(ctx, s); err != nil {
				return err
			}
			laid = append(laid, back)
		}
	}
	if err := blockdev.Lay(ctx, s, laid); err != nil {
		return err
	}
	for _, i := range covering {
		// QEMU has the layer open twice now, and would write through neither.
		d := r.disks[i]
		if err := blockdev.DropUnused(ctx, s, []string{d.dir.Path(d.Launch), d.baseDir.Path(d.Base)}); err != nil {
			return err
		}
		if err := r.mergeDisk(ctx, r.disks[i], i); err != nil {
			return r.failure(r.disks[i], err)
		}
	}
	for _, l := range r.layings() {
		if err := l.Close(ctx, s); err != nil {
			return err
		}
	}
	return r.goOn(ctx)
}

// wasOn is an overlay with the layer that it was put on, by the permanent names.
func (r *restore) wasOn(ctx context.Context, i int) (blockdev.Laying, error) {
	d := r.disks[i]
	active, err := r.catalog.Layer(ctx, d.BaseID)
	if err != nil {
		return blockdev.Laying{}, err
	}
	chain, err := r.chain(ctx, active)
	if err != nil {
		return blockdev.Laying{}, err
	}
	chain[0].Path, chain[0].Format = d.baseDir.Path(d.Base), d.BaseFormat
	l := blockdev.Laying{Overlay: d.overlay()}
	for k, b := range chain {
		l.Chain = append(l.Chain, blockdev.Below{
			Node: fmt.Sprintf("%s%s-was%d", nodePrefix, d.OverlayID, k), Path: b.Path, Format: b.Format, Device: b.Device != "",
		})
	}
	return l, nil
}

// goOn lets the guest run again that was stopped for the restore.
func (r *restore) goOn(ctx context.Context) error {
	if !r.Resume {
		return nil
	}
	st, err := r.session.QueryStatus(ctx)
	if err != nil || st.Status != monitor.RunStatePaused {
		return err
	}
	return r.session.Cont(ctx)
}

// pointAll makes the launch paths lead to the overlays, for good. All are
// changed, or a start fails: between the first change and the last the launch
// path of one disk leads nowhere, or to a layer that nobody may write to.
func pointAll(disks []*cutDisk) error {
	for _, d := range disks {
		if d.Settle != SettleLive {
			if err := d.coverLaunch(); err != nil {
				return err
			}
		}
	}
	return gated(disks, func(d *cutDisk) (*blockdev.Dir, string) { return d.overlayDir, d.Overlay })
}

// pointBack makes the launch paths lead to the layers that were active.
func pointBack(disks []*cutDisk) error {
	if err := gated(disks, func(d *cutDisk) (*blockdev.Dir, string) { return d.baseDir, d.Base }); err != nil {
		return err
	}
	for _, d := range disks {
		if d.Settle != SettleLive {
			if err := d.expose(); err != nil {
				return err
			}
		}
	}
	return nil
}

// gated makes those launch paths that can lead to another layer lead to one,
// disk by disk. When there are several, the first leads nowhere while the others
// are changed.
func gated(disks []*cutDisk, to func(*cutDisk) (*blockdev.Dir, string)) error {
	var wrong []*cutDisk
	for _, d := range disks {
		if d.Settle != SettleLive {
			continue
		}
		in, name := to(d)
		want, err := in.Stat(name)
		if errors.Is(err, fs.ErrNotExist) && name == d.Base {
			continue // the base has no permanent name yet, and so was not covered
		}
		if err != nil {
			return err
		}
		if leads, err := d.dir.Lead(d.Launch); err != nil || leads.FileID != want.FileID {
			wrong = append(wrong, d)
		}
	}
	if len(wrong) > 1 {
		if err := wrong[0].closeLaunch(); err != nil {
			return err
		}
		wrong = append(wrong[1:len(wrong):len(wrong)], wrong[0])
	}
	for _, d := range wrong {
		in, name := to(d)
		if err := errors.Join(d.dir.PointAt(d.Launch, in, name), d.dir.Sync()); err != nil {
			return err
		}
	}
	return nil
}

// closeLaunch makes the launch path lead nowhere. It is only one more name of a
// layer; one that leads anywhere else is not ours to remove.
func (d *cutDisk) closeLaunch() error {
	launch, err := d.dir.Lead(d.Launch)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, layer := range []struct {
		in   *blockdev.Dir
		name string
	}{{d.baseDir, d.Base}, {d.overlayDir, d.Overlay}} {
		if file, err := layer.in.Stat(layer.name); err == nil && file.FileID == launch.FileID {
			return errors.Join(d.dir.Remove(d.Launch), d.dir.Sync())
		}
	}
	return fault.New(fault.Unsupported, "its launch path %s leads to another file than to one of its layers", d.dir.Path(d.Launch))
}

// stopped restores a VM without a QEMU process. The image locks keep a QEMU that
// starts meanwhile from opening the disks.
func (r *restore) stopped(ctx context.Context) (err error) {
	r.o.Plan(5)
	r.vm.mu.Lock()
	rec := r.vm.rec
	r.vm.mu.Unlock()
	r.offline = rec.Stopped == endedByShutdown
	if r.config, err = storedConfiguration(rec); err != nil {
		return err
	}
	var locks []*blockdev.Lock
	defer func() { _ = closeAll(locks) }()
	err = r.o.Step(ctx, "overlays", func(ctx context.Context) error {
		for _, d := range r.disks {
			l, err := r.lockAll(ctx, d)
			locks = append(locks, l...)
			if err != nil {
				return r.failure(d, err)
			}
		}
		return r.overlaysStopped(ctx)
	})
	if err != nil {
		return err
	}
	if err := r.joinSwap(ctx); err != nil {
		return err
	}
	if err := r.joinReset(ctx); err != nil {
		return err
	}
	err = r.o.Step(ctx, "point", func(ctx context.Context) error {
		if other, err := r.vm.alone(); err != nil || other != nil {
			return errors.Join(fault.New(fault.Busy, "VM %s was started meanwhile", r.vm.name()), err)
		}
		if err := r.o.PointOfNoReturn(); err != nil {
			return err
		}
		r.cutAt = time.Now()
		return pointAll(r.disks)
	})
	if err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	if err := r.o.Journal(ctx, entryReset, r.entry()); err != nil {
		return err
	}
	r.o.DropReverts()
	if err := r.finish(ctx); err != nil {
		return err
	}
	if err := closeAll(locks); err != nil {
		return err
	}
	locks = nil
	return r.convertStopped(ctx)
}

// lockAll takes the image locks of what was active and of what will lie below.
func (r *restore) lockAll(ctx context.Context, d *cutDisk) ([]*blockdev.Lock, error) {
	var locks []*blockdev.Lock
	for _, id := range []string{d.BaseID, d.parent()} {
		layer, err := r.catalog.Layer(ctx, id)
		if err != nil {
			return locks, err
		}
		l, err := r.lockTree(ctx, layer)
		if err != nil {
			return locks, err
		}
		locks = append(locks, l...)
	}
	return locks, nil
}

// overlaysStopped makes the overlays' files.
func (r *restore) overlaysStopped(ctx context.Context) error {
	if err := r.announceOverlays(ctx); err != nil {
		return err
	}
	return r.makeStopped(ctx)
}

// makeStopped makes the overlays' files.
func (r *restore) makeStopped(ctx context.Context) error {
	for _, d := range r.disks {
		err := d.makeNames()
		if err == nil {
			err = d.overlay().Format(ctx, d.overlayDir)
		}
		if err != nil {
			return r.failure(d, err)
		}
	}
	return nil
}

// recoverRestore brings a restore to its end whose agent is gone: from the reset
// on to the new state, before to the old one.
func (a *Agent) recoverRestore(ctx context.Context, o *op.Op, v *vm, rec op.Record, entries []op.Entry) error {
	r := &restore{cut: &cut{Agent: a, o: o, vm: v, cutAt: rec.Started}}
	if with, err := r.loadMemoryRestore(entries); err != nil || with {
		if err != nil {
			return err
		}
		return r.recoverMemoryRestore(ctx)
	}
	if err := r.recoverProbe(ctx, entries); err != nil {
		return err
	}
	last, reset, err := r.load(entries)
	if err != nil || len(r.disks) == 0 {
		return errors.Join(err, errInterrupted())
	}
	for _, d := range r.disks {
		if err := r.untilRecovered(ctx, r.o, func(context.Context) error { return d.open() }); err != nil {
			return r.failure(d, err)
		}
	}
	r.o.Cleanup(r.closeDirs)
	if err := r.untilRecovered(ctx, r.o, func(ctx context.Context) error { return r.findProcess(ctx, last.prepared) }); err != nil {
		return err
	}
	if done, err := r.recorded(ctx); err != nil || done {
		if err == nil && r.NoSafety {
			err = errors.Join(r.removeActive(), r.discardBefore())
		}
		return err
	}
	if !reset {
		if err := r.o.Step(ctx, "take back", r.untilTakenBack); err != nil || r.adopted {
			return err
		}
		return errInterrupted()
	}
	r.warn(warnAdopted, "", "vmsnapd ended after the disks were swapped; the restore was completed when it came back")
	if r.run != nil {
		if err := r.o.Step(ctx, "reset", r.reset); err != nil {
			return err
		}
	}
	return r.finish(ctx)
}

// load brings a restore back from its journal, and says whether the guest may
// have been reset.
func (r *restore) load(entries []op.Entry) (last restoreEntry, reset bool, err error) {
	for _, e := range entries {
		if e.Kind != entryLay && e.Kind != entryReset {
			continue
		}
		last = restoreEntry{}
		if err := json.Unmarshal(e.Data, &last); err != nil {
			return last, false, err
		}
		reset = e.Kind == entryReset
	}
	r.restoreState, r.disks, r.config, r.offline = last.restoreState, last.Disks, last.Config, last.Offline
	r.keepsAs(last.Name)
	return last, reset, nil
}

// recorded reports whether a restore without a safety snapshot has been entered
// into the catalog.
func (r *restore) recorded(ctx context.Context) (bool, error) {
	switch {
	case r.Undo != nil:
		_, open, err := r.catalog.Preview(ctx, r.vm.id)
		return !open, err
	case r.Preview != nil:
		p, _, err := r.catalog.Preview(ctx, r.vm.id)
		return p.Operation == r.o.ID(), err
	case !r.NoSafety:
		return false, nil
	}
	disks, err := r.catalog.Disks(ctx, r.vm.id)
	if err != nil {
		return false, err
	}
	for _, d := range disks {
		for _, own := range r.disks {
			if d.ID == own.DiskID && d.ActiveLayer == own.OverlayID {
				return true, nil
			}
		}
	}
	return false, nil
}
