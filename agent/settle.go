package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/blockdev"
)

// settleStopped settles, as an operation, what could not be settled while the
// VM ran.
func (a *Agent) settleStopped(ctx context.Context, v *vm) {
	if !v.needsSettling() {
		return
	}
	_, err := a.begin(ctx, op.Spec{Kind: op.KindSettle, VMID: v.id, VMName: v.name(), Request: struct{}{}, Light: true}, // it never waits: the VM cannot be started before
		func(ctx context.Context, o *op.Op) error { return a.settleRecipe(ctx, o, v) })
	if busy, held := errors.AsType[*op.BusyError](err); held {
		a.group.Go(func() {
			if _, err := a.ops.Wait(ctx, busy.Operation); err == nil || fault.Of(err) == fault.NotFound {
				a.settleStopped(ctx, v)
			}
		})
		return
	}
	if err != nil {
		a.log.Error("the disks of a stopped VM cannot be settled", "vm", v.name(), "error", err)
	}
}

func (v *vm) needsSettling() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.runs) > 0 || v.rec.Stopped == endedByMigration {
		return false
	}
	for _, d := range v.disks {
		if d.SettleNeeded && !d.Removed {
			return true
		}
	}
	return false
}

// settleRecipe makes the launch path of each disk lead to a file with the newest
// content, in the format that the launch command declares.
func (a *Agent) settleRecipe(ctx context.Context, o *op.Op, v *vm) error {
	v.changing.Lock()
	defer v.changing.Unlock()
	disks, err := a.catalog.Disks(ctx, v.id)
	if err != nil {
		return err
	}
	for _, d := range disks {
		if !d.SettleNeeded || d.Removed {
			continue
		}
		err := o.Step(ctx, "settle "+d.Device, func(ctx context.Context) error {
			if v.hasStrayed(d.ID) {
				return fault.New(fault.Unsupported, "the VM was started on a layer that others depend on, so that nobody can say what is its newest state; all files are kept").
					WithHint("decide which state is wanted; vmsnap vm show %s lists the layers", v.name())
			}
			return a.settleDisk(ctx, o, d)
		})
		if err != nil {
			return fault.New(kindOf(err), "VM %s: disk %s: %w", v.name(), d.Device, err)
		}
	}
	return a.reload(ctx, v)
}

// settleDisk makes the launch path of a stopped VM's disk lead to its newest
// content.
func (a *Agent) settleDisk(ctx context.Context, o *op.Op, d catalog.Disk) error {
	launch, err := blockdev.StatPath(d.LaunchPath)
	switch {
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return err
	case launch.Device:
		return a.settleDevice(ctx, o, d)
	case d.LaunchFormat == "raw":
		return a.convert(ctx, o, d)
	default:
		return a.pointStopped(ctx, o, d)
	}
}

// pointStopped makes the launch path of a stopped VM lead to the active layer,
// where that failed at the cut.
func (a *Agent) pointStopped(ctx context.Context, o *op.Op, d catalog.Disk) error {
	active, err := a.catalog.Layer(ctx, d.ActiveLayer)
	if err != nil {
		return err
	}
	if err := a.pointPast(ctx, o.ID(), d.LaunchPath, active.Path, active); err != nil {
		return err
	}
	d.SettleNeeded = false
	_, err = a.catalog.UpsertDisk(ctx, d)
	return err
}

// leadsTo reports whether two paths are those of one file. A path that is not
// there leads nowhere.
func leadsTo(launch, layer string) (bool, error) {
	a, errA := blockdev.StatPath(launch)
	b, errB := blockdev.StatPath(layer)
	for _, err := range []error{errA, errB} {
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, err
		}
	}
	return errA == nil && errB == nil && a.FileID == b.FileID, nil
}

// pointPast makes a launch path lead to a layer when it leads to a covered layer
// of the same disk, below active or, since a restore, on another branch. A launch
// path that leads anywhere else is not ours to change.
func (a *Agent) pointPast(ctx context.Context, operation, launch, layer string, active catalog.Layer) (err error) {
	dir, err := blockdev.OpenDir(filepath.Dir(launch), "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	in, err := blockdev.OpenDir(filepath.Dir(layer), "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, in.Close()) }()
	if done, err := leadsTo(launch, layer); err != nil || done {
		return errors.Join(err, dir.Sync())
	}
	covered, err := a.catalog.CoveredLayers(ctx, active.DiskID)
	if err != nil {
		return err
	}
	file, err := fileAt(launch)
	if err != nil {
		return err
	}
	name, base := filepath.Base(launch), file.in(covered)
	if base.ID == "" {
		return fault.New(fault.Unsupported, "its launch path %s leads to another file than to one of its layers",
			launch).WithHint("put back the file that was there, or remove it and link %s to its name", active.Path)
	}
	if own, err := dir.Stat(name); err != nil {
		return err
	} else if own.FileID == file.FileID && base.Immutable && !base.Foreign {
		bare, err := a.unflag(ctx, operation, base)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, bare.end(false)) }()
	}
	if err := dir.PointAt(name, in, filepath.Base(layer)); err != nil {
		return err
	}
	return dir.Sync()
}

// unflagged is a layer whose flag is lifted.
type unflagged struct {
	layer *cutDisk
	guard *launchGuard
}

// unflag lifts the flag of a layer, as it takes to rename over one of its names
// or to write to it, until end is called. Meanwhile a launch guard keeps every
// QEMU from writing to the layer, and sets the flag again if this process dies.
func (a *Agent) unflag(ctx context.Context, operation string, base catalog.Layer) (*unflagged, error) {
	u := &unflagged{layer: &cutDisk{
		Dir: filepath.Dir(base.Path), Base: filepath.Base(base.Path), BaseDevice: base.Device, Settle: SettleConvert,
	}}
	if err := u.layer.open(); err != nil {
		return nil, err
	}
	var err error
	if u.guard, err = startLaunchGuard(ctx, a.cfg.LaunchGuard, a.launchGuardLock(operation), []*cutDisk{u.layer}); err != nil {
		return nil, errors.Join(err, u.layer.close())
	}
	if err := u.layer.flagBase(false); err != nil {
		return nil, errors.Join(err, u.end(false))
	}
	return u, nil
}

// end sets the flag again, unless the layer is to stay as it is, and lets the
// launch guard go.
func (u *unflagged) end(stay bool) error {
	var err error
	if !stay {
		err = u.layer.flagBase(true)
	}
	return errors.Join(err, u.guard.release(), u.layer.close())
}

// lockTree takes the image locks of a layer and of all below it, against
// writers: a QEMU that is started meanwhile fails. It verifies that the images
// name each other as backing as the catalog has it, before a program follows
// those names.
func (a *Agent) lockTree(ctx context.Context, active catalog.Layer) (locks []*blockdev.Lock, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, closeAll(locks))
		}
	}()
	for layer := active; ; {
		l, err := blockdev.LockNoWriters(layer.Path)
		if err != nil {
			return locks, lockError(layer.Path, err)
		}
		locks = append(locks, l)
		var parent catalog.Layer
		if layer.Parent != "" {
			if parent, err = a.catalog.Layer(ctx, layer.Parent); err != nil {
				return locks, err
			}
		}
		if err := verifyBacking("", layer, parent); err != nil {
			return locks, err
		}
		if layer.Parent == "" {
			return locks, nil
		}
		layer = parent
	}
}

// verifyBacking fails unless an image's header names the parent that the
// catalog knows, in its format, or none when there is none. prefix is where the
// process that opens them has its file system tree.
func verifyBacking(prefix string, layer, parent catalog.Layer) error {
	if layer.Format != "qcow2" {
		return nil // a raw image names nothing
	}
	h, err := blockdev.ReadHeaderFile(prefix + layer.Path)
	if err != nil {
		return err
	}
	backing := h.BackingPath(layer.Path)
	if (backing == "") != (parent.ID == "") {
		return fault.New(fault.Unsupported, "layer %s names the backing file %q, which is not what it lay on when it was last seen", layer.Path, backing)
	}
	if backing == "" {
		return nil
	}
	file, err := fileAt(prefix + backing)
	if err != nil {
		return fmt.Errorf("layer %s: its backing file: %w", layer.Path, err)
	}
	if !file.is(parent) || h.BackingFormat != parent.Format {
		return fault.New(fault.Unsupported, "layer %s names the backing file %q (%s), which is not what it lay on when it was last seen",
			layer.Path, backing, h.BackingFormat)
	}
	return nil
}

func lockError(path string, err error) error {
	if errors.Is(err, blockdev.ErrLocked) {
		return fault.New(fault.Busy, "layer %s: %w", path, err).WithHint("end the process that has it open, or wait for it")
	}
	return fmt.Errorf("layer %s: %w", path, err)
}

func closeAll(locks []*blockdev.Lock) error {
	var errs []error
	for _, l := range locks {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}
