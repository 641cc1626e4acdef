package agent

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/blockdev"
)

// A launch path that is a block device can lead nowhere else. So from the cut on
// the device is read-only, and the VM runs on overlays in another directory. When
// it has stopped, two steps bring its newest state back to the device:
//
//  1. What the device holds, which a snapshot is to be restored from, is saved in
//     a qcow2 beside the overlays, and the lowest overlay comes to name that file.
//     From here on nothing depends on the device any more.
//  2. What the overlays hold is written to the device, and the newest of them,
//     which no snapshot needs, is removed.

// The journal entries of settling a device.
const (
	entrySave    = "save"    // the device's content is about to be saved
	entrySaved   = "saved"   // it is saved
	entryWritten = "written" // the device holds the newest content
)

// saving is a device whose content gets a file. It is what the journal keeps of
// it.
type saving struct {
	Disk  catalog.Disk
	Base  catalog.Layer // the layer that was the device, as the file that it becomes
	Child catalog.Layer // the overlay on it
	New   catalog.Layer // the device, which is free then
}

// settleDevice brings the newest content of a disk to its block device.
func (a *Agent) settleDevice(ctx context.Context, o *op.Op, d catalog.Disk) (err error) {
	active, err := a.catalog.Layer(ctx, d.ActiveLayer)
	if err != nil {
		return err
	}
	locks, err := a.lockTree(ctx, active)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeAll(locks)) }()
	chain, err := a.chain(ctx, active)
	if err != nil {
		return err
	}
	if bottom := len(chain) - 1; chain[bottom].Device != "" {
		if err := a.saveDevice(ctx, o, d, chain[bottom], chain[bottom-1]); err != nil {
			return err
		}
	}
	return a.writeDevice(ctx, o, d, chain)
}

// sameDevice fails unless the launch path leads to the device that it led to when
// the disk was cut.
func sameDevice(d catalog.Disk, device catalog.Layer) error {
	file, err := fileAt(d.LaunchPath)
	if err != nil {
		return err
	}
	if !file.is(device) {
		return fault.New(fault.Unsupported, "its launch path %s leads to the block device %q, and not to %q as when it was cut",
			d.LaunchPath, file.device, device.Device)
	}
	return nil
}

// saveDevice copies what a device holds into a file, which takes its place as
// the layer that snapshots name.
func (a *Agent) saveDevice(ctx context.Context, o *op.Op, d catalog.Disk, device, child catalog.Layer) (err error) {
	if err := sameDevice(d, device); err != nil {
		return err
	}
	s := saving{Disk: d, Base: device, Child: child}
	s.Base.Path = filepath.Join(filepath.Dir(child.Path), blockdev.LayerName(filepath.Base(d.LaunchPath), device.ID, "qcow2"))
	s.Base.Format, s.Base.Device = "qcow2", ""
	s.New = catalog.Layer{
		ID: newID(), DiskID: d.ID, Path: d.LaunchPath, Format: "raw", VirtualSize: device.VirtualSize,
		Device: device.Device, Operation: o.ID(), Created: time.Now(),
	}
	dir, err := blockdev.OpenDir(filepath.Dir(s.Base.Path), "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	if err := o.Journal(ctx, entrySave, s); err != nil {
		return err
	}
	name := filepath.Base(s.Base.Path)
	o.Revert("remove "+s.Base.Path, func(context.Context) error { return s.remove() })
	if err := dir.CreateFile(name, child.Path); err != nil {
		return err
	}
	err = blockdev.Convert(ctx, device.Path, "raw", s.Base.Path, "qcow2", func(done, total uint64) {
		o.Progress(done*device.VirtualSize/total, device.VirtualSize, "bytes")
	})
	if err != nil {
		return err
	}
	if err := errors.Join(dir.SyncFile(name), dir.Sync()); err != nil {
		return err
	}
	if err := o.PointOfNoReturn(); err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	if err := o.Journal(ctx, entrySaved, s); err != nil {
		return err
	}
	o.DropReverts() // from here on the overlay may name the file
	return a.adoptSaved(ctx, o, s)
}

// remove takes the saved file back. It opens the directory anew, since reverts
// run when the recipe has returned and closed its own.
func (s saving) remove() (err error) {
	dir, err := blockdev.OpenDir(filepath.Dir(s.Base.Path), "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	return dir.Remove(filepath.Base(s.Base.Path))
}

// adoptSaved lays the overlay on the saved file and records it. It can be done
// again after a crash at any point, and is tried until it works: an overlay that
// lies on a file which nobody knows could never be settled.
func (a *Agent) adoptSaved(ctx context.Context, o *op.Op, s saving) error {
	return a.untilRecorded(ctx, o, s.Disk, func(ctx context.Context) error { return a.tryAdoptSaved(ctx, o, s) })
}

func (a *Agent) tryAdoptSaved(ctx context.Context, o *op.Op, s saving) error {
	if base, err := a.catalog.Layer(ctx, s.Base.ID); err != nil || base.Device == "" {
		return err // it has been done
	}
	s.Base.Immutable = true
	if err := setImmutable(s.Base.Path, true); err != nil {
		s.Base.Immutable = false
		o.Warn(op.Warning{Code: warnNoImmutable, Disk: s.Disk.Device, Message: err.Error()})
	}
	if err := rebase(ctx, s.Child, s.Base); err != nil {
		return err
	}
	file, err := fileAt(s.Base.Path)
	if err != nil {
		return err
	}
	file.identify(&s.Base)
	if err := a.putLayers(ctx, []catalog.Layer{s.Base, s.New}, nil); err != nil {
		return err
	}
	a.manifestsOf(ctx, o, s)
	return nil
}

// rebase makes an overlay, which may be immutable, name another file of the same
// content.
func rebase(ctx context.Context, child, base catalog.Layer) (err error) {
	dir, err := blockdev.OpenDir(filepath.Dir(child.Path), "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	name := filepath.Base(child.Path)
	if child.Immutable {
		if err := dir.SetImmutable(name, false); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, dir.SetImmutable(name, true)) }()
	}
	if err := blockdev.Rebase(ctx, child.Path, base.Path, base.Format); err != nil {
		return err
	}
	return dir.SyncFile(name)
}

// manifestsOf brings the manifests of the snapshots that name a layer up to the
// catalog, which comes to name a file where there was a device.
func (a *Agent) manifestsOf(ctx context.Context, o *op.Op, s saving) {
	a.mu.RLock()
	v := a.vms[s.Disk.VMID]
	a.mu.RUnlock()
	err := a.reload(ctx, v)
	var snapshots []catalog.Snapshot
	if err == nil {
		snapshots, err = a.catalog.Snapshots(ctx, s.Disk.VMID)
	}
	for _, snapshot := range snapshots {
		for _, d := range snapshot.Disks {
			if d.LayerID == s.Base.ID {
				err = errors.Join(err, a.rewriteManifests(snapshot))
			}
		}
	}
	if err != nil {
		o.Warn(op.Warning{Code: warnManifest, Disk: s.Disk.Device, Message: err.Error()})
	}
}

// writeDevice writes what the overlays hold to the device. chain has the layers
// of the disk; the lowest was the device at the first cut. Meanwhile a launch
// guard keeps every QEMU away from the device, and makes it read-only again if
// this process dies. The device is read-only again, too, when writing fails: it
// holds neither the old state nor the new one then, and the overlays are written
// again at the next attempt.
func (a *Agent) writeDevice(ctx context.Context, o *op.Op, d catalog.Disk, chain []catalog.Layer) (err error) {
	device, err := a.freeDevice(ctx, d)
	if err != nil {
		return err
	}
	if err := sameDevice(d, device); err != nil {
		return err
	}
	if err := o.PointOfNoReturn(); err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	writable, err := a.unflag(ctx, o.ID(), device)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, writable.end(err == nil)) }()
	lock, err := blockdev.LockNoWriters(d.LaunchPath)
	if err != nil {
		return lockError(d.LaunchPath, err)
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	overlays := make([]string, len(chain)-1)
	for i := range overlays {
		overlays[i] = chain[i].Path
	}
	err = blockdev.WriteBack(ctx, overlays, d.LaunchPath, device.VirtualSize, func(done, total uint64) {
		o.Progress(done, total, "bytes")
	})
	if err != nil {
		return err
	}
	c := conversion{Disk: d, Old: chain[0], New: device}
	if err := o.Journal(ctx, entryWritten, c); err != nil {
		return err
	}
	return a.recordConversion(ctx, o, c)
}

// freeDevice returns the layer that is the disk's device once no overlay lies on
// it any more.
func (a *Agent) freeDevice(ctx context.Context, d catalog.Disk) (catalog.Layer, error) {
	layers, err := a.catalog.Layers(ctx, d.VMID)
	if err != nil {
		return catalog.Layer{}, err
	}
	for _, l := range layers {
		if l.DiskID == d.ID && l.Device != "" && !l.Covered && !l.Foreign {
			return l, nil
		}
	}
	return catalog.Layer{}, fault.New(fault.Failed, "its block device is not among its layers")
}

// coverDevices makes the block devices read-only again that overlays lie on, or
// that only hold a part of what was to be written to them: the flag is gone after
// a restart of the host. A device that a QEMU writes to is left alone.
func (a *Agent) coverDevices() {
	var covering sync.WaitGroup
	a.mu.RLock()
	for _, v := range a.vms {
		for _, d := range v.disks {
			for _, l := range v.layers {
				if l.DiskID != d.ID || l.Device == "" || !d.SettleNeeded || d.Removed {
					continue
				}
				covering.Go(func() {
					if err := coverDevice(d, l); err != nil {
						a.log.Error("a VM could start on a block device that is not settled", "vm", v.rec.Name, "disk", d.Device, "error", err)
					}
				})
			}
		}
	}
	a.mu.RUnlock()
	done := make(chan struct{})
	go func() { covering.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(coverLimit):
		a.log.Error("a block device does not answer; it may not be read-only yet")
	}
}

// coverLimit bounds the start of the agent where a device hangs: others answer
// within milliseconds.
const coverLimit = 5 * time.Second

func coverDevice(d catalog.Disk, l catalog.Layer) (err error) {
	if err := sameDevice(d, l); err != nil {
		return err
	}
	lock, err := blockdev.LockNoWriters(d.LaunchPath)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	return blockdev.SetReadOnly(d.LaunchPath, true)
}
