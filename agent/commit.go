package agent

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/monitor"
)

// The journal entries of a snapshot.
const (
	entryPrepare = "prepare" // overlays and permanent names are about to be made
	entryCut     = "cut"     // the transaction is about to be sent
	entryThawed  = "thawed"  // what the freeze came to
)

// prepared is what the journal keeps of a cut: who is cut, and all names.
type prepared struct {
	PID       int // of the QEMU process; 0 for a stopped VM
	StartTime uint64
	Name      string
	Disks     []*cutDisk
	Excluded  []catalog.SnapshotDisk
	Config    json.RawMessage
	Partial   bool
	Offline   bool // the VM was stopped, after a shutdown that was witnessed
}

func (c *cut) prepared() prepared {
	p := prepared{Name: c.req.Name, Disks: c.disks, Excluded: c.excluded, Config: c.config, Partial: c.partial, Offline: c.offline}
	if c.run != nil {
		p.PID, p.StartTime = c.run.proc.PID, c.run.proc.StartTime
	}
	return p
}

// settle makes every launch path lead to the active layer, for good, and protects
// the layers that are covered now. The disks run on the overlays already, so
// nothing that goes wrong here may keep them out of the catalog: a launch path
// that cannot be settled is settled when the VM has stopped, and until then
// leads to a layer that cannot be opened for writing.
func (c *cut) settle(ctx context.Context) error {
	for _, d := range c.disks {
		if err := errors.Join(d.pointLaunch(), d.dir.Sync()); err != nil {
			d.unsettled = true
			c.warn(warnNotSettled, d.Device, err.Error())
		}
		if c.session != nil {
			if err := c.reopenBacking(ctx, d); err != nil {
				c.warn(warnBackingNotReopened, d.Device, err.Error())
			}
		}
		if err := d.protect(); err != nil {
			c.warn(warnNoImmutable, d.Device, err.Error())
		}
	}
	if c.launch != nil {
		if err := c.launch.release(); err != nil {
			c.o.Logger().Warn("launch guard", "error", err) // the launch paths are safe by now
		}
	}
	if c.run != nil {
		c.run.lookAtRoom() // the disks grow in other layers now
	}
	return nil
}

// errReopenCrashes is why a backing is not reopened. The old name is in the way
// of a merge only, and is gone when the VM is started again.
var errReopenCrashes = errors.New("a QEMU before 9.0 with iothreads crashes when the backing of a running disk is reopened; " +
	"it goes on calling the covered layer by the launch path until the VM is started again")

// reopenBacking takes the launch path's name out of QEMU, where that is safe.
// Before 9.0 removed the lock of AioContexts, blockdev-reopen unlocked that of
// another thread when the disk ran in an iothread, and QEMU aborted (tried on
// 7.2). Which devices those are cannot be told for certain from outside.
func (c *cut) reopenBacking(ctx context.Context, d *cutDisk) error {
	if d.reopened() {
		return nil
	}
	if err := crashesAtReopen(ctx, c.session); err != nil {
		return err
	}
	return d.reopenBacking(ctx, c.session)
}

// crashesAtReopen fails with errReopenCrashes where that may happen.
func crashesAtReopen(ctx context.Context, s *monitor.Session) error {
	if s.AtLeast(9, 0) {
		return nil
	}
	var threads []struct {
		ID string `json:"id"`
	}
	if err := s.Execute(ctx, "query-iothreads", nil, &threads); err != nil {
		return err
	}
	if len(threads) > 0 {
		return errReopenCrashes
	}
	return nil
}

// protect makes the covered layer immutable, or at least read-only, unless
// somebody writes to it: then the flag would fail a guest's writes.
func (d *cutDisk) protect() error {
	base, err := blockdev.LockNoWriters(d.Prefix + d.baseDir.Path(d.Base))
	if err != nil {
		return err
	}
	defer func() { _ = base.Close() }()
	err = d.flagBase(true)
	d.immutable = err == nil
	if errors.Is(err, blockdev.ErrNoImmutable) {
		return errors.Join(err, d.baseDir.Root().Chmod(d.Base, 0o444))
	}
	return err
}

// commit enters the snapshot into the catalog and writes its manifest. A
// snapshot that was to be quiesced and was not is not offered; its layers are
// recorded all the same, since the disks run on them.
func (c *cut) commit(ctx context.Context) error {
	s := catalog.Snapshot{
		ID: newID(), VMID: c.vm.id, VMName: c.vm.name(), Name: c.req.Name, Description: c.req.Description,
		Labels: c.req.Labels, Created: c.cutAt, Consistency: c.consistency(), Quiesce: c.quiesce,
		Warnings: c.warnings, Group: c.groupCut, Operation: c.o.ID(), Config: c.config, Partial: c.partial, Automatic: c.automatic,
		State: catalog.PointValid,
	}
	if c.memory != nil {
		s.Memory = c.memory.saved
	}
	if c.req.ExpireAfter > 0 {
		s.Expires = c.cutAt.Add(c.req.ExpireAfter)
	}
	unfit := c.req.Quiesce == QuiesceRequire && s.Consistency == catalog.Crash
	layers, disks, err := c.entries(ctx, &s)
	if err != nil {
		return err
	}
	if unfit {
		if err := c.putLayers(ctx, layers, disks); err != nil {
			return err
		}
		return fault.New(fault.NotQuiesced, "VM %s: the disks were cut, but not while the guest was frozen (%s); no snapshot was made of it",
			c.vm.name(), c.quiesce.Reason).WithHint("each disk has one more layer now, which is harmless")
	}
	if err := c.enter(ctx, &s, layers, disks); err != nil {
		return err
	}
	c.o.SetSnapshot(s.ID)
	c.taken = &s
	for _, d := range c.disks {
		c.o.Logger().Info("disk snapshotted", "disk", d.Device, "layer", d.baseDir.Path(d.Base), "overlay", d.overlayDir.Path(d.Overlay))
	}
	if c.partial {
		c.o.SetPartial()
	}
	if err := c.writeManifests(s, layers); err != nil {
		c.warn(warnManifest, "", err.Error())
	}
	return nil
}

// enter records the snapshot. A record whose outcome is in doubt is looked up.
// The layers are recorded even when the name has been taken meanwhile.
func (c *cut) enter(ctx context.Context, s *catalog.Snapshot, layers []catalog.Layer, disks []catalog.Disk) error {
	err := c.catalog.CommitSnapshot(ctx, catalog.Commit{Snapshot: *s, Layers: layers, Disks: disks})
	if err == nil {
		return nil
	}
	done, look := c.committed(ctx, c.vm, c.o.ID())
	switch {
	case look != nil:
		return errors.Join(err, look)
	case done != "":
		s.ID = done
		return nil
	case fault.Of(err) != fault.Exists:
		return err
	}
	if put := c.putLayers(ctx, layers, disks); put != nil {
		return put
	}
	return err
}

// consistency is the label that the snapshot has earned.
func (c *cut) consistency() catalog.Consistency {
	switch {
	case c.memory != nil:
		return catalog.Memory
	case c.offline:
		return catalog.Offline
	case c.quiesce.Reason == "" && c.quiesce.Frozen > 0:
		return catalog.Filesystem
	default:
		return catalog.Crash
	}
}

// entries makes the catalog's records of the layers and disks, and adds the
// disks to the snapshot.
func (c *cut) entries(ctx context.Context, s *catalog.Snapshot) (layers []catalog.Layer, disks []catalog.Disk, err error) {
	known, err := c.catalog.Disks(ctx, c.vm.id)
	if err != nil {
		return nil, nil, err
	}
	byID := map[string]catalog.Disk{}
	for _, d := range known {
		byID[d.ID] = d
	}
	for _, d := range c.disks {
		base, err := c.catalog.Layer(ctx, d.BaseID)
		if err != nil {
			return nil, nil, err
		}
		two, err := d.layers(c.o.ID(), base)
		if err != nil {
			return nil, nil, c.failure(d, err)
		}
		layers = append(layers, two...)
		rec := byID[d.DiskID]
		rec.ActiveLayer, rec.SettleNeeded = d.OverlayID, d.Settle != SettleLive || d.unsettled
		disks = append(disks, rec)
		s.Disks = append(s.Disks, catalog.SnapshotDisk{DiskID: d.DiskID, Device: d.Device, LayerID: d.BaseID, Size: d.Size})
	}
	s.Disks = append(s.Disks, c.excluded...)
	return layers, disks, nil
}

// layers returns the two layers as the catalog keeps them.
func (d *cutDisk) layers(operation string, base catalog.Layer) ([]catalog.Layer, error) {
	if d.BaseDevice == "" {
		bi, err := d.baseDir.Stat(d.Base)
		if err != nil {
			return nil, err
		}
		base.Dev, base.Ino = bi.Dev, bi.Ino
	}
	oi, err := d.overlayDir.Stat(d.Overlay)
	if err != nil {
		return nil, err
	}
	base.Path, base.Format = d.baseDir.Path(d.Base), d.BaseFormat
	base.Covered, base.Immutable = true, d.immutable
	return []catalog.Layer{base, {
		ID: d.OverlayID, DiskID: d.DiskID, Parent: d.parent(), Path: d.overlayDir.Path(d.Overlay), Format: "qcow2",
		VirtualSize: d.Size, Dev: oi.Dev, Ino: oi.Ino, Operation: operation, Created: time.Now(),
	}}, nil
}
