package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/blockdev"
)

// mergeBack takes a cut back that has happened: what the guest wrote since goes
// into the layers that were covered, and the overlays are removed. It is tried
// until it works, since the disks must end up on layers that are accounted for.
func (c *cut) mergeBack(ctx context.Context) error {
	ctx, stop := c.leaving(ctx)
	defer stop()
	if err := c.untilDone(c.settleOnce)(ctx); err != nil {
		return err
	}
	for n, d := range c.disks {
		for told := false; ; told = true {
			err := c.mergeDisk(ctx, d, n)
			if err == nil {
				break
			}
			if errors.Is(err, errKeepLayers) {
				return c.keepLayers(ctx, err)
			}
			if cause := context.Cause(ctx); cause != nil {
				return cause
			}
			c.o.Logger().Error("an overlay cannot be merged back yet", "disk", d.Device, "error", err)
			if !told {
				c.warn(warnNotSettled, d.Device, "the cut is being taken back, which is tried again each second: "+err.Error())
			}
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-time.After(askAgain):
			}
		}
	}
	return c.recordMerged(ctx)
}

// errKeepLayers means that an overlay cannot be merged back while this QEMU
// runs.
var errKeepLayers = errors.New("its layers stay as they are")

// keepLayers records the layers without a snapshot, which is harmless: each
// disk has one more of them.
func (c *cut) keepLayers(ctx context.Context, why error) error {
	for _, d := range c.disks { // what was exposed to be merged
		if err := d.protect(); err != nil {
			c.warn(warnNoImmutable, d.Device, err.Error())
		}
	}
	c.warn(warnLayersKept, "", "the overlays of the cut stay, each disk has one more layer now: "+why.Error())
	return c.untilDone(func(ctx context.Context) error {
		layers, disks, err := c.entries(ctx, &catalog.Snapshot{})
		if err != nil {
			return err
		}
		return c.putLayers(ctx, layers, disks)
	})(ctx)
}

// mergeDisk merges one overlay into its base, in QEMU while it runs.
func (c *cut) mergeDisk(ctx context.Context, d *cutDisk, n int) error {
	if _, err := d.overlayDir.Stat(d.Overlay); errors.Is(err, fs.ErrNotExist) {
		return nil // merged already
	}
	if err := d.expose(); err != nil {
		return err
	}
	if err := c.findRun(); err != nil {
		return err
	}
	if c.run == nil {
		return c.mergeStopped(ctx, d)
	}
	s, err := c.vm.monitorOf(c.run)
	if err != nil {
		return err
	}
	c.session = s
	g, err := blockdev.ReadGraph(ctx, s)
	if err != nil {
		return err
	}
	if merged, err := c.pivoted(g, d); err != nil {
		return err
	} else if merged {
		return errors.Join(d.overlay().Remove(ctx, s), d.uncover(), d.removeOverlay())
	}
	base, err := c.mergeTarget(g, d)
	if err != nil {
		return err
	}
	file, err := d.baseDir.Lead(d.Base)
	if err != nil {
		return err
	}
	merge := blockdev.ActiveMerge{
		Job: blockdev.Job{
			ID:    fmt.Sprintf("%s%s-m%d", nodePrefix, c.o.ID(), n),
			Watch: func(j blockdev.JobState) { c.o.Progress(j.Done, j.Total, "bytes") },
		},
		Top: d.overlay().Node, Base: blockdev.Target{Node: base, File: file.FileID, Options: d.Options}, PID: c.run.proc.PID,
		BeforePivot: func(context.Context) error { return d.uncover() },
	}
	if err := merge.Run(ctx, s); err != nil {
		if discover.Same(c.run.proc.PID, c.run.proc.StartTime) {
			return errors.Join(err, d.coverLaunch())
		}
		return err // QEMU is gone, before the pivot or after it: it is merged offline next
	}
	if err := d.overlay().Remove(ctx, s); err != nil {
		return err
	}
	return d.removeOverlay()
}

// pivoted reports whether an earlier agent has merged the overlay, and QEMU runs
// on the base, so that only what is left of the overlay is to go. The launch path
// leads to the base from when both hold the same.
func (c *cut) pivoted(g *blockdev.Graph, d *cutDisk) (bool, error) {
	if g.Nodes[d.overlay().Node] != nil || d.Settle != SettleLive {
		return false, nil // the merge finds out by itself
	}
	launch, err := d.dir.Lead(d.Launch)
	if err != nil {
		return false, err
	}
	base, err := d.baseDir.Lead(d.Base)
	if err != nil || launch.FileID != base.FileID {
		return false, err
	}
	for _, drive := range g.Drives() {
		chain, err := g.Chain(drive)
		if err != nil || len(chain) == 0 {
			continue // no disk of ours
		}
		active, err := blockdev.StatPath(d.Prefix + absolute(c.run.proc, chain[0].Filename))
		if err == nil && active.FileID == base.FileID {
			return true, nil
		}
	}
	return false, nil
}

// findRun finds the VM's process, which may have ended since the cut, or been
// started again by its owner.
func (c *cut) findRun() error {
	if c.run != nil && discover.Same(c.run.proc.PID, c.run.proc.StartTime) {
		return nil
	}
	r, err := c.vm.alone()
	if err != nil {
		return err
	}
	c.run = r
	return nil
}

// mergeTarget returns the node that the overlay lies on. QEMU will reopen it for
// writing by the name it was opened with, so that must lead to the base.
func (c *cut) mergeTarget(g *blockdev.Graph, d *cutDisk) (string, error) {
	top := g.Nodes[d.overlay().Node]
	if top == nil {
		return c.foundTarget(g, d)
	}
	base := g.Nodes[top.Child("backing")]
	if base == nil {
		return "", fault.New(fault.Failed, "VM %s: disk %s: QEMU does not describe the layer below %s", c.vm.name(), d.Device, d.Overlay)
	}
	opened, err := blockdev.StatPath(d.Prefix + absolute(c.run.proc, base.Filename))
	if err != nil {
		return "", err
	}
	wanted, err := d.baseDir.Lead(d.Base)
	if err != nil {
		return "", err
	}
	if opened.FileID != wanted.FileID {
		return "", fmt.Errorf("disk %s: QEMU calls %s by the name %s, which leads to another file now: %w", d.Device, d.Base, base.Filename, errKeepLayers)
	}
	return base.Name, nil
}

// foundTarget is mergeTarget for a QEMU that was started since the cut, whose
// nodes have other names.
func (c *cut) foundTarget(*blockdev.Graph, *cutDisk) (string, error) {
	return "", fmt.Errorf("VM %s was started again meanwhile: %w", c.vm.name(), errKeepLayers)
}

// mergeStopped merges while no QEMU runs. Until the launch path leads to the
// base, a start comes up on the overlay, which is whole the whole time.
func (c *cut) mergeStopped(ctx context.Context, d *cutDisk) (err error) {
	overlay, base := d.Prefix+d.overlayDir.Path(d.Overlay), d.Prefix+d.baseDir.Path(d.Base)
	var locks []*blockdev.Lock
	defer func() { err = errors.Join(err, closeAll(locks)) }()
	for _, path := range []string{overlay, base} {
		lock, err := blockdev.LockNoWriters(path)
		if err != nil {
			return lockError(path, err)
		}
		locks = append(locks, lock)
	}
	merge := blockdev.Offline{Locks: locks, Progress: func(done, total uint64) { c.o.Progress(done, total, "") }}
	if err := merge.Commit(ctx, overlay, base, d.BaseFormat); err != nil {
		return err
	}
	return errors.Join(d.uncover(), d.removeOverlay())
}

// recordMerged records what the base is called from now on: QEMU knows it by
// its permanent name.
func (c *cut) recordMerged(ctx context.Context) error {
	return c.untilDone(func(ctx context.Context) error {
		var layers []catalog.Layer
		for _, d := range c.disks {
			l, err := c.catalog.Layer(ctx, d.BaseID)
			if err != nil {
				return err
			}
			l.Path, l.Immutable, l.Covered = d.baseDir.Path(d.Base), false, false
			layers = append(layers, l)
		}
		if err := c.putLayers(ctx, layers, nil); err != nil {
			return err
		}
		return c.reload(ctx, c.vm)
	})(ctx)
}
