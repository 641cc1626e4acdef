package agent

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/hook"
	"github.com/vmsnap/vmsnap/blockdev"
)

// preflightStopped is preflight for a VM without a QEMU process: its disks are
// what the catalog knows of them.
func (a *Agent) preflightStopped(v *vm, req SnapshotRequest, p *preflight) error {
	v.mu.Lock()
	disks, layers, stopped := v.disks, v.layers, v.rec.Stopped
	proc := a.described(v.rec)
	v.mu.Unlock()
	if stopped == endedByMigration {
		return fault.New(fault.Unsupported, "VM %s has migrated to another host, where its disks may be in use", v.name())
	}
	if stopped == endedByShutdown {
		p.plan.Consistency = catalog.Offline
	}
	if req.Quiesce == QuiesceRequire && p.plan.Consistency != catalog.Offline {
		p.refuse(fault.New(fault.NotQuiesced, "VM %s is stopped, and nobody saw its guest shut down", v.name()).
			WithHint("--quiesce=prefer takes a crash-consistent snapshot instead"))
	}
	var names []string
	for _, d := range disks {
		if !d.Removed {
			names = append(names, d.Device)
		}
	}
	chosen, err := choose(v.name(), names, req, p)
	if err != nil {
		return err
	}
	for _, d := range disks {
		active := layerOf(layers, d.ActiveLayer)
		switch {
		case d.Removed:
		case !chosen[d.Device]:
			p.leaveOut(d.ID, d.Device, active.VirtualSize)
		default:
			c, err := stoppedDisk(d, active, a.overlayDir(proc, d.Device))
			if err != nil {
				p.drop(v, catalog.SnapshotDisk{DiskID: d.ID, Device: d.Device, Size: active.VirtualSize}, req.AllowPartial, fault.New(kindOf(err), "VM %s: disk %s: %w", v.name(), d.Device, err))
				continue
			}
			p.admit(v, c, req.AllowPartial)
		}
	}
	return nil
}

// described is what the launch command and the overrides say of a VM that is
// stopped. An override that goes by the pid in a file does not match it.
func (a *Agent) described(rec catalog.VM) discover.Process {
	p, err := discover.ParseCommandLine(rec.Command)
	if err != nil {
		a.log.Debug("the launch command of a stopped VM", "vm", rec.Name, "error", err)
	}
	p.Args = rec.Command
	p, _ = a.describe(p)
	return p
}

func layerOf(layers []catalog.Layer, id string) catalog.Layer {
	for _, l := range layers {
		if l.ID == id {
			return l
		}
	}
	return catalog.Layer{}
}

// stoppedDisk prepares the cut of one disk, whose launch path must name the
// layer that the catalog knows as active.
func stoppedDisk(d catalog.Disk, active catalog.Layer, overlays string) (*cutDisk, error) {
	if d.SettleNeeded {
		return nil, fault.New(fault.Busy, "its launch path is not settled since the last snapshot")
	}
	file, err := fileAt(d.LaunchPath)
	if err != nil {
		return nil, err
	}
	if !file.is(active) {
		return nil, fault.New(fault.Unsupported, "its launch path %s leads to another file than the layer %s that was active when it was last seen",
			d.LaunchPath, active.Path)
	}
	c := &cutDisk{
		Device: d.Device, DiskID: d.ID, BaseID: active.ID, BaseFormat: active.Format, Size: active.VirtualSize,
	}
	return c, c.place(d, active, overlays)
}

// takeStopped is the recipe for a VM without a QEMU process. The image
// locks keep a QEMU that starts meanwhile from opening the disks.
func (c *cut) takeStopped(ctx context.Context, offline bool) (err error) {
	o := c.o
	o.Plan(5 + c.hooks.count(hook.PostSnapshot))
	c.offline = offline
	if !c.offline {
		c.quiesce.Reason = "the VM is stopped, and nobody saw its guest shut down"
	}
	c.vm.mu.Lock()
	rec := c.vm.rec
	c.vm.mu.Unlock()
	if c.config, err = storedConfiguration(rec); err != nil {
		return err
	}
	var locks []*blockdev.Lock
	defer func() { _ = closeAll(locks) }()
	err = o.Step(ctx, "overlays", func(ctx context.Context) error {
		for _, d := range c.disks {
			active, err := c.catalog.Layer(ctx, d.BaseID)
			if err != nil {
				return err
			}
			l, err := c.lockTree(ctx, active)
			if err != nil {
				return c.failure(d, err)
			}
			locks = append(locks, l...)
		}
		return c.buildStopped(ctx)
	})
	if err != nil {
		return err
	}
	err = o.Step(ctx, "cut", func(ctx context.Context) error {
		if r, err := c.vm.alone(); err != nil || r != nil {
			return errors.Join(fault.New(fault.Busy, "VM %s was started meanwhile", c.vm.name()), err)
		}
		if err := c.announce(ctx); err != nil {
			return err
		}
		if err := o.PointOfNoReturn(); err != nil {
			return err
		}
		o.DropReverts()
		c.cutAt = time.Now()
		return nil
	})
	if err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	if err := c.finish(ctx); err != nil {
		return err
	}
	if err := closeAll(locks); err != nil {
		return err
	}
	locks = nil
	if err := c.convertStopped(ctx); err != nil {
		return err
	}
	c.ended(ctx)
	return nil
}

// buildStopped makes the overlays' files.
func (c *cut) buildStopped(ctx context.Context) error {
	for i, d := range c.disks {
		d.name(c.o.ID(), i)
	}
	if err := c.o.Journal(ctx, entryPrepare, c.prepared()); err != nil {
		return err
	}
	for _, d := range c.disks {
		if err := d.makeNames(); err != nil {
			return c.failure(d, err)
		}
		c.o.Revert("remove overlay "+d.Overlay, func(context.Context) error { return d.removeNames() })
		if err := d.overlay().Format(ctx, d.overlayDir); err != nil {
			return c.failure(d, err)
		}
	}
	return nil
}

// convertStopped settles the disks whose launch path cannot lead to an overlay.
func (c *cut) convertStopped(ctx context.Context) error {
	for _, d := range c.disks {
		if d.Settle == SettleLive {
			continue
		}
		disks, err := c.catalog.Disks(ctx, c.vm.id)
		if err != nil {
			return err
		}
		for _, rec := range disks {
			if rec.ID != d.DiskID {
				continue
			}
			err := c.o.Step(ctx, "settle "+d.Device, func(ctx context.Context) error { return c.settleDisk(ctx, c.o, rec) })
			if err != nil {
				c.warn(warnNotSettled, d.Device, err.Error())
			}
		}
	}
	return nil
}

// storedConfiguration is what a snapshot of a stopped VM keeps of it.
func storedConfiguration(rec catalog.VM) (json.RawMessage, error) {
	return json.Marshal(configuration{Command: rec.Command, Unit: rec.Unit, UUID: rec.UUID})
}
