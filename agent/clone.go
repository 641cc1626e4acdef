package agent

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/blockdev"
)

// CloneDiskRequest asks for a new disk that reads as what a snapshot holds of one.
type CloneDiskRequest struct {
	Snapshot string // VM/NAME or id
	Disk     string // may be empty when the snapshot holds one only
	Full     bool   // a copy that depends on nothing, instead of one that lies on the restore point
	Path     string // absolute; must not exist
	Caller   Caller // who may write there

	RequestID string `json:"-"`
}

// entryClones announces that linked clones are recorded.
const entryClones = "clones"

// CloneDisk starts making a disk from a snapshot and returns the operation, which
// holds the VM.
func (a *Agent) CloneDisk(ctx context.Context, req CloneDiskRequest) (op.Record, error) {
	s, v, err := a.snapshotOf(ctx, req.Snapshot)
	if err != nil {
		return op.Record{}, err
	}
	if err := checkPlace(req.Path); err != nil {
		return op.Record{}, err
	}
	spec := op.Spec{Kind: op.KindClone, VMID: v.id, VMName: v.name(), Request: req, RequestID: req.RequestID, UID: req.Caller.UID}
	return a.begin(ctx, spec, func(ctx context.Context, o *op.Op) error { return a.cloneDisk(ctx, o, v, s, req) })
}

// cloneDisk is the recipe.
func (a *Agent) cloneDisk(ctx context.Context, o *op.Op, v *vm, s catalog.Snapshot, req CloneDiskRequest) error {
	o.Plan(4)
	o.SetSnapshot(s.ID)
	c := &cloning{copying: copying{Agent: a, o: o, vm: v, format: "qcow2"}, linked: !req.Full}
	err := o.Step(ctx, "preflight", func(ctx context.Context) error {
		point, err := a.pointOf(ctx, v, s, req.Disk)
		if err != nil {
			return err
		}
		return c.prepare(ctx, point, req.Path, req.Caller)
	})
	if err != nil {
		return err
	}
	return makeClones(ctx, o, []*cloning{c})
}

// cloning is a disk being made from a restore point.
type cloning struct {
	copying
	linked bool
	vmName string // of the VM that it is made for; empty for a disk alone
}

// prepare looks at what the clone is made from, and at its place.
func (c *cloning) prepare(ctx context.Context, point catalog.SnapshotDisk, path string, who Caller) error {
	if err := c.open(ctx, point, path, who); err != nil {
		return err
	}
	if who.UID == 0 {
		// Who has given root the disk's files to run QEMU as another user wants
		// that of the clone, too.
		if err := c.out.ownedLike(c.chain.held[0].Path()); err != nil {
			return err
		}
	}
	if !c.linked {
		return c.enough(ctx)
	}
	if old, err := c.catalog.Clone(ctx, path); err == nil {
		return fault.New(fault.Exists, "a clone was made at %s on %s, and is missing", path, old.Created.Format(time.DateOnly)).
			WithHint("if it was removed, not moved: vmsnap disk forget %s", path)
	} else if fault.Of(err) != fault.NotFound {
		return err
	}
	switch top := c.chain.top(); {
	case c.chain.prefix != "":
		return fault.New(fault.Unsupported, "VM %s: disk %s: QEMU has a file system tree of its own, and the clone would not find %s", c.vm.name(), point.Device, top.Path).
			WithHint("--full makes a copy")
	case top.Device != "":
		return fault.New(fault.Unsupported, "VM %s: disk %s: its restore point is a block device, which is written to when the VM has stopped", c.vm.name(), point.Device).
			WithHint("--full makes a copy")
	case !top.Covered:
		return fault.New(fault.Failed, "VM %s: disk %s: nothing lies on its restore point %s, which may be written to", c.vm.name(), point.Device, top.Path)
	}
	c.need = overlayReserve
	return c.fits(c.need, "disk "+point.Device)
}

// make makes the clone under its partial name.
func (c *cloning) make(ctx context.Context) error {
	if !c.linked {
		return c.copy(ctx)
	}
	if err := c.out.begin(ctx, c.o); err != nil {
		return err
	}
	return c.failure(blockdev.Link(ctx, c.out.file, c.chain.top().Path, c.chain.top().Format, c.point.Size))
}

// record is what the catalog keeps of a linked clone.
func (c *cloning) record() catalog.Clone {
	return catalog.Clone{
		Path: c.out.path(), LayerID: c.point.LayerID, VMName: c.vmName, Dev: c.out.ID.Dev, Ino: c.out.ID.Ino,
		Operation: c.o.ID(), Created: time.Now(),
	}
}

// makeClones makes disks, all or none. That linked ones depend on their layers is
// recorded before they have their names.
func makeClones(ctx context.Context, o *op.Op, all []*cloning) error {
	files, record, err := makeEach(ctx, o, all)
	if err != nil {
		return err
	}
	return o.Step(ctx, "publish", func(ctx context.Context) error { return publishAll(ctx, o, files, record) })
}

// makeEach makes disks under their partial names, and returns their files with
// what records them.
func makeEach(ctx context.Context, o *op.Op, all []*cloning) (files []*outFile, record func(context.Context) error, err error) {
	var records []catalog.Clone
	o.Revert("forget the clones", func(ctx context.Context) error { return all[0].forgetClones(ctx, records) }) // once the files are removed
	for _, c := range all {
		if err := o.Step(ctx, "copy", c.make); err != nil {
			return nil, nil, err
		}
		if !c.linked {
			if err := o.Step(ctx, "verify", c.verify); err != nil {
				return nil, nil, err
			}
		} else {
			records = append(records, c.record())
		}
		files = append(files, c.out)
	}
	return files, func(ctx context.Context) error { return all[0].recordClones(ctx, o, records) }, nil
}

// recordClones enters linked clones into the catalog.
func (a *Agent) recordClones(ctx context.Context, o *op.Op, clones []catalog.Clone) error {
	if len(clones) == 0 {
		return nil
	}
	if err := o.Journal(ctx, entryClones, clones); err != nil {
		return err
	}
	return a.putClones(ctx, clones)
}

// putClones enters clones that may have been entered before.
func (a *Agent) putClones(ctx context.Context, clones []catalog.Clone) error {
	return a.catalog.Update(ctx, func(tx *catalog.Tx) error {
		for _, c := range clones {
			if err := tx.PutClone(ctx, c); err != nil {
				return err
			}
		}
		return nil
	})
}

// forgetClones takes the records of clones back whose files are removed.
func (a *Agent) forgetClones(ctx context.Context, clones []catalog.Clone) error {
	return a.catalog.Update(ctx, func(tx *catalog.Tx) error {
		for _, c := range clones {
			if info, err := blockdev.StatPath(c.Path); err == nil && info.FileID == (blockdev.FileID{Dev: c.Dev, Ino: c.Ino}) {
				continue
			}
			if err := tx.DeleteClone(ctx, c.Path); err != nil {
				return err
			}
		}
		return nil
	})
}

// recoverClone brings a clone to its end whose agent is gone: to all of its files
// with their names and records, or to none.
func (a *Agent) recoverClone(ctx context.Context, o *op.Op, rec op.Record, entries []op.Entry) error {
	entries, err := a.recoverStart(ctx, o, entries)
	if err != nil {
		return err
	}
	var clones []catalog.Clone
	announced := false
	for _, e := range entries {
		if e.Kind == entryClones {
			announced = true
			if err := json.Unmarshal(e.Data, &clones); err != nil {
				return err
			}
		}
	}
	if announced { // files that may have their names already must not be without a record
		if err := a.untilRecovered(ctx, o, func(ctx context.Context) error { return a.putClones(ctx, clones) }); err != nil {
			return err
		}
	}
	whole, err := a.recoverOut(o, entries)
	if whole && err == nil {
		a.tellNotStarted(o, rec)
		return nil
	}
	if err == nil {
		err = errInterrupted()
	}
	return errors.Join(err, a.untilRecovered(ctx, o, func(ctx context.Context) error { return a.forgetClones(ctx, clones) }))
}
