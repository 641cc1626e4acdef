package agent

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/monitor"
)

// merging is one merge. Its exported fields are what the journal keeps: enough to
// go on with it, whoever has died meanwhile.
//
// What has become of one that was interrupted is seen in the files. The data that
// is copied changes nothing of what is read, so that it can be copied again. What
// counts is the one name that is changed afterwards: the launch path of a disk
// whose active layer is committed, else the backing file in a header.
type merging struct {
	N      int // counts the merges of the operation
	Device string
	Way    MergeWay
	Lower  catalog.Layer  // that goes
	Upper  catalog.Layer  // lies on it; zero for MergeRemove
	Above  catalog.Layer  // lies on the upper one, and names it in its header; of MergeCommit only, zero when there is none
	Below  catalog.Layer  // that the lower one lies on; zero when there is none
	Disk   catalog.Disk   // of all of them
	Active bool           // the disk writes to the upper one
	Bytes  uint64         // that are copied
	Room   uint64         // that they take
	Prefix string         // where paths begin
	QEMU   *mergingInQEMU `json:",omitempty"` // nil: qemu-img does it

	locks []*blockdev.Lock
}

// mergingInQEMU is a merge that runs as a block job.
type mergingInQEMU struct {
	PID                        int
	StartTime                  uint64
	Lower, Upper, Above, Below string // format nodes; empty for a layer that there is not
	Options                    blockdev.Options
}

// merge does one merge of the plan, and records it. On its error the layers are as
// they were, but for what the lower one of a commit holds.
func (d *deletion) merge(ctx context.Context, t *layerTree, m merge, at *stand) (err error) {
	d.count++
	g := &merging{
		N: d.count, Way: m.way, Lower: t.layers[m.lower], Upper: t.layers[m.upper], Below: t.layers[t.layers[m.lower].Parent],
		Bytes: m.cost.Up, Room: m.cost.RoomAbove, Prefix: at.prefix(),
	}
	for _, disk := range t.disks {
		if disk.ID == g.Lower.DiskID {
			g.Disk, g.Device = disk, disk.Device
		}
	}
	_, g.Active = t.active[m.upper]
	if m.way == MergeCommit {
		g.Bytes, g.Room = m.cost.Down, m.cost.RoomBelow
		if children := t.children[m.upper]; len(children) > 0 {
			g.Above = t.layers[children[0]]
		}
	}
	if err := d.mergeData(ctx, g); err != nil {
		return err
	}
	return d.mergeDone(ctx, g)
}

// into is the file that is written to.
func (g *merging) into() catalog.Layer {
	if g.Way == MergeCommit {
		return g.Lower
	}
	return g.Upper
}

// mergeDone records a merge whose layers have been merged, and removes the file
// that is needed no more. It is tried until it works: only the journal knows.
func (d *deletion) mergeDone(ctx context.Context, g *merging) error {
	err := d.insist(context.WithoutCancel(ctx), func(ctx context.Context) error {
		if err := d.record(ctx, g); err != nil {
			return err
		}
		return d.removeFile(g)
	})
	err = errors.Join(err, g.unlock())
	d.keepManifests(ctx, d.o, d.vm, op.KindDelete)
	return err
}

// removeFile removes the file that is needed no more. One that somebody has put in
// its place is kept.
func (d *deletion) removeFile(g *merging) error {
	err := g.removeFile()
	if other, is := errors.AsType[*otherFileError](err); is {
		d.o.Warn(op.Warning{Code: warnLayersKept, Disk: g.Device, Message: other.Error()})
		return nil
	}
	return err
}

// mergeData merges what the layers hold. While QEMU does not answer, or has ended,
// it is asked and looked at again until it is certain what has become of them.
func (d *deletion) mergeData(ctx context.Context, g *merging) error {
	for told := false; ; told = true {
		err := d.attempt(ctx, g)
		if err == nil {
			return nil
		}
		err = errors.Join(err, g.unlock())
		if errors.Is(err, op.ErrLeave) || !undecided(err) {
			return err
		}
		d.o.Logger().Warn("a merge is looked at again", "disk", g.Device, "error", err)
		if !told {
			d.o.Warn(op.Warning{Code: warnMergeWaits, Disk: g.Device, Message: "the merge waits for QEMU, which is asked again each second: " + err.Error()})
		}
		select {
		case <-d.stopping:
			return op.ErrLeave
		case <-time.After(askAgain):
		}
	}
}

// errLookAgain means that what was known of the VM is out of date.
var errLookAgain = errors.New("the VM has been started or has ended meanwhile")

// undecided reports whether an error leaves open what has become of a merge.
func undecided(err error) bool {
	for _, e := range []error{errLookAgain, blockdev.ErrJobUnfinished, monitor.ErrGone, monitor.ErrUnresponsive, monitor.ErrOutcomeUnknown} {
		if errors.Is(err, e) {
			return true
		}
	}
	return fault.Of(err) == fault.Unresponsive
}

// attempt merges in the QEMU that was merging before, in the one that runs by now,
// or in none.
func (d *deletion) attempt(ctx context.Context, g *merging) error {
	if q := g.QEMU; q != nil && discover.Same(q.PID, q.StartTime) {
		return d.mergeLive(ctx, g)
	}
	if happened, err := g.happened(); err != nil || happened {
		return err
	}
	if cause := context.Cause(ctx); cause != nil {
		return errors.Join(cause, g.protect())
	}
	at, err := d.standOf(ctx, d.vm, true)
	if err != nil {
		return err
	}
	t, _, err := d.treeOf(ctx, d.vm, at, nil)
	if err != nil {
		return err
	}
	g.Prefix, g.QEMU = at.prefix(), nil
	if g.Way != MergeRemove && at.inUse(t, g.Upper.ID) {
		if g.QEMU, err = at.nodes(t, g); err != nil {
			return err
		}
	}
	release, err := d.makeRoom(ctx, g)
	if err != nil {
		return err
	}
	defer release()
	if g.Way == MergeCommit {
		d.Begun = append(d.Begun, g.Lower.ID)
	}
	d.Merging = g
	if err := d.o.Journal(ctx, entryMerge, d.deletionState); err != nil {
		return err
	}
	switch {
	case g.Way == MergeRemove:
		return g.unused()
	case g.QEMU != nil:
		return d.mergeLive(ctx, g)
	default:
		return d.mergeOffline(ctx, g, t.inChain(g.Upper.ID))
	}
}

// makeRoom sets the space aside that a merge takes. One that was begun before waits
// for what it still needs.
func (d *deletion) makeRoom(ctx context.Context, g *merging) (release func(), err error) {
	if d.Merging == g && g.Way != MergeRemove {
		return func() {}, d.awaitRoom(ctx, g)
	}
	return d.reserve(g.Prefix+filepath.Dir(g.into().Path), g.Room)
}

// nodes finds the layers of a merge in QEMU.
func (at *stand) nodes(t *layerTree, g *merging) (*mergingInQEMU, error) {
	disk, err := at.disk(t, g.Disk.ID)
	if err != nil {
		return nil, err
	}
	q := &mergingInQEMU{PID: at.run.proc.PID, StartTime: at.run.proc.StartTime, Options: disk.overlayOptions()}
	for _, of := range []struct {
		layer catalog.Layer
		node  *string
	}{{g.Lower, &q.Lower}, {g.Upper, &q.Upper}, {g.Above, &q.Above}, {g.Below, &q.Below}} {
		if of.layer.ID == "" {
			continue
		}
		l, err := disk.nodeOf(t, of.layer.ID)
		if err != nil {
			return nil, err
		}
		*of.node = l.Node.Name
	}
	return q, nil
}

// unused fails with a staysError if somebody writes to a layer that nothing is
// known to lie on.
func (g *merging) unused() error {
	lock, err := blockdev.LockNoWriters(g.Prefix + g.Lower.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, blockdev.ErrLocked):
		return &staysError{lockError(g.Lower.Path, err)}
	case err != nil:
		return err
	}
	return lock.Close()
}

// happened reports whether the files tell that a merge has been done. A layer that
// is committed and that nothing lies on tells nothing, and can be committed again.
func (g *merging) happened() (bool, error) {
	switch {
	case g.Way == MergeRemove:
		return false, nil
	case g.Way != MergeCommit:
		names, err := g.names(g.Upper, g.Lower)
		return !names, err
	case g.Active:
		launch, err := blockdev.StatPath(g.Prefix + g.Disk.LaunchPath)
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		return launch.FileID == blockdev.FileID{Dev: g.Lower.Dev, Ino: g.Lower.Ino}, err
	case g.Above.ID != "":
		return g.names(g.Above, g.Lower)
	}
	return false, nil
}

// names reports whether a layer's header names another as its backing file.
func (g *merging) names(layer, backing catalog.Layer) (bool, error) {
	h, err := blockdev.ReadHeaderFile(g.Prefix + layer.Path)
	return err == nil && h.BackingPath(layer.Path) == backing.Path, err
}

// record enters into the catalog what a merge has made of the layers. What is left
// of two has the id of the upper one.
func (d *deletion) record(ctx context.Context, g *merging) error {
	upper := g.Upper
	upper.Parent = g.Lower.Parent
	if g.Way == MergeCommit {
		upper.Path, upper.Format, upper.Operation = g.Lower.Path, g.Lower.Format, g.Lower.Operation
		upper.Dev, upper.Ino = g.Lower.Dev, g.Lower.Ino
	}
	if upper.ID != "" {
		upper.Immutable = false
		if !g.Active {
			upper.Immutable = d.protectLayer(g, upper)
		}
	}
	if g.Above.ID != "" && g.Above.Covered {
		d.protectLayer(g, g.Above)
	}
	if g.Way == MergeFlatten {
		d.protectLayer(g, g.Lower)
	}
	err := d.catalog.Update(ctx, func(tx *catalog.Tx) error {
		if upper.ID != "" {
			if upper.Covered = !g.Active; g.Active {
				upper.Immutable = false
			}
			if err := tx.PutLayer(ctx, upper); err != nil {
				return err
			}
		}
		if g.Way == MergeFlatten {
			return nil
		}
		if err := tx.DropPoint(ctx, g.Lower.ID); err != nil {
			return err
		}
		err := tx.DeleteLayer(ctx, g.Lower.ID)
		if fault.Of(err) == fault.NotFound {
			return nil // an earlier attempt has
		}
		return err
	})
	if err != nil {
		return err
	}
	d.o.Logger().Info("layer merged", "disk", g.Device, "way", g.Way, "layer", g.Lower.Path, "upper", g.Upper.Path)
	return d.reload(ctx, d.vm)
}

// protectLayer keeps everybody from writing to a covered layer, and reports whether
// its flag is set.
func (d *deletion) protectLayer(g *merging, l catalog.Layer) bool {
	err := g.withLayer(l, func(c *cutDisk) error { return c.protect() })
	if err != nil {
		d.o.Warn(op.Warning{Code: warnNoImmutable, Disk: g.Device, Message: err.Error()})
	}
	return err == nil
}

// withLayer calls f with a layer's file, as the layer that a cut would cover.
func (g *merging) withLayer(l catalog.Layer, f func(*cutDisk) error) (err error) {
	c := &cutDisk{Device: g.Device, Dir: filepath.Dir(l.Path), Base: filepath.Base(l.Path), Prefix: g.Prefix}
	if err := c.open(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	return f(c)
}

// exposed are the layers that a merge writes to, and that nobody may write to
// otherwise.
func (g *merging) exposed() []catalog.Layer {
	var all []catalog.Layer
	switch {
	case g.Way == MergeCommit:
		all = append(all, g.Lower)
		if g.Above.Covered {
			all = append(all, g.Above)
		}
		if g.QEMU == nil && g.Upper.Covered { // qemu-img opens it as if it wrote to it
			all = append(all, g.Upper)
		}
	case g.Upper.Covered:
		all = append(all, g.Upper)
	}
	return all
}

// expose lets the layers be written to that the merge writes to.
func (g *merging) expose() error {
	for _, l := range g.exposed() {
		if err := g.withLayer(l, func(c *cutDisk) error { return c.expose() }); err != nil {
			return err
		}
	}
	return nil
}

// protect puts back what expose did.
func (g *merging) protect() error {
	var errs []error
	for _, l := range g.exposed() {
		err := g.withLayer(l, func(c *cutDisk) error { return c.protect() })
		if !errors.Is(err, blockdev.ErrNoImmutable) { // it has its mode
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// removeFile removes the file that is needed no more, if it is the one that was
// meant. It can be done again.
func (g *merging) removeFile() error {
	gone := g.Lower
	switch g.Way {
	case MergeFlatten:
		return nil
	case MergeCommit:
		gone = g.Upper
	}
	return g.withLayer(gone, func(c *cutDisk) error {
		file, err := c.dir.Stat(c.Base)
		if errors.Is(err, fs.ErrNotExist) {
			return c.dir.Sync()
		}
		if err != nil {
			return err
		}
		if (file.FileID != blockdev.FileID{Dev: gone.Dev, Ino: gone.Ino}) {
			return &otherFileError{gone.Path}
		}
		if err := c.expose(); err != nil {
			return err
		}
		return errors.Join(c.dir.Remove(c.Base), c.dir.Sync())
	})
}

// otherFileError is a file in the place of a layer that was to go.
type otherFileError struct{ path string }

func (e *otherFileError) Error() string {
	return e.path + " is another file than the layer that was there, and is kept"
}

// unlock lets go of the layers.
func (g *merging) unlock() error {
	locks := g.locks
	g.locks = nil
	return closeAll(locks)
}

// disk is the disk as a cut would have left it: the upper layer is active and
// covers the lower one.
func (g *merging) disk() (*cutDisk, error) {
	c := &cutDisk{
		Device: g.Device, DiskID: g.Disk.ID, Prefix: g.Prefix, Settle: SettleLive,
		Dir: filepath.Dir(g.Disk.LaunchPath), Launch: filepath.Base(g.Disk.LaunchPath),
		BaseDir: filepath.Dir(g.Lower.Path), Base: filepath.Base(g.Lower.Path), BaseID: g.Lower.ID, BaseFormat: g.Lower.Format,
		OverlayDir: filepath.Dir(g.Upper.Path), Overlay: filepath.Base(g.Upper.Path), OverlayID: g.Upper.ID,
	}
	return c, c.open()
}
