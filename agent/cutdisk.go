package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/blockdev"
)

// cutDisk is one disk on its way through a cut. Its exported fields are what
// the journal keeps: enough to find, after a crash, everything that was made.
type cutDisk struct {
	Device     string
	DiskID     string
	Dir        string    // directory of the launch path, as QEMU sees it
	BaseDir    string    // of the layer that is covered; empty: Dir
	OverlayDir string    // of the overlay; empty: Dir
	Prefix     string    // where the tree of these directories begins for this process
	Inodes     [3]uint64 // of the three directories; 0 for one that was not opened yet
	Launch     string    // name by which the launch command opens the disk
	Base       string    // permanent name of the layer that is covered
	BaseID     string
	BaseFormat string
	BaseDevice string // what the base is known by when it is a block device, else empty
	BaseNode   string // QEMU's node of the base
	NewName    bool   // the permanent name is made by this operation
	Overlay    string // permanent name of the overlay
	OverlayID  string
	Size       uint64 // virtual size, bytes
	Options    blockdev.Options
	Settle     Settle
	On         []below  // what the overlay lies on instead of the base, the newest first; empty in a snapshot
	Ours       bool     // the base was made by the agent; set for a restore
	Opened     []string // what a running QEMU calls the layers that a restore takes from it

	dir        *blockdev.Dir // of the launch path
	baseDir    *blockdev.Dir // may be the same, as overlayDir may
	overlayDir *blockdev.Dir
	base       blockdev.Layer // in QEMU
	immutable  bool           // the base's flag is set
	unsettled  bool           // the launch path does not lead to the overlay
}

// newCutDisk opens the disk's directories and decides how it will be settled.
// overlays is the directory for the overlay, empty for that of the base. The
// names of new files follow once the operation's id is known (name).
func newCutDisk(r *run, d *liveDisk, overlays string) (*cutDisk, error) {
	c := &cutDisk{
		Device: d.rec.Device, DiskID: d.rec.ID, Prefix: r.proc.Root, BaseID: d.active.ID,
		BaseFormat: d.top().Node.Driver, BaseNode: d.top().Node.Name, Size: d.top().Node.VirtualSize,
		Options: d.overlayOptions(), base: d.top(),
	}
	return c, c.place(d.rec, d.active, overlays)
}

// onDevice reports whether the launch path is a block device, which cannot lead
// anywhere else.
func (c *cutDisk) onDevice() bool { return c.Settle == SettleDevice }

// place says where the disk's files are and how it will be settled, and opens
// their directories.
func (c *cutDisk) place(d catalog.Disk, active catalog.Layer, overlays string) error {
	c.Dir, c.Launch = filepath.Dir(d.LaunchPath), filepath.Base(d.LaunchPath)
	c.BaseDir, c.Base = filepath.Dir(active.Path), filepath.Base(active.Path)
	c.BaseDevice = active.Device
	c.OverlayDir = cmp.Or(overlays, c.BaseDir)
	launch, err := blockdev.StatPath(c.Prefix + d.LaunchPath)
	switch {
	case err == nil && launch.Device:
		c.Settle = SettleDevice
	case d.LaunchFormat == "raw":
		c.Settle = SettleConvert
	default:
		c.Settle = SettleLive // a launch path that is gone comes back with the cut
	}
	if c.BaseDevice != "" && overlays == "" {
		return fault.New(fault.Unsupported, "it is a block device, beside which there is no place for a new layer").
			WithHint("set overlay-dir")
	}
	return c.open()
}

// open opens the directories. A disk that came from the journal has only their
// names.
func (c *cutDisk) open() (err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, c.close())
		}
	}()
	if c.dir, err = c.openDir(c.Dir, &c.Inodes[0]); err != nil {
		return err
	}
	c.baseDir, c.overlayDir = c.dir, c.dir
	if c.BaseDir = cmp.Or(c.BaseDir, c.Dir); c.BaseDir != c.Dir {
		if c.baseDir, err = c.openDir(c.BaseDir, &c.Inodes[1]); err != nil {
			return err
		}
	}
	switch c.OverlayDir = cmp.Or(c.OverlayDir, c.Dir); c.OverlayDir {
	case c.Dir:
	case c.BaseDir:
		c.overlayDir = c.baseDir
	default:
		c.overlayDir, err = c.openDir(c.OverlayDir, &c.Inodes[2])
	}
	return err
}

// openDir opens a directory, which must be the one that it was when it was opened
// first: that of a file system which is not mounted has the same name. Device
// numbers change, the inode of a directory does not.
func (c *cutDisk) openDir(path string, inode *uint64) (*blockdev.Dir, error) {
	dir, err := blockdev.OpenDir(path, c.Prefix)
	if err != nil {
		return nil, err
	}
	info, err := dir.Stat(".")
	if err == nil && *inode != 0 && *inode != info.Ino {
		err = fmt.Errorf("directory %s is another one than it was: its file system may not be mounted", path)
	}
	if err != nil {
		return nil, errors.Join(err, dir.Close())
	}
	*inode = info.Ino
	return dir, nil
}

// close closes what open has opened.
func (c *cutDisk) close() error {
	var errs []error
	closed := map[*blockdev.Dir]bool{nil: true}
	for _, d := range []*blockdev.Dir{c.dir, c.baseDir, c.overlayDir} {
		if !closed[d] {
			closed[d] = true
			errs = append(errs, d.Close())
		}
	}
	c.dir, c.baseDir, c.overlayDir = nil, nil, nil
	return errors.Join(errs...)
}

// launchPathIsOurs fails if the launch path leads to another file than a layer
// that it may lead to, which are given the newest first: somebody has put it
// there, and it is not to be replaced. A launch path that is gone comes back with
// the cut.
func (c *cutDisk) launchPathIsOurs(may []catalog.Layer) error {
	path := c.dir.Path(c.Launch)
	host, err := discover.Process{Root: c.Prefix}.HostPath(path)
	if err != nil {
		return err
	}
	file, err := fileAt(host)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case file.in(may).ID == "":
		return fault.New(fault.Unsupported, "its launch path %s leads to another file than the layer %s that QEMU writes to", path, may[0].Path)
	}
	return nil
}

// name chooses the names of the layers. n counts the operation's layers, so
// that each has an id of its own.
func (c *cutDisk) name(operation string, n int) {
	c.OverlayID = fmt.Sprintf("%s-%d", operation, n)
	c.Overlay = blockdev.LayerName(c.Launch, c.OverlayID, "qcow2")
	if !c.onDevice() && c.BaseDir == c.Dir && c.Base == c.Launch {
		c.Base = blockdev.LayerName(c.Launch, fmt.Sprintf("%s-%db", operation, n), c.BaseFormat)
		c.NewName = true
	}
}

// leftOut is the disk in a snapshot that does without it.
func (c *cutDisk) leftOut() catalog.SnapshotDisk {
	return catalog.SnapshotDisk{DiskID: c.DiskID, Device: c.Device, Size: c.Size, Excluded: true}
}

// below is a layer that a restore lays an overlay on.
type below struct {
	ID     string // the catalog's
	Path   string
	Format string
	Device bool
}

// parent returns the id of the layer that the overlay lies on.
func (c *cutDisk) parent() string {
	if len(c.On) > 0 {
		return c.On[0].ID
	}
	return c.BaseID
}

// overlay describes the new layer to QEMU.
func (c *cutDisk) overlay() blockdev.Overlay {
	o := blockdev.Overlay{
		Path: c.overlayDir.Path(c.Overlay), Node: nodePrefix + c.OverlayID, Size: c.Size,
		BasePath: c.baseDir.Path(c.Base), BaseFormat: c.BaseFormat, Options: c.Options,
	}
	if len(c.On) > 0 {
		o.BasePath, o.BaseFormat = c.On[0].Path, c.On[0].Format
	}
	return o
}

// makeNames gives the base its permanent name and makes the overlay's file. A
// name that is taken is another's: it fails, and takes back only what it made.
func (c *cutDisk) makeNames() (err error) {
	if c.NewName {
		if err := c.dir.Name(c.Launch, c.Base); err != nil {
			return fmt.Errorf("permanent name %s: %w", c.dir.Path(c.Base), err)
		}
		defer func() {
			if err != nil {
				err = errors.Join(err, c.dir.Unname(c.Launch, c.Base))
			}
		}()
	}
	if err := c.overlayDir.CreateFile(c.Overlay, c.Prefix+c.baseDir.Path(c.Base)); err != nil {
		return err
	}
	if err := errors.Join(c.overlayDir.Sync(), c.dir.Sync()); err != nil {
		return errors.Join(err, c.overlayDir.Remove(c.Overlay))
	}
	return nil
}

// build formats the overlay and opens it in QEMU.
func (c *cutDisk) build(ctx context.Context, m blockdev.Monitor) error {
	o := c.overlay()
	if err := o.Format(ctx, c.overlayDir); err != nil {
		return err
	}
	return o.Open(ctx, m)
}

// removeNames takes back what makeNames made, and what the launch guard did. It
// opens the directories anew, since reverts run when the recipe has returned and
// closed its own.
func (c *cutDisk) removeNames() (err error) {
	d := *c
	d.dir, d.baseDir, d.overlayDir = nil, nil, nil
	if err := d.open(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	if d.NewName {
		if named, err := d.dir.Named(d.Base); err != nil {
			return err
		} else if !named { // nothing was made, or all is taken back
			return errors.Join(d.overlayDir.Remove(d.Overlay), d.dir.Unname(d.Launch, d.Base))
		}
	}
	if d.Settle == SettleLive {
		if err := errors.Join(d.dir.PointAt(d.Launch, d.baseDir, d.Base), d.dir.Sync()); err != nil {
			return err
		}
	}
	errs := []error{d.overlayDir.Remove(d.Overlay)}
	if d.NewName {
		errs = append(errs, d.dir.Unname(d.Launch, d.Base))
	}
	return errors.Join(append(errs, d.overlayDir.Sync(), d.dir.Sync())...)
}

// pointLaunch makes the launch path lead to the overlay, unless its declared
// format forbids it.
func (c *cutDisk) pointLaunch() error {
	if c.Settle != SettleLive {
		return nil
	}
	return c.dir.PointAt(c.Launch, c.overlayDir, c.Overlay)
}

// coverLaunch makes a start by the launch path safe right after the cut: it
// leads to the overlay, or it cannot be opened for writing any more.
//
// Nothing orders what two file systems write. So where the overlay is on another
// one than what was changed, the change is synced: else the host could go down
// and come up with what the guest wrote to the overlay, and without the change.
func (c *cutDisk) coverLaunch() error {
	if c.Settle == SettleLive {
		if err := c.pointLaunch(); err != nil || c.OverlayDir == c.Dir {
			return err
		}
		return c.dir.Sync()
	}
	if err := c.flagBase(true); err != nil || c.BaseDevice != "" || c.OverlayDir == c.BaseDir {
		return err
	}
	return c.baseDir.SyncFile(c.Base)
}

// syncBase makes what QEMU wrote to the base durable.
func (c *cutDisk) syncBase() error {
	if c.BaseDevice != "" {
		return blockdev.SyncDevice(c.Prefix + c.baseDir.Path(c.Base))
	}
	return c.baseDir.SyncFile(c.Base)
}

// flagBase keeps everyone from writing to the base, or lets them.
func (c *cutDisk) flagBase(on bool) error {
	if c.BaseDevice != "" {
		return blockdev.SetReadOnly(c.Prefix+c.baseDir.Path(c.Base), on)
	}
	return c.baseDir.SetImmutable(c.Base, on)
}

// canFlagBase fails where the base cannot be protected so.
func (c *cutDisk) canFlagBase() error {
	if c.BaseDevice != "" {
		return nil
	}
	_, err := c.baseDir.Immutable(c.Base)
	return err
}

// expose lets the base be written to again, so that the overlay can be merged
// into it.
func (c *cutDisk) expose() error {
	err := c.flagBase(false)
	if errors.Is(err, blockdev.ErrNoImmutable) {
		fi, err := c.baseDir.Root().Lstat(c.Base)
		if err != nil {
			return err
		}
		return c.baseDir.Root().Chmod(c.Base, fi.Mode().Perm()|0o200)
	}
	return err
}

// uncover makes the launch path lead to the base again, for good. One that cannot
// lead to the overlay leads where it led before the cut.
func (c *cutDisk) uncover() error {
	if c.Settle != SettleLive {
		return nil
	}
	return errors.Join(c.dir.PointAt(c.Launch, c.baseDir, c.Base), c.dir.Sync())
}

// removeOverlay removes the overlay's file, which nothing depends on any more.
func (c *cutDisk) removeOverlay() error {
	return errors.Join(c.overlayDir.Remove(c.Overlay), c.overlayDir.Sync())
}

// reopened reports whether QEMU calls the base by its permanent name.
func (c *cutDisk) reopened() bool {
	return !c.NewName && filepath.Base(c.base.Filename) == c.Base
}

// reopenBacking takes the launch path's name out of QEMU.
func (c *cutDisk) reopenBacking(ctx context.Context, m blockdev.Monitor) error {
	return c.overlay().ReopenBacking(ctx, m, nodePrefix+c.BaseID, c.base.Node.Child("backing"), c.base.Filename, c.dir.Path(c.Launch))
}
