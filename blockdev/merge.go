package blockdev

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/vmsnap/vmsnap/monitor"
)

// ErrNotMerged means that a merge came to its end and the disk still runs on
// the layer that was to be folded: somebody has cancelled it.
var ErrNotMerged = errors.New("the merge was cancelled; the disk runs on the same layer as before")

// ActiveMerge folds the active layer of a running disk into the layer below it,
// which becomes the active one (block-commit in qapi/block-core.json).
type ActiveMerge struct {
	Job  string // id of the block job
	Top  string // node of the active layer
	Base string // node of the layer below
	// BeforePivot is called when the base holds everything, and the guest's
	// writes wait for the end. It makes durable what a start after a crash
	// needs. If it fails, the disk stays on the top.
	BeforePivot func(ctx context.Context) error
	// Progress, when not nil, is told bytes about four times a second.
	Progress func(done, total uint64)
}

// Run merges, or goes on with a job of the same id that an earlier process has
// begun. It returns nil if and only if the disk runs on the base; the nodes and
// the file of the top are the caller's to remove. When ctx ends before the pivot
// the job is cancelled, which leaves the base with some of the top's data, and
// the disk as it was.
func (a ActiveMerge) Run(ctx context.Context, m Monitor) error {
	sub := m.Subscribe(16, "JOB_STATUS_CHANGE")
	defer sub.Close()
	job, err := a.find(ctx, m)
	if errors.Is(err, errNoJob) {
		if merged, err := a.merged(ctx, m); err != nil || merged {
			return err
		}
		err = m.Execute(ctx, "block-commit", map[string]any{
			"job-id": a.Job, "device": a.Top, "top-node": a.Top, "base-node": a.Base,
			"auto-finalize": false, "auto-dismiss": false,
		}, nil)
	}
	if err != nil {
		return fmt.Errorf("merge %s into %s: %w", a.Top, a.Base, err)
	}
	job, err = a.follow(ctx, m, sub)
	if err != nil {
		return fmt.Errorf("merge %s into %s: %w", a.Top, a.Base, err)
	}
	return a.conclude(context.WithoutCancel(ctx), m, job)
}

// conclude dismisses the job and finds out what came of it: one that was
// cancelled when it was ready ends without an error, and has not pivoted.
func (a ActiveMerge) conclude(ctx context.Context, m Monitor, job monitor.Job) error {
	if err := m.Execute(ctx, "job-dismiss", map[string]any{"id": a.Job}, nil); err != nil {
		return err
	}
	merged, err := a.merged(ctx, m)
	switch {
	case err != nil:
		return err
	case job.Error != "":
		return &JobError{Job: a.Job, Desc: job.Error}
	case !merged:
		return ErrNotMerged
	}
	return nil
}

// look is how often the progress is asked for.
const look = 250 * time.Millisecond

// follow leads the job to its end.
func (a ActiveMerge) follow(ctx context.Context, m Monitor, sub *monitor.Subscription) (monitor.Job, error) {
	asked := map[monitor.JobStatus]bool{}
	cancelled := error(nil)
	tick := time.NewTicker(look)
	defer tick.Stop()
	whole := context.WithoutCancel(ctx)
	for {
		job, err := a.find(whole, m)
		if err != nil {
			return job, err
		}
		if a.Progress != nil {
			a.Progress(uint64(max(job.CurrentProgress, 0)), uint64(max(job.TotalProgress, 0)))
		}
		if job.Status == monitor.JobConcluded {
			if cancelled != nil {
				dismiss := m.Execute(whole, "job-dismiss", map[string]any{"id": a.Job}, nil)
				return job, errors.Join(cancelled, dismiss)
			}
			return job, nil
		}
		if cancelled == nil && ctx.Err() != nil && job.Status != monitor.JobAborting && !asked[monitor.JobPending] {
			cancelled = context.Cause(ctx)
			err = a.tell(whole, m, "job-cancel")
		} else if cancelled == nil && !asked[job.Status] {
			asked[job.Status] = true
			cancelled, err = a.step(ctx, m, job.Status)
		}
		if err != nil {
			return job, err
		}
		if err := awaitLook(ctx, cancelled != nil, sub, tick.C); err != nil {
			return job, err
		}
	}
}

// step does what a status asks for. The first result is why the job was
// cancelled, if it was.
func (a ActiveMerge) step(ctx context.Context, m Monitor, status monitor.JobStatus) (cancelled, err error) {
	whole := context.WithoutCancel(ctx)
	switch status {
	case monitor.JobReady:
		return nil, a.tell(whole, m, "job-complete")
	case monitor.JobPending:
		if a.BeforePivot != nil {
			if err := a.BeforePivot(whole); err != nil {
				return err, a.tell(whole, m, "job-cancel")
			}
		}
		return nil, a.tell(whole, m, "job-finalize")
	}
	return nil, nil
}

func (a ActiveMerge) tell(ctx context.Context, m Monitor, command string) error {
	return m.Execute(ctx, command, map[string]any{"id": a.Job}, nil)
}

// awaitLook returns when it is worth looking at the job again.
func awaitLook(ctx context.Context, cancelled bool, sub *monitor.Subscription, tick <-chan time.Time) error {
	done := ctx.Done()
	if cancelled {
		done = nil
	}
	select {
	case _, ok := <-sub.C:
		if !ok {
			return monitor.ErrGone
		}
	case <-tick:
	case <-done:
	}
	return nil
}

// find returns the job.
func (a ActiveMerge) find(ctx context.Context, m Monitor) (monitor.Job, error) {
	var jobs []monitor.Job
	if err := m.Execute(ctx, "query-jobs", nil, &jobs); err != nil {
		return monitor.Job{}, err
	}
	at := slices.IndexFunc(jobs, func(j monitor.Job) bool { return j.ID == a.Job })
	if at < 0 {
		return monitor.Job{}, errNoJob
	}
	return jobs[at], nil
}

// merged reports whether a disk runs on the base.
func (a ActiveMerge) merged(ctx context.Context, m Monitor) (bool, error) {
	g, err := ReadGraph(ctx, m)
	if err != nil {
		return false, err
	}
	for _, d := range g.Drives() {
		if chain, err := g.Chain(d); err == nil && chain[0].Node.Name == a.Base {
			return true, nil
		}
	}
	return false, nil
}
