package agent

import (
	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
)

// admit adds a disk to the cut when there is room for its overlay, and its chain is
// not too long.
func (p *preflight) admit(v *vm, c *cutDisk, partial bool) {
	free, err := c.overlayDir.Free()
	if err != nil {
		p.drop(v, c.leftOut(), partial, fault.New(fault.Failed, "VM %s: disk %s: %w", v.name(), c.Device, err))
		return
	}
	p.plan.Disks = append(p.plan.Disks, PlanDisk{Device: c.Device, Directory: c.OverlayDir, Free: free, VirtualSize: c.Size, Settle: c.Settle})
	if free < overlayReserve {
		p.unfit = append(p.unfit, c)
		p.drop(v, c.leftOut(), partial, fault.New(fault.NoSpace, "VM %s: disk %s: only %d KiB are free in %s; %d KiB are needed",
			v.name(), c.Device, free>>10, c.OverlayDir, overlayReserve>>10))
		return
	}
	if n := v.chainLength(c.BaseID); p.maxChain > 0 && n >= p.maxChain {
		p.unfit = append(p.unfit, c)
		p.drop(v, c.leftOut(), partial, fault.New(fault.Unsupported, "VM %s: disk %s: %d of its layers lie on each other, which is as many as max-chain allows: delete snapshots first",
			v.name(), c.Device, n))
		return
	}
	p.disks = append(p.disks, c)
}

// chainLength counts a layer and those below it.
func (v *vm) chainLength(id string) (n int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for l := layerOf(v.layers, id); l.ID != "" && n < len(v.layers); l = layerOf(v.layers, l.Parent) {
		n++
	}
	return n
}

// drop refuses the snapshot for a disk, or leaves the disk out.
func (p *preflight) drop(v *vm, d catalog.SnapshotDisk, partial bool, e *fault.Error) {
	if partial {
		p.partial, d.Excluded = true, true
		p.excluded = append(p.excluded, d)
		p.warn(warnDropped, d.Device, "left out: %s", e.Message)
		return
	}
	p.refuse(e.WithHint("--exclude %s leaves it out, --allow-partial leaves out whatever fails; vmsnap vm show %s tells more", d.Device, v.name()))
}
