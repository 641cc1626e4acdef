package agent

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/monitor"
)

// supervise follows a block job: it reports its progress, lets it rest while the
// operation does, and lets it go on that stopped for want of space when there is
// enough, or that somebody else has paused. It works from a goroutine of its own
// until end is called.
func (d *deletion) supervise(ctx context.Context, g *merging, s *monitor.Session) (watch func(blockdev.JobState), end func()) {
	ctx, stop := context.WithCancel(ctx)
	looks, ended := make(chan struct{}, 1), make(chan struct{})
	go func() {
		defer close(ended)
		for rested := false; ; {
			rests, changed := d.o.Rests()
			if rests != rested {
				rested = rests
				d.steer(ctx, g, s)
			}
			select {
			case <-ctx.Done():
				return
			case <-changed:
			case <-looks:
				d.steer(ctx, g, s)
			}
		}
	}()
	watch = func(j blockdev.JobState) {
		d.o.Progress(j.Done, j.Total, "bytes")
		rests, _ := d.o.Rests()
		if standsStill(j) == rests && j.Stopped == blockdev.NotStopped {
			return
		}
		select {
		case looks <- struct{}{}:
		default: // it is being looked after
		}
	}
	return watch, func() { stop(); <-ended }
}

// standsStill reports whether somebody has paused a job, or QEMU has stopped it.
func standsStill(j blockdev.JobState) bool {
	return j.Status == monitor.JobPaused || j.Status == monitor.JobStandby
}

// steer makes a job go on or rest as the operation does. One that is about to end
// is let be.
func (d *deletion) steer(ctx context.Context, g *merging, s *monitor.Session) {
	j, err := blockdev.FindJob(ctx, s, d.job(g))
	rests, _ := d.o.Rests()
	switch {
	case errors.Is(err, blockdev.ErrNoJob):
		return // it is about to begin, or has ended
	case err != nil:
	case rests && j.Status == monitor.JobRunning:
		err = blockdev.PauseJob(ctx, s, j.ID)
	case !rests && (standsStill(j) || j.Stopped != blockdev.NotStopped):
		if j.Stopped == blockdev.StopNoSpace {
			err = d.awaitRoom(ctx, g)
		}
		if err == nil {
			err = blockdev.ResumeJob(ctx, s, j.ID)
		}
	}
	if err != nil && ctx.Err() == nil {
		d.o.Logger().Warn("a merge cannot be paused or resumed yet", "disk", g.Device, "error", err)
	}
}

// awaitRoom waits until the file that a merge writes to has room for what is
// missing in it, and says how much that is.
func (d *deletion) awaitRoom(ctx context.Context, g *merging) error {
	dir := g.Prefix + filepath.Dir(g.into().Path)
	for told := false; ; told = true {
		need, free, err := d.shortOf(ctx, g, dir)
		if err != nil {
			return err
		}
		if free >= need {
			return nil
		}
		if !told {
			d.o.Warn(op.Warning{Code: warnNoSpace, Disk: g.Device, Message: fmt.Sprintf(
				"the merge has stopped, because %s is full: it needs %d bytes there, and %d are free; it goes on by itself when there are enough",
				dir, need, free)})
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-d.stopping:
			return op.ErrLeave
		case <-time.After(askAgain):
		}
	}
}

// roomForTables is what the tables of an image may grow by beside its data.
const roomForTables = 1 << 20

// shortOf returns how many bytes a merge still needs, and how many are free.
func (d *deletion) shortOf(ctx context.Context, g *merging, dir string) (need, free uint64, err error) {
	from := g.Upper
	if g.Way != MergeCommit {
		from = g.Lower
	}
	into := g.into()
	need, err = blockdev.MissingBytes(ctx, blockdev.Image{Path: g.Prefix + from.Path, Format: from.Format}, blockdev.Image{Path: g.Prefix + into.Path, Format: into.Format})
	if err != nil {
		return 0, 0, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, 0, fmt.Errorf("free space of %s: %w", dir, err)
	}
	return need + roomForTables, st.Bavail * uint64(st.Bsize), nil
}

// insist tries f until it works. What cannot be left undone is done this way: only
// a stop of the agent ends it, which leaves it to the next.
func (d *deletion) insist(ctx context.Context, f func(context.Context) error) error {
	for told := false; ; told = true {
		err := f(ctx)
		if err == nil {
			return nil
		}
		d.o.Logger().Error("a deletion cannot go on yet", "error", err)
		if !told { // the log has the rest: this may go on for hours
			d.o.Warn(op.Warning{Code: warnMergeWaits, Message: "what comes next is tried again each second: " + err.Error()})
		}
		select {
		case <-d.stopping:
			return op.ErrLeave
		case <-time.After(askAgain):
		}
	}
}

// rest waits while the operation is paused.
func (d *deletion) rest(ctx context.Context) error {
	for {
		rests, changed := d.o.Rests()
		if !rests {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-d.stopping:
			return op.ErrLeave
		}
	}
}
