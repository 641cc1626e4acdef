package agent

import (
	"context"
	"errors"
	"fmt"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/monitor"
)

// job names the block job of a merge, so that it is found again.
func (d *deletion) job(g *merging) string {
	return fmt.Sprintf("%s%s-d%d", nodePrefix, d.o.ID(), g.N)
}

// liveMerge is one of package blockdev's merges.
type liveMerge interface {
	Run(ctx context.Context, m blockdev.Monitor) error
	Abandon(ctx context.Context, m blockdev.Monitor) (merged bool, err error)
}

// target is a layer that QEMU writes to.
func (q *mergingInQEMU) target(node string, l catalog.Layer) blockdev.Target {
	return blockdev.Target{Node: node, File: blockdev.FileID{Dev: l.Dev, Ino: l.Ino}, Options: q.Options}
}

// live is the merge as QEMU is to do it. disk is nil unless the upper layer is
// active and committed.
func (g *merging) live(job blockdev.Job, disk *cutDisk) liveMerge {
	q := g.QEMU
	switch {
	case g.Way == MergeCommit && g.Active:
		return blockdev.ActiveMerge{
			Job: job, Top: q.Upper, Base: q.target(q.Lower, g.Lower), PID: q.PID,
			BeforePivot: func(context.Context) error { return disk.uncover() },
		}
	case g.Way == MergeCommit:
		return blockdev.Commit{
			Job: job, Above: q.target(q.Above, g.Above), Top: q.Upper, Base: q.target(q.Lower, g.Lower),
			BackingName: g.Lower.Path, PID: q.PID,
		}
	default:
		return blockdev.Stream{
			Job: job, Into: q.target(q.Upper, g.Upper), Drop: []string{q.Lower}, Below: q.Below,
			BackingName: g.Below.Path, PID: q.PID,
		}
	}
}

// mergeLive merges in the QEMU that g names, or goes on with the job that it has.
// Its nil means that the merge has been done. With an error that is not undecided
// the disk runs on the layers that it ran on before, and they are protected.
func (d *deletion) mergeLive(ctx context.Context, g *merging) (err error) {
	_, r := d.runOf(discover.Process{PID: g.QEMU.PID, StartTime: g.QEMU.StartTime})
	if r == nil {
		return errLookAgain // it is not known yet, or any more
	}
	s, err := d.vm.monitorOf(r)
	if err != nil {
		return err
	}
	var disk *cutDisk
	if g.Way == MergeCommit && g.Active {
		if disk, err = g.disk(); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, disk.close()) }()
	}
	if err := g.expose(); err != nil {
		return errors.Join(err, g.protect())
	}
	if err = d.runLive(ctx, g, s, disk); err == nil || errors.Is(err, op.ErrLeave) {
		return err
	}
	if !discover.Same(g.QEMU.PID, g.QEMU.StartTime) {
		return errors.Join(errLookAgain, err) // before its end or after: the files tell
	}
	if undecided(err) {
		return err
	}
	if disk != nil {
		// The hook may have succeeded: the disk goes on writing to the upper layer.
		if back := d.insist(context.WithoutCancel(ctx), func(context.Context) error { return errors.Join(disk.coverLaunch(), disk.dir.Sync()) }); back != nil {
			return errors.Join(err, back)
		}
	}
	err = errors.Join(err, g.protect())
	if _, misnamed := errors.AsType[*blockdev.MisnamedError](err); misnamed {
		return &staysError{err}
	}
	return err
}

// runLive runs the block job under supervision, or ends it when the operation was
// cancelled before.
func (d *deletion) runLive(ctx context.Context, g *merging, s *monitor.Session, disk *cutDisk) error {
	if cause := context.Cause(ctx); cause != nil {
		return d.abandon(ctx, g, s, disk, cause)
	}
	leaving, stop := d.leavingJob(ctx)
	defer stop()
	watch, end := d.supervise(leaving, g, s)
	defer end()
	err := g.live(blockdev.Job{ID: d.job(g), Speed: d.Speed, Watch: watch}, disk).Run(leaving, s)
	if err != nil && errors.Is(context.Cause(leaving), op.ErrLeave) {
		return errors.Join(op.ErrLeave, err)
	}
	return err
}

// abandon ends the job that an earlier agent has left, when the operation is not
// to go on.
func (d *deletion) abandon(ctx context.Context, g *merging, s *monitor.Session, disk *cutDisk, cause error) error {
	if disk != nil {
		if _, err := blockdev.FindJob(context.WithoutCancel(ctx), s, d.job(g)); err == nil {
			// A job that is pending writes to both until it is cancelled.
			if err := errors.Join(disk.coverLaunch(), disk.dir.Sync()); err != nil {
				return err
			}
		}
	}
	merged, err := g.live(blockdev.Job{ID: d.job(g)}, disk).Abandon(context.WithoutCancel(ctx), s)
	if err == nil && !merged {
		err = cause
	}
	return err
}

// leavingJob returns a context that leaves a block job as it is when the agent
// stops.
func (d *deletion) leavingJob(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, leave := context.WithCancelCause(ctx)
	go func() {
		select {
		case <-d.stopping:
			leave(fmt.Errorf("%w: %w", op.ErrLeave, blockdev.ErrLeaveJob))
		case <-ctx.Done():
		}
	}()
	return ctx, func() { leave(nil) }
}
