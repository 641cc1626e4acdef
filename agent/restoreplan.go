package agent

import (
	"context"
	"errors"
	"fmt"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/launch"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/monitor"
)

// RestorePlan is what a restore would do.
type RestorePlan struct {
	VM       string
	Snapshot string // name
	Live     bool   // the disks are swapped under the running QEMU process, and the guest is reset
	Disks    []RestorePlanDisk
	Memory   *RestorePlanMemory // nil without memory
	Warnings []op.Warning
	Blockers []*fault.Error // why it would be refused
}

// RestorePlanDisk is one disk in the plan of a restore.
type RestorePlanDisk struct {
	Device   string
	Snapshot string // that the disk is taken from; empty when it stays as it is
	Layer    string // path of the restore point
	Size     uint64 // bytes, afterwards
}

// PlanRestore looks at everything that a restore depends on and changes nothing.
func (a *Agent) PlanRestore(ctx context.Context, req RestoreRequest) (RestorePlan, error) {
	s, v, err := a.snapshotOf(ctx, req.Snapshot)
	if err != nil {
		return RestorePlan{}, err
	}
	register := v.changing.TryRLock()
	if register {
		defer v.changing.RUnlock()
	}
	p, err := a.planRestore(ctx, v, s, req, register)
	if err != nil {
		return RestorePlan{}, err
	}
	defer p.close()
	if id, busy := a.ops.Running(v.id); busy {
		p.refuse(fault.New(fault.Busy, "VM %s: operation %s is running", v.name(), id))
	}
	p.restore.Warnings, p.restore.Blockers = p.plan.Warnings, p.plan.Blockers
	return p.restore, nil
}

// snapshotOf finds a snapshot and its VM.
func (a *Agent) snapshotOf(ctx context.Context, ref string) (catalog.Snapshot, *vm, error) {
	s, err := a.findSnapshot(ctx, ref)
	if err != nil {
		return s, nil, err
	}
	v, err := a.find(s.VMID)
	return s, v, err
}

// restorePlan is what is known of a restore before anything is changed.
type restorePlan struct {
	preflight
	restore RestorePlan
	subset  bool           // the running VM has disks that stay as they are
	resume  bool           // the guest is to run when all is done
	rebooks bool           // QEMU was told to end at a reset, which must be lifted
	load    *memoryRestore // nil without memory
	order   launch.Order   // of the QEMU that loads it
	back    launch.Order   // of the one that would bring the present state back
}

// planRestore looks at everything that a restore depends on. The error is for
// what makes looking impossible; reasons to refuse are in the plan.
func (a *Agent) planRestore(ctx context.Context, v *vm, s catalog.Snapshot, req RestoreRequest, register bool) (*restorePlan, error) {
	all, err := a.compose(ctx, v, s, req)
	if err != nil {
		return nil, err
	}
	r, err := v.known(ctx)
	if err != nil {
		return nil, err
	}
	p := &restorePlan{preflight: preflight{live: r != nil, run: r}}
	p.plan.VM = v.name()
	p.restore = RestorePlan{VM: v.name(), Snapshot: s.Name, Live: p.live && !req.replaces()}
	if req.replaces() {
		err = a.planRestoreMemory(ctx, v, s, all, req, p)
	} else if p.live {
		err = a.planRestoreLive(ctx, v, all, p, register)
	} else {
		err = a.planRestoreStopped(ctx, v, all, p)
	}
	if err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

func (a *Agent) planRestoreStopped(ctx context.Context, v *vm, all []chosen, p *restorePlan) error {
	v.mu.Lock()
	layers, stopped := v.layers, v.rec.Stopped
	proc := a.described(v.rec)
	v.mu.Unlock()
	if stopped == endedByMigration {
		return fault.New(fault.Unsupported, "VM %s has migrated to another host, where its disks may be in use", v.name())
	}
	for _, c := range all {
		d, err := stoppedDisk(c.disk, layerOf(layers, c.disk.ActiveLayer), a.overlayDir(proc, c.disk.Device))
		if err == nil {
			err = a.aim(ctx, d, c)
		}
		p.take(v, d, c, err)
	}
	return nil
}

func (a *Agent) planRestoreLive(ctx context.Context, v *vm, all []chosen, p *restorePlan, register bool) error {
	s, err := v.monitorOf(p.run)
	if err != nil {
		return err
	}
	g, err := blockdev.ReadGraph(ctx, s)
	if err != nil {
		return fault.New(fault.Unresponsive, "VM %s: %w", v.name(), err)
	}
	if err := notMigrating(ctx, v, s); err != nil {
		return err
	}
	if err := p.runState(ctx, v, s); err != nil {
		return err
	}
	if err := crashesAtReopen(ctx, s); errors.Is(err, errReopenCrashes) {
		p.refuse(fault.New(fault.Unsupported, "VM %s: the disks of a QEMU before 9.0 with iothreads cannot be swapped while it runs: it would crash", v.name()).
			WithHint("stop the VM, restore, and start it"))
	} else if err != nil {
		return fault.New(fault.Unresponsive, "VM %s: %w", v.name(), err)
	}
	disks := a.liveDisks(ctx, v, p.run, g, register)
	for _, c := range all {
		d, err := a.swappable(ctx, v, p, g, disks, c)
		p.take(v, d, c, err)
	}
	for i := range disks {
		if d := &disks[i]; !p.restores(d.rec.ID) {
			p.subset = true
			p.restore.Disks = append(p.restore.Disks, RestorePlanDisk{Device: d.drive.Device, Size: d.virtualSize()})
		}
	}
	p.firmware(p.run)
	return nil
}

// restores reports whether a disk is among those that are restored.
func (p *restorePlan) restores(diskID string) bool {
	for _, d := range p.disks {
		if d.DiskID == diskID {
			return true
		}
	}
	return false
}

// runState notes whether the guest is to run afterwards: one that its owner has
// paused stays paused, one that crashed is to come back.
func (p *restorePlan) runState(ctx context.Context, v *vm, s *monitor.Session) error {
	st, err := s.QueryStatus(ctx)
	if err != nil {
		return fault.New(fault.Unresponsive, "VM %s: %w", v.name(), err)
	}
	switch st.Status {
	case monitor.RunStatePaused, monitor.RunStatePrelaunch:
		p.warn(warnPaused, "", "the VM is %s, and stays so", st.Status)
	default:
		p.resume = true
	}
	p.rebooks = p.run.proc.NoReboot
	return nil
}

// swappable prepares the swap of one disk of a running VM.
func (a *Agent) swappable(ctx context.Context, v *vm, p *restorePlan, g *blockdev.Graph, disks []liveDisk, c chosen) (*cutDisk, error) {
	for i := range disks {
		d := &disks[i]
		if d.rec.ID != c.disk.ID {
			continue
		}
		if d.reason != "" {
			return nil, fault.New(fault.Unsupported, "%s", d.reason)
		}
		if job := g.Job(d.drive); job != "" {
			return nil, fault.New(fault.Busy, "QEMU's block job %s is working on it", job)
		}
		cut, err := newCutDisk(p.run, d, a.overlayDir(p.run.proc, d.rec.Device))
		if err != nil {
			return nil, err
		}
		if err := cut.settles(d.rec.SettleNeeded, v.layersOf(d.active), &p.preflight); err != nil {
			return cut, err
		}
		for _, l := range d.chain {
			cut.Opened = append(cut.Opened, l.Filename)
		}
		return cut, a.aim(ctx, cut, c)
	}
	return nil, fault.New(fault.Unsupported, "QEMU does not show it").WithHint("vmsnap vm show %s tells its disks", v.name())
}

// aim makes a cut that of a restore: its overlay is to lie on the restore point.
func (a *Agent) aim(ctx context.Context, d *cutDisk, c chosen) error {
	if d.onDevice() {
		return fault.New(fault.Unsupported, "it is a block device, which cannot be made to lead to another state").
			WithHint("vmsnap snapshot export makes a file of what the snapshot holds; write that to the device when the VM is stopped")
	}
	if d.BaseID == c.point.LayerID {
		return fault.New(fault.Failed, "its restore point is the layer that it writes to")
	}
	l, err := a.catalog.Layer(ctx, c.point.LayerID)
	if err != nil {
		return err
	}
	chain, err := a.chain(ctx, l)
	if err != nil {
		return err
	}
	if err := verifyChain(chain, d.Prefix); err != nil {
		return err
	}
	active, err := a.catalog.Layer(ctx, d.BaseID)
	if err != nil {
		return err
	}
	// A raw launch path is one more name of the base, until it is converted.
	d.Ours = active.Operation != "" && d.Settle == SettleLive
	d.Size, d.On = c.point.Size, nil
	for _, l := range chain {
		d.On = append(d.On, below{ID: l.ID, Path: l.Path, Format: l.Format, Device: l.Device != ""})
	}
	return nil
}

// take adds a disk to the restore, or a reason to refuse it.
func (p *restorePlan) take(v *vm, d *cutDisk, c chosen, err error) {
	if err != nil {
		if d != nil {
			p.unfit = append(p.unfit, d)
		}
		refusal := fault.New(kindOf(err), "VM %s: disk %s: %w", v.name(), c.disk.Device, err)
		if hint := fault.Hint(err); hint != "" {
			refusal = refusal.WithHint("%s", hint)
		}
		p.refuse(refusal)
		return
	}
	p.restore.Disks = append(p.restore.Disks, RestorePlanDisk{Device: c.disk.Device, Snapshot: c.snapshot.Name, Layer: d.On[0].Path, Size: d.Size})
	p.admit(v, d, false)
}

// verifyChain fails unless the files of a layer and of all below it are those
// that the catalog knows, name each other as it has it, and have nobody who
// writes to them: QEMU will follow those names at its next start.
func verifyChain(chain []catalog.Layer, prefix string) error {
	for i, l := range chain {
		file, err := fileAt(prefix + l.Path)
		if err != nil {
			return fmt.Errorf("layer %s: %w", l.Path, err)
		}
		if !file.is(l) {
			return fault.New(fault.Unsupported, "layer %s is another file than it was", l.Path).WithHint("vmsnap doctor tells more")
		}
		var parent catalog.Layer
		if i+1 < len(chain) {
			parent = chain[i+1]
		}
		if err := verifyBacking(prefix, l, parent); err != nil {
			return err
		}
		lock, err := blockdev.LockNoWriters(prefix + l.Path)
		if err != nil {
			return lockError(l.Path, err)
		}
		if err := lock.Close(); err != nil {
			return err
		}
	}
	return nil
}
