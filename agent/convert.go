package agent

import (
	"context"
	"encoding/json"
	"errors"
	"path/filepath"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/blockdev"
)

// entryConvert announces a conversion.
const entryConvert = "convert"

// conversion is a disk that gets a new file in the format that its launch
// command declares. It is what the journal keeps of it.
type conversion struct {
	Disk catalog.Disk
	Old  catalog.Layer // the overlay that is replaced
	New  catalog.Layer
}

// dir opens the directory of the new file, which stands beside the overlay.
func (c conversion) dir() (*blockdev.Dir, error) {
	return blockdev.OpenDir(filepath.Dir(c.New.Path), "")
}

// name is the new file's in that directory.
func (c conversion) name() string { return filepath.Base(c.New.Path) }

// convert gives a disk whose launch command declares format=raw a raw file
// with its newest content, and points the launch path at it. Until then the
// launch path leads to the covered layer, which is immutable, so that a start
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
	c := conversion{Disk: d, Old: active}
	c.New = catalog.Layer{ID: newID(), DiskID: d.ID, Format: "raw", VirtualSize: active.VirtualSize, Operation: o.ID(), Created: time.Now()}
	c.New.Path = filepath.Join(filepath.Dir(active.Path), blockdev.LayerName(filepath.Base(d.LaunchPath), c.New.ID, "raw"))
	dir, err := c.dir()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	if err := o.Journal(ctx, entryConvert, c); err != nil {
		return err
	}
	o.Revert("remove "+c.name(), func(context.Context) error { return c.remove() })
	if err := dir.CreateFile(c.name(), active.Path); err != nil {
		return err
	}
	err = blockdev.Convert(ctx, active.Path, active.Format, c.New.Path, "raw", func(done, total uint64) {
		o.Progress(done*active.VirtualSize/total, active.VirtualSize, "bytes")
	})
	if err != nil {
		return err
	}
	if err := errors.Join(dir.SyncFile(c.name()), dir.Sync()); err != nil {
		return err
	}
	if err := o.PointOfNoReturn(); err != nil {
		return err
	}
	o.DropReverts() // from here on the launch path may lead to the new file
	ctx = context.WithoutCancel(ctx)
	if err := a.pointPast(ctx, o.ID(), d.LaunchPath, c.New.Path, c.Old); err != nil {
		if named, look := leadsTo(d.LaunchPath, c.New.Path); look != nil {
			return errors.Join(err, look)
		} else if !named {
			return errors.Join(err, dir.Remove(c.name()))
		}
		o.Warn(op.Warning{Code: warnNoImmutable, Disk: d.Device, Message: err.Error()}) // the rest of it has been done
	}
	return a.recordConversion(ctx, o, dir, c)
}

// remove takes back the converted file. It opens the directory anew, since
// reverts run when the recipe has returned and closed its own.
func (c conversion) remove() (err error) {
	dir, err := c.dir()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	return dir.Remove(c.name())
}

// recordConversion makes the converted file, which the launch path leads to by
// now, the active layer, and removes the overlay that it replaces. An operation that
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
	info, err := dir.Stat(c.name())
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

// recoverConversions finishes the conversions whose file the launch path leads to
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
	dir, err := c.dir()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	if base, err := a.flagged(ctx, c.Old); err != nil {
		return err
	} else if base.ID != "" { // the flag may have been lifted when the host died
		if err := setImmutable(base.Path, true); err != nil {
			o.Warn(op.Warning{Code: warnNoImmutable, Disk: c.Disk.Device, Message: err.Error()})
		}
	}
	if named, err := leadsTo(c.Disk.LaunchPath, c.New.Path); err != nil || !named {
		return errors.Join(err, dir.Remove(c.name()))
	}
	return a.recordConversion(ctx, o, dir, c)
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
