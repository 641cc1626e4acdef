package blockdev

import (
	"context"
	"errors"
	"fmt"

	"github.com/vmsnap/vmsnap/monitor"
)

// ErrNotMerged means that a merge has ended and its disk runs on the same layers
// as before. The layer that was written to may hold some of the other's data,
// which is no harm to the disk, but makes it useless as a restore point.
var ErrNotMerged = errors.New("the layers were not merged; the disk runs on the same ones as before")

// ActiveMerge folds the active layer of a running disk into the layer below it,
// which becomes the active one (block-commit in qapi/block-core.json).
//
// Before, the base must be taken for no restore point any more, durably, and its
// file must be open to writing (Dir.SetImmutable). No other layer may lie on
// it: QEMU knows only those that are open.
type ActiveMerge struct {
	Job
	Top  string // format node of the active layer
	Base Target // the layer below
	PID  int    // of QEMU
	// BeforePivot makes the launch path lead to the base, durably. It is called
	// when both layers read the same, and the guest's requests to the disk stand
	// still until it returns: it has 10 seconds, and must not ask the guest. When
	// it fails it must have left the launch path as it was, because the guest
	// writes to the top again at once. It is called again after an interruption,
	// and after a pivot that somebody else brought about, so it must be content
	// with what it did before.
	BeforePivot func(ctx context.Context) error
}

// Run merges, or goes on with the job of this id, whatever its state, or with
// what was left to do after it. It returns nil if and only if the disk runs on
// the base and the nodes of the top are gone.
//
// When ctx ends before the pivot, or BeforePivot fails, the job is cancelled and
// the graph is as before; from BeforePivot's success on it is too late. With
// ErrLeaveJob as its cause the job is left as it is, unless it was told to come
// to its end: a job that is left pending holds the guest's requests. When QEMU
// does not answer it is left in any case. The error is ErrJobUnfinished then: run
// it again, soon.
//
// After ErrNotMerged, and after a JobError, BeforePivot may have succeeded: the
// caller leads the launch path back to the top, at once.
func (a ActiveMerge) Run(ctx context.Context, m Monitor) error {
	if err := a.run(ctx, m); err != nil {
		return fmt.Errorf("merge %s into %s: %w", a.Top, a.Base.Node, err)
	}
	return nil
}

func (a ActiveMerge) run(ctx context.Context, m Monitor) error {
	_, err := FindJob(ctx, m, a.ID)
	if errors.Is(err, ErrNoJob) {
		g, err := ReadGraph(ctx, m)
		if err != nil {
			return err
		}
		if pivoted, err := a.pivoted(g); err != nil {
			return err
		} else if pivoted {
			return a.afterPivot(ctx, m, false)
		}
		if err := a.begin(ctx, m, g); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	return a.finish(ctx, m)
}

// Abandon cancels the job that an earlier process has left, and makes the graph
// what it was. If the job is pending, the launch path must lead to the top
// before. A merge that has pivoted is finished instead, and merged is true.
func (a ActiveMerge) Abandon(ctx context.Context, m Monitor) (merged bool, err error) {
	_, err = a.cancel(ctx, m)
	if err == nil || errors.Is(err, ErrNoJob) {
		merged, err = a.conclude(ctx, m, false)
	}
	if err != nil {
		return merged, fmt.Errorf("abandon the merge of %s into %s: %w", a.Top, a.Base.Node, err)
	}
	return merged, nil
}

// begin verifies that the two layers lie on each other, opens the base for
// writing and starts the job.
func (a ActiveMerge) begin(ctx context.Context, m Monitor, g *Graph) error {
	drive, err := g.driveOn(a.Top)
	if err != nil {
		return err
	}
	chain, err := g.Chain(drive)
	if err != nil {
		return err
	}
	if len(chain) < 2 || chain[1].Node.Name != a.Base.Node {
		return fmt.Errorf("node %s does not lie on node %s", a.Top, a.Base.Node)
	}
	if err := a.Base.verifyName(a.PID, chain[1]); err != nil {
		return err
	}
	if err := a.Base.reopen(ctx, m, g, false); err != nil {
		return err
	}
	err = a.start(ctx, m, "block-commit", map[string]any{
		"device": drive.Root, "top-node": a.Top, "base-node": a.Base.Node, "auto-dismiss": false,
	})
	if refused(err) {
		return errors.Join(err, a.protectBase(ctx, m))
	}
	return err
}

// driveOn returns the drive whose active layer is a node.
func (g *Graph) driveOn(top string) (Drive, error) {
	for _, d := range g.Drives() {
		if chain, err := g.Chain(d); err == nil && chain[0].Node.Name == top {
			return d, nil
		}
	}
	return Drive{}, fmt.Errorf("node %s is the active layer of no drive", top)
}

// pivoted reports whether a disk runs on the base, and fails when none runs on
// either layer.
func (a ActiveMerge) pivoted(g *Graph) (bool, error) {
	_, onTop := g.driveOn(a.Top)
	_, onBase := g.driveOn(a.Base.Node)
	if onTop != nil && onBase != nil {
		return false, onTop
	}
	return onBase == nil, nil
}

// finish takes the job from whatever state it is in to its end.
func (a ActiveMerge) finish(ctx context.Context, m Monitor) error {
	s, err := a.await(ctx, m, monitor.JobReady, monitor.JobPending)
	if err == nil && s.Status == monitor.JobReady {
		s, err = a.complete(ctx, m)
	}
	hooked := false
	if err == nil && s.Status == monitor.JobPending {
		s, hooked, err = a.pivot(ctx, m)
	}
	return a.settle(ctx, m, s, err, func(ctx context.Context) (bool, error) { return a.conclude(ctx, m, hooked) })
}

// complete tells the ready job to come to an end. Until it is pending the guest
// can still write faster than the job copies.
func (a ActiveMerge) complete(ctx context.Context, m Monitor) (JobState, error) {
	ctx, stop := staying(ctx)
	defer stop()
	for again := false; ; again = true {
		err := jobCommand(context.WithoutCancel(ctx), m, "job-complete", a.ID)
		if err == nil {
			return a.await(ctx, m, monitor.JobPending)
		}
		if !refused(err) {
			return JobState{}, fmt.Errorf("job %s: %w: %w", a.ID, ErrJobUnfinished, err)
		}
		// Since it was seen ready it has gone on, to its end or to pending, or was
		// paused: once it is ready again it is told again.
		s, look := a.await(ctx, m, monitor.JobReady, monitor.JobPending)
		if look == nil && s.Status == monitor.JobReady {
			if again {
				return s, err
			}
			continue
		}
		return s, look
	}
}

// staying returns a context that ends with ctx, but not to leave the job.
func staying(ctx context.Context) (context.Context, context.CancelFunc) {
	stay, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		if cause := context.Cause(ctx); !errors.Is(cause, ErrLeaveJob) {
			cancel(cause)
		}
	})
	return stay, func() { stop(); cancel(nil) }
}

// pivot calls the hook and lets the job replace the top by the base. hooked
// reports whether the hook succeeded.
func (a ActiveMerge) pivot(ctx context.Context, m Monitor) (s JobState, hooked bool, err error) {
	whole := context.WithoutCancel(ctx)
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, ErrLeaveJob) {
		return s, false, cause
	}
	if err := a.beforePivot(whole); err != nil {
		return s, false, err
	}
	s, err = a.finalize(whole, m)
	return s, true, err
}

func (a ActiveMerge) beforePivot(ctx context.Context) error {
	ctx, stop := context.WithTimeout(ctx, pivotTimeout)
	defer stop()
	if err := a.BeforePivot(ctx); err != nil {
		return fmt.Errorf("before the pivot: %w", err)
	}
	return nil
}

// conclude finds out what came of a job that has ended, or was dismissed: one
// that was cancelled when it was ready ends without an error, and has not pivoted.
func (a ActiveMerge) conclude(ctx context.Context, m Monitor, hooked bool) (merged bool, err error) {
	g, err := ReadGraph(ctx, m)
	if err != nil {
		return false, fmt.Errorf("job %s: %w: %w", a.ID, ErrJobUnfinished, err)
	}
	if merged, err = a.pivoted(g); err != nil {
		return false, err
	}
	if err := a.dismiss(ctx, m); err != nil {
		return merged, err
	}
	if merged {
		return true, a.afterPivot(ctx, m, hooked)
	}
	return false, a.protectBase(ctx, m)
}

// afterPivot removes what is left of the top in QEMU.
func (a ActiveMerge) afterPivot(ctx context.Context, m Monitor, hooked bool) error {
	ctx = context.WithoutCancel(ctx)
	if !hooked {
		if err := a.beforePivot(ctx); err != nil {
			return err
		}
	}
	return dropLayer(ctx, m, a.Top)
}

// protectBase makes the base read-only again in QEMU.
func (a ActiveMerge) protectBase(ctx context.Context, m Monitor) error {
	ctx = context.WithoutCancel(ctx)
	g, err := ReadGraph(ctx, m)
	if err != nil {
		return err
	}
	return a.Base.reopen(ctx, m, g, true)
}

// dropLayer deletes the nodes of a layer that no drive uses any more. Nodes that
// QEMU made by itself end with their last user.
func dropLayer(ctx context.Context, m Monitor, node string) error {
	g, err := ReadGraph(ctx, m)
	if err != nil {
		return err
	}
	file := Overlay{Node: node}.fileNode()
	if n := g.Nodes[node]; n != nil && n.Child("file") != "" {
		file = n.Child("file")
	}
	if err := deleteNode(ctx, m, node); err != nil {
		return err
	}
	return deleteNode(ctx, m, file)
}
