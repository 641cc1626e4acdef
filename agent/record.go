package agent

import (
	"context"
	"errors"
	"io/fs"
	"syscall"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/monitor"
)

// begin starts an operation and reports its end to the metrics.
func (a *Agent) begin(ctx context.Context, spec op.Spec, recipe op.Recipe) (op.Record, error) {
	if err := a.notPreviewed(ctx, spec); err != nil {
		return op.Record{}, err
	}
	v := a.byID(spec.VMID)
	if v != nil && spec.Storage == nil {
		spec.Storage = v.storage()
	}
	return a.start(ctx, spec, func(ctx context.Context, o *op.Op) error {
		a.attended(ctx, o, v, spec.Kind, spec.UID)
		err := recipe(ctx, o)
		if !errors.Is(err, op.ErrLeave) {
			a.keepManifests(ctx, o, v, spec.Kind)
		}
		return err
	})
}

// attended sees to what every operation has: its end is counted, and the hooks
// are told when it fails.
func (a *Agent) attended(ctx context.Context, o *op.Op, v *vm, kind op.Kind, uid uint32) {
	a.reportEnd(ctx, o.ID())
	o.OnFailure(a.hooksOf(o, v, kind, uid).failed)
}

func (a *Agent) reportEnd(ctx context.Context, id string) {
	if a.cfg.OnOperation == nil {
		return
	}
	a.group.Go(func() {
		rec, err := a.ops.Wait(context.WithoutCancel(ctx), id)
		if err != nil {
			a.log.Error("an operation's end is not counted", "operation", id, "error", err)
			return
		}
		a.cfg.OnOperation(rec)
	})
}

// putLayers records layers and disks in one transaction.
func (a *Agent) putLayers(ctx context.Context, layers []catalog.Layer, disks []catalog.Disk) error {
	return a.catalog.Update(ctx, func(tx *catalog.Tx) error { return putLayers(ctx, tx, layers, disks) })
}

func putLayers(ctx context.Context, tx *catalog.Tx, layers []catalog.Layer, disks []catalog.Disk) error {
	for _, d := range disks {
		if _, err := tx.UpsertDisk(ctx, d); err != nil {
			return err
		}
	}
	for _, l := range layers {
		if err := tx.PutLayer(ctx, l); err != nil {
			return err
		}
	}
	return nil
}

// replaceDisk records a disk with its layers in place of all layers that it had.
// None of those may be a restore point.
func (a *Agent) replaceDisk(ctx context.Context, d catalog.Disk, layers, old []catalog.Layer) error {
	return a.catalog.Update(ctx, func(tx *catalog.Tx) error {
		if err := putLayers(ctx, tx, layers, []catalog.Disk{d}); err != nil {
			return err
		}
		for i := len(old); i > 0; i-- { // the newest first: children before parents
			if old[i-1].DiskID != d.ID {
				continue
			}
			if err := tx.DeleteLayer(ctx, old[i-1].ID); err != nil {
				return err
			}
		}
		return nil
	})
}

// kindOf finds the kind of an error that comes from a mechanism.
func kindOf(err error) fault.Kind {
	switch {
	case fault.Of(err) != fault.Failed:
		return fault.Of(err)
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fault.NoSpace
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return fault.Denied
	case errors.Is(err, monitor.ErrGone), errors.Is(err, monitor.ErrUnresponsive), errors.Is(err, monitor.ErrOutcomeUnknown):
		return fault.Unresponsive
	default:
		return fault.Failed
	}
}
