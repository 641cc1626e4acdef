package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
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
	return a.recordConversion(ctx, o, c)
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

// recordConversion makes the file that the launch path leads to by now, the
// converted one or a device that was written to, the active layer, and removes
// the overlay that it replaces. An operation that ended here would leave a VM
// that runs on a file which nobody knows, so what fails is tried again until the
// agent stops. It can be done again after a crash at any point.
func (a *Agent) recordConversion(ctx context.Context, o *op.Op, c conversion) error {
	return a.untilRecorded(ctx, o, c.Disk, func(ctx context.Context) error { return a.tryRecordConversion(ctx, c) })
}

// untilRecorded tries f until it works or the agent stops, which leaves it to
// the recovery of the next.
func (a *Agent) untilRecorded(ctx context.Context, o *op.Op, d catalog.Disk, f func(context.Context) error) error {
	for {
		err := f(ctx)
		if err == nil {
			return nil
		}
		o.Logger().Error("what was done to a disk cannot be recorded yet", "disk", d.Device, "error", err)
		select {
		case <-a.stopping:
			return op.ErrLeave
		case <-time.After(askAgain):
		}
	}
}

func (a *Agent) tryRecordConversion(ctx context.Context, c conversion) error {
	file, err := fileAt(c.New.Path)
	if err != nil {
		return err
	}
	file.identify(&c.New)
	c.Disk.ActiveLayer, c.Disk.SettleNeeded = c.New.ID, false
	if err := a.putLayers(ctx, []catalog.Layer{c.New}, []catalog.Disk{c.Disk}); err != nil {
		return err
	}
	if err := a.catalog.DeleteLayer(ctx, c.Old.ID); err != nil && fault.Of(err) != fault.NotFound {
		return err
	}
	if err := os.Remove(c.Old.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if c.New.Device != "" {
		return blockdev.SetReadOnly(c.New.Path, false) // an agent that starts makes it read-only
	}
	return nil
}

// recoverSettling finishes, for each disk, what was done to it as far as the
// journal says that there is no way back, and takes the rest back.
func (a *Agent) recoverSettling(ctx context.Context, o *op.Op, entries []op.Entry) error {
	var errs []error
	for _, e := range entries {
		switch e.Kind {
		case entryConvert:
			errs = append(errs, recoverEntry(ctx, o, e, a.recoverConversion))
		case entryWritten:
			errs = append(errs, recoverEntry(ctx, o, e, a.recordConversion))
		case entrySave:
			saved := func(other op.Entry) bool { return other.Kind == entrySaved && bytes.Equal(other.Data, e.Data) }
			if !slices.ContainsFunc(entries, saved) {
				errs = append(errs, recoverEntry(ctx, o, e, func(_ context.Context, _ *op.Op, s saving) error { return s.remove() }))
			}
		case entrySaved:
			errs = append(errs, recoverEntry(ctx, o, e, a.adoptSaved))
		}
	}
	return errors.Join(errs...)
}

func recoverEntry[T any](ctx context.Context, o *op.Op, e op.Entry, recover func(context.Context, *op.Op, T) error) error {
	var what T
	if err := json.Unmarshal(e.Data, &what); err != nil {
		return err
	}
	return recover(ctx, o, what)
}

func (a *Agent) recoverConversion(ctx context.Context, o *op.Op, c conversion) error {
	covered, err := a.catalog.CoveredLayers(ctx, c.Disk.ID)
	if err != nil {
		return err
	}
	for _, l := range covered { // the flag of one may have been lifted when the host died
		if !l.Immutable || l.Foreign {
			continue
		}
		if err := setImmutable(l.Path, true); err != nil {
			o.Warn(op.Warning{Code: warnNoImmutable, Disk: c.Disk.Device, Message: err.Error()})
		}
	}
	if named, err := leadsTo(c.Disk.LaunchPath, c.New.Path); err != nil {
		return err
	} else if !named {
		return c.remove()
	}
	return a.recordConversion(ctx, o, c)
}
