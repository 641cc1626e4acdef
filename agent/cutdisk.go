package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/blockdev"
)

// cutDisk is one disk on its way through a cut. Its exported fields are what
// the journal keeps: enough to find, after a crash, everything that was made.
type cutDisk struct {
	Device     string
	DiskID     string
	Dir        string // directory of all three names, as QEMU sees it
	Prefix     string // where that directory's tree begins for this process
	Launch     string // name by which the launch command opens the disk
	Base       string // permanent name of the layer that is covered
	BaseID     string
	BaseFormat string
	BaseNode   string // QEMU's node of the base
	NewName    bool   // the permanent name is made by this operation
	Overlay    string // permanent name of the overlay
	OverlayID  string
	Size       uint64 // virtual size, bytes
	Options    blockdev.Options
	Settle     Settle

	dir       *blockdev.Dir
	base      blockdev.Layer // in QEMU
	immutable bool           // the base's flag is set
	unsettled bool           // the launch path does not name the overlay
}

// newCutDisk opens the disk's directory and decides how it will be settled.
// The names of new files follow once the operation's id is known (name).
func newCutDisk(r *run, d *liveDisk) (*cutDisk, error) {
	c := &cutDisk{
		Device: d.rec.Device, DiskID: d.rec.ID, Dir: filepath.Dir(d.rec.LaunchPath), Prefix: r.proc.Root,
		Launch: filepath.Base(d.rec.LaunchPath), Base: filepath.Base(d.active.Path), BaseID: d.active.ID,
		BaseFormat: d.top().Node.Driver, BaseNode: d.top().Node.Name, Size: d.top().Node.VirtualSize,
		Options: d.overlayOptions(), Settle: SettleLive, base: d.top(),
	}
	if d.rec.LaunchFormat == "raw" {
		c.Settle = SettleConvert
	}
	if dir := filepath.Dir(d.active.Path); dir != c.Dir {
		return nil, fmt.Errorf("its layer %s is not beside its launch path %s", d.active.Path, d.rec.LaunchPath)
	}
	return c, c.open()
}

// open opens the directory of a disk that came from the journal.
func (c *cutDisk) open() (err error) {
	c.dir, err = blockdev.OpenDir(c.Dir, c.Prefix)
	return err
}

// launchPathIsOurs fails if the launch path leads to another file than the active
// layer: somebody has put it there, and it is not to be replaced. A launch path
// that is gone comes back with the cut.
func (c *cutDisk) launchPathIsOurs(active catalog.Layer) error {
	info, err := c.dir.Stat(c.Launch)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Dev != active.Dev || info.Ino != active.Ino:
		return fault.New(fault.Unsupported, "its launch path %s leads to another file than the layer %s that QEMU writes to",
			c.dir.Path(c.Launch), active.Path)
	}
	return nil
}

// name chooses the names of the layers. n counts the operation's layers, so
// that each has an id of its own.
func (c *cutDisk) name(operation string, n int) {
	c.OverlayID = fmt.Sprintf("%s-%d", operation, n)
	c.Overlay = blockdev.LayerName(c.Launch, c.OverlayID, "qcow2")
	if c.Base == c.Launch {
		c.Base = blockdev.LayerName(c.Launch, fmt.Sprintf("%s-%db", operation, n), c.BaseFormat)
		c.NewName = true
	}
}

// leftOut is the disk in a snapshot that does without it.
func (c *cutDisk) leftOut() catalog.SnapshotDisk {
	return catalog.SnapshotDisk{DiskID: c.DiskID, Device: c.Device, Size: c.Size, Excluded: true}
}

// overlay describes the new layer to QEMU.
func (c *cutDisk) overlay() blockdev.Overlay {
	return blockdev.Overlay{
		Path: c.dir.Path(c.Overlay), Node: nodePrefix + c.OverlayID, Size: c.Size,
		BasePath: c.dir.Path(c.Base), BaseFormat: c.BaseFormat, Options: c.Options,
	}
}

// makeNames gives the base its permanent name and makes the overlay's file. A
// name that is taken is another's: it fails, and takes back only what it made.
func (c *cutDisk) makeNames() (err error) {
	if c.NewName {
		if err := c.dir.Link(c.Launch, c.Base); err != nil {
			return fmt.Errorf("permanent name %s: %w", c.dir.Path(c.Base), err)
		}
		defer func() {
			if err != nil {
				err = errors.Join(err, c.dir.Remove(c.Base))
			}
		}()
	}
	if err := c.dir.CreateFile(c.Overlay, c.Prefix+c.dir.Path(c.Base)); err != nil {
		return err
	}
	if err := c.dir.Sync(); err != nil {
		return errors.Join(err, c.dir.Remove(c.Overlay))
	}
	return nil
}

// removeNames takes back what makeNames made, and what the launch guard did. It
// opens the directory anew, since reverts run when the recipe has returned and
// closed its own.
//
// The launch path and the base's permanent name may be the only names of the
// VM's data: neither goes before the other is seen to lead there.
func (c *cutDisk) removeNames() (err error) {
	dir, err := blockdev.OpenDir(c.Dir, c.Prefix)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	base, err := dir.Stat(c.Base)
	if c.NewName && errors.Is(err, fs.ErrNotExist) {
		return dir.Remove(c.Overlay) // nothing was made, or all is taken back
	}
	if err != nil {
		return err
	}
	if err := dir.PointAt(c.Launch, c.Base); err != nil {
		return err
	}
	if err := dir.Sync(); err != nil {
		return err
	}
	launch, err := dir.Stat(c.Launch)
	if err != nil {
		return err
	}
	if launch.FileID != base.FileID {
		return fmt.Errorf("%s does not lead to %s: both are kept", dir.Path(c.Launch), dir.Path(c.Base))
	}
	errs := []error{dir.Remove(c.Overlay)}
	if c.NewName {
		errs = append(errs, dir.Remove(c.Base))
	}
	return errors.Join(append(errs, dir.Sync())...)
}

// pointLaunch makes the launch path name the overlay, unless its declared
// format forbids it.
func (c *cutDisk) pointLaunch() error {
	if c.Settle != SettleLive {
		return nil
	}
	return c.dir.PointAt(c.Launch, c.Overlay)
}

// coverLaunch makes a start by the launch path safe right after the cut: it
// names the overlay, or it cannot be opened for writing any more.
func (c *cutDisk) coverLaunch() error {
	if c.Settle == SettleLive {
		return c.pointLaunch()
	}
	return c.dir.SetImmutable(c.Base, true)
}

// reopened reports whether QEMU calls the base by its permanent name.
func (c *cutDisk) reopened() bool {
	return !c.NewName && filepath.Base(c.base.Filename) == c.Base
}

// reopenBacking takes the launch path's name out of QEMU.
func (c *cutDisk) reopenBacking(ctx context.Context, m blockdev.Monitor) error {
	return c.overlay().ReopenBacking(ctx, m, nodePrefix+c.BaseID, c.base.Node.Child("backing"), c.base.Filename, c.dir.Path(c.Launch))
}
