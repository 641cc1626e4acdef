package agent

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"path/filepath"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/blockdev"
)

// recoverDelete goes on with a deletion whose agent is gone, where it was left. One
// that was being cancelled is taken back as far as that goes.
func (a *Agent) recoverDelete(ctx context.Context, o *op.Op, v *vm, rec op.Record, entries []op.Entry) error {
	d := &deletion{Agent: a, o: o, vm: v}
	o.LeaveAtStop()
	last := ""
	for _, e := range entries {
		switch e.Kind {
		case entryDelete, entryMerge, entryLast:
			d.deletionState = deletionState{}
			if err := json.Unmarshal(e.Data, &d.deletionState); err != nil {
				return err
			}
			last = e.Kind
			if d.Merging != nil {
				d.count = d.Merging.N
			}
		}
	}
	switch last {
	case "":
		return errInterrupted()
	case entryLast:
		return o.Step(ctx, "remove", func(ctx context.Context) error { return d.insist(ctx, d.remove) })
	}
	if rec.State == op.Cancelling || rec.State == op.Reverting {
		return d.recoverCancelled(ctx)
	}
	o.Warn(op.Warning{Code: warnAdopted, Message: "vmsnapd ended while layers were being merged, which went on when it came back"})
	v.leaveCPUs(o)
	o.LetCancel()
	o.Pausable()
	o.RevertAtLength("make the snapshots valid again", d.unmark)
	err := d.insist(ctx, func(ctx context.Context) error {
		return d.setStates(ctx, func(_, _ catalog.Snapshot) catalog.PointState { return catalog.PointDeleting })
	})
	if err != nil {
		return err
	}
	if d.Merging != nil {
		if err := o.Step(ctx, string(d.Merging.Way)+" "+d.Merging.Device, d.recoverMerge); err != nil {
			return err
		}
	}
	if d.Upkeep {
		defer d.yield(ctx)()
		return d.mergeAll(ctx)
	}
	return d.toEnd(ctx)
}

// recoverCancelled ends the merge that was going on, and makes the snapshots valid
// again of which nothing is lost.
func (d *deletion) recoverCancelled(ctx context.Context) error {
	cancelled := fault.New(fault.Cancelled, "the deletion was cancelled; vmsnapd ended meanwhile, and took back what was left when it came back")
	d.o.RevertAtLength("make the snapshots valid again", d.unmark)
	if d.Merging == nil {
		return cancelled
	}
	ended, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	stop(cancelled)
	err := d.recoverMerge(ended)
	if err == nil { // it had been done
		err = cancelled
	}
	return err
}

// recoverMerge goes on with the merge that the journal has last, wherever it was
// left.
func (d *deletion) recoverMerge(ctx context.Context) error {
	g := d.Merging
	whole := context.WithoutCancel(ctx)
	if _, err := d.vm.known(whole); err != nil { // what its monitor says comes next
		d.o.Logger().Warn("the VM is not known yet", "error", err)
	}
	var done bool
	err := d.insist(whole, func(ctx context.Context) (err error) {
		done, err = d.recorded(ctx, g)
		return err
	})
	if err != nil {
		return err
	}
	if done {
		return d.mergeDone(whole, g)
	}
	err = d.mergeData(ctx, g)
	if keep, stays := errors.AsType[*staysError](err); stays {
		d.kept = map[string]keptLayer{g.Lower.ID: {Reason: keep.Error()}}
		return nil
	}
	if err != nil {
		return err
	}
	return d.mergeDone(ctx, g)
}

// recorded reports whether the catalog has what a merge has made of the layers.
func (d *deletion) recorded(ctx context.Context, g *merging) (bool, error) {
	if g.Way == MergeFlatten {
		upper, err := d.catalog.Layer(ctx, g.Upper.ID)
		return err == nil && upper.Parent == g.Lower.Parent, err
	}
	_, err := d.catalog.Layer(ctx, g.Lower.ID)
	if fault.Of(err) == fault.NotFound {
		return true, nil
	}
	return false, err
}

// removeManifests removes the manifests of the snapshots. It can be done again.
func (d *deletion) removeManifests() error {
	var errs []error
	for _, path := range d.Dirs {
		dir, err := blockdev.OpenDir(path, d.vm.root())
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, s := range d.Gone {
			errs = append(errs, dir.Remove(filepath.Join(manifestDir, s.ID+".json")))
		}
		errs = append(errs, dir.Close())
	}
	return errors.Join(errs...)
}
