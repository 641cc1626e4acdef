package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

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
	_, err := a.begin(ctx, op.Spec{Kind: op.KindSettle, VMID: v.id, VMName: v.name(), Request: struct{}{}},
		func(ctx context.Context, o *op.Op) error { return a.settleRecipe(ctx, o, v) })
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

// settleRecipe makes the launch path of each disk name a file with the newest
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
		settle := a.convert
		if d.LaunchFormat != "raw" {
			settle = a.pointStopped
		}
		err := o.Step(ctx, "settle "+d.Device, func(ctx context.Context) error { return settle(ctx, o, d) })
		if err != nil {
			return fault.New(kindOf(err), "VM %s: disk %s: %w", v.name(), d.Device, err)
		}
	}
	return a.reload(ctx, v)
}

// pointStopped makes the launch path of a stopped VM name the active layer,
// where that failed at the cut.
func (a *Agent) pointStopped(ctx context.Context, o *op.Op, d catalog.Disk) (err error) {
	active, err := a.catalog.Layer(ctx, d.ActiveLayer)
	if err != nil {
		return err
	}
	dir, err := blockdev.OpenDir(filepath.Dir(d.LaunchPath), "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	if err := a.pointPast(ctx, o.ID(), dir, filepath.Base(d.LaunchPath), filepath.Base(active.Path), active); err != nil {
		return err
	}
	d.SettleNeeded = false
	_, err = a.catalog.UpsertDisk(ctx, d)
	return err
}

// entryConvert announces a conversion.
const entryConvert = "convert"

// conversion is a disk that gets a new file in the format that its launch
// command declares. It is what the journal keeps of it.
type conversion struct {
	Disk   catalog.Disk
	Old    catalog.Layer // the overlay that is replaced
	New    catalog.Layer
	Dir    string // of the launch path
	Launch string // names within it
	Name   string
}

// convert gives a disk whose launch command declares format=raw a raw file
// with its newest content, and points the launch path at it. Until then the
// launch path names the covered layer, which is immutable, so that a start
// fails rather than writes to it. The overlay is not needed any more.
func (a *Agent) convert(ctx context.Context, o *op.Op, d catalog.Disk) (err error) {
	active, err := a.catalog.Layer(ctx, d.ActiveLayer)
	if err != nil {
		return err
	}
	locks, err := a.lockTree(ctx, active)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeAll(locks)) }()
	c := conversion{Disk: d, Old: active, Dir: filepath.Dir(d.LaunchPath), Launch: filepath.Base(d.LaunchPath)}
	c.New = catalog.Layer{ID: newID(), DiskID: d.ID, Format: "raw", VirtualSize: active.VirtualSize, Operation: o.ID(), Created: time.Now()}
	c.Name = blockdev.LayerName(c.Launch, c.New.ID, "raw")
	dir, err := blockdev.OpenDir(c.Dir, "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	c.New.Path = dir.Path(c.Name)
	if err := o.Journal(ctx, entryConvert, c); err != nil {
		return err
	}
	o.Revert("remove "+c.Name, func(context.Context) error { return c.remove() })
	if err := dir.CreateFile(c.Name, active.Path); err != nil {
		return err
	}
	err = blockdev.Convert(ctx, active.Path, active.Format, c.New.Path, "raw", func(done, total uint64) {
		o.Progress(done*active.VirtualSize/total, active.VirtualSize, "bytes")
	})
	if err != nil {
		return err
	}
	if err := dir.SyncFile(c.Name); err != nil {
		return err
	}
	if err := o.PointOfNoReturn(); err != nil {
		return err
	}
	o.DropReverts() // from here on the launch path may name the new file
	ctx = context.WithoutCancel(ctx)
	if err := a.pointPast(ctx, o.ID(), dir, c.Launch, c.Name, c.Old); err != nil {
		if named, look := leadsTo(dir, c.Launch, c.Name); look != nil {
			return errors.Join(err, look)
		} else if !named {
			return errors.Join(err, dir.Remove(c.Name))
		}
		o.Warn(op.Warning{Code: warnNoImmutable, Disk: d.Device, Message: err.Error()}) // the rest of it has been done
	}
	return a.recordConversion(ctx, o, dir, c)
}

// remove takes back the converted file. It opens the directory anew, since
// reverts run when the recipe has returned and closed its own.
func (c conversion) remove() (err error) {
	dir, err := blockdev.OpenDir(c.Dir, "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	return dir.Remove(c.Name)
}

// recordConversion makes the converted file, which the launch path names by now,
// the active layer, and removes the overlay that it replaces. An operation that
// ended here would leave a VM that runs on a file which nobody knows, so what
// fails is tried again until the agent stops. It can be done again after a crash
// at any point.
func (a *Agent) recordConversion(ctx context.Context, o *op.Op, dir *blockdev.Dir, c conversion) error {
	for {
		err := a.tryRecordConversion(ctx, dir, c)
		if err == nil {
			return nil
		}
		o.Logger().Error("the conversion cannot be recorded yet", "disk", c.Disk.Device, "error", err)
		select {
		case <-a.stopping:
			return op.ErrLeave
		case <-time.After(askAgain):
		}
	}
}

func (a *Agent) tryRecordConversion(ctx context.Context, dir *blockdev.Dir, c conversion) error {
	info, err := dir.Stat(c.Name)
	if err != nil {
		return err
	}
	c.New.Dev, c.New.Ino = info.Dev, info.Ino
	c.Disk.ActiveLayer, c.Disk.SettleNeeded = c.New.ID, false
	if err := a.putLayers(ctx, []catalog.Layer{c.New}, []catalog.Disk{c.Disk}); err != nil {
		return err
	}
	if err := a.catalog.DeleteLayer(ctx, c.Old.ID); err != nil && fault.Of(err) != fault.NotFound {
		return err
	}
	return dir.Remove(filepath.Base(c.Old.Path))
}

// recoverConversions finishes the conversions whose file the launch path names
// already, and takes the others back.
func (a *Agent) recoverConversions(ctx context.Context, o *op.Op, entries []op.Entry) error {
	var errs []error
	for _, e := range entries {
		if e.Kind != entryConvert {
			continue
		}
		var c conversion
		if err := json.Unmarshal(e.Data, &c); err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, a.recoverConversion(ctx, o, c))
	}
	return errors.Join(errs...)
}

func (a *Agent) recoverConversion(ctx context.Context, o *op.Op, c conversion) (err error) {
	dir, err := blockdev.OpenDir(c.Dir, "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	if base, err := a.flagged(ctx, c.Old); err != nil {
		return err
	} else if base.ID != "" { // the flag may have been lifted when the host died
		if err := dir.SetImmutable(filepath.Base(base.Path), true); err != nil {
			o.Warn(op.Warning{Code: warnNoImmutable, Disk: c.Disk.Device, Message: err.Error()})
		}
	}
	if named, err := leadsTo(dir, c.Launch, c.Name); err != nil || !named {
		return errors.Join(err, dir.Remove(c.Name))
	}
	return a.recordConversion(ctx, o, dir, c)
}

// leadsTo reports whether two names are those of one file. A name that is not
// there leads nowhere.
func leadsTo(dir *blockdev.Dir, launch, name string) (bool, error) {
	a, errA := dir.Stat(launch)
	b, errB := dir.Stat(name)
	for _, err := range []error{errA, errB} {
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, err
		}
	}
	return errA == nil && errB == nil && a.FileID == b.FileID, nil
}

// flagged returns the covered layer below an active one if the agent made it
// immutable, else the zero layer. There is none once the active layer has been
// replaced by a converted file.
func (a *Agent) flagged(ctx context.Context, active catalog.Layer) (catalog.Layer, error) {
	if active.Parent == "" {
		return catalog.Layer{}, nil
	}
	base, err := a.catalog.Layer(ctx, active.Parent)
	if err != nil || !base.Immutable || base.Foreign {
		return catalog.Layer{}, err
	}
	return base, nil
}

// pointPast points the launch path at a layer when it names the covered layer
// below active. That layer's flag has to be lifted for the rename. Meanwhile a
// launch guard keeps every QEMU from writing to it, and sets the flag again if
// this process dies. A launch path that names anything else is not ours to
// change.
func (a *Agent) pointPast(ctx context.Context, operation string, dir *blockdev.Dir, launch, name string, active catalog.Layer) (err error) {
	if done, err := leadsTo(dir, launch, name); err != nil || done {
		return errors.Join(err, dir.Sync())
	}
	base, err := a.catalog.Layer(ctx, active.Parent)
	if err != nil {
		return err
	}
	info, err := dir.Stat(launch)
	if err != nil {
		return err
	}
	if info.Dev != base.Dev || info.Ino != base.Ino {
		return fault.New(fault.Unsupported, "its launch path %s leads to another file than the layer %s that it named when it was last seen",
			dir.Path(launch), base.Path).WithHint("put back the file that was there, or remove it and link %s to its name", active.Path)
	}
	if base.Immutable && !base.Foreign {
		protected := &cutDisk{Dir: filepath.Dir(base.Path), Launch: launch, Base: filepath.Base(base.Path), Settle: SettleConvert}
		guard, err := startLaunchGuard(ctx, a.cfg.LaunchGuard, a.launchGuardLock(operation), []*cutDisk{protected})
		if err != nil {
			return err
		}
		defer func() {
			err = errors.Join(err, dir.SetImmutable(protected.Base, true), guard.release())
		}()
		if err := dir.SetImmutable(protected.Base, false); err != nil {
			return err
		}
	}
	if err := dir.PointAt(launch, name); err != nil {
		return err
	}
	return dir.Sync()
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
		if err := verifyBacking(layer, parent); err != nil {
			return locks, err
		}
		if layer.Parent == "" {
			return locks, nil
		}
		layer = parent
	}
}

// verifyBacking fails unless an image's header names the parent that the
// catalog knows, in its format, or none when there is none.
func verifyBacking(layer, parent catalog.Layer) error {
	if layer.Format != "qcow2" {
		return nil // a raw image names nothing
	}
	h, err := blockdev.ReadHeaderFile(layer.Path)
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
	info, err := blockdev.StatPath(backing)
	if err != nil {
		return fmt.Errorf("layer %s: its backing file: %w", layer.Path, err)
	}
	if info.Dev != parent.Dev || info.Ino != parent.Ino || h.BackingFormat != parent.Format {
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
