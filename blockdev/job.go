package blockdev

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"

	"github.com/vmsnap/vmsnap/monitor"
)

// jobInfo is an element of query-jobs (qapi/job.json, JobInfo).
type jobInfo struct {
	ID     string `json:"id"`
	Status string `json:"status"`
	Error  string `json:"error"`
}

// JobError is a QEMU job that ended with an error.
type JobError struct {
	Job  string
	Desc string // QEMU's own words
}

func (e *JobError) Error() string { return fmt.Sprintf("job %s: %s", e.Job, e.Desc) }

// Unwrap returns ENOSPC, EIO or ECANCELED for what QEMU ends with strerror() of
// it: its errors have no code of their own.
func (e *JobError) Unwrap() error {
	for _, errno := range []syscall.Errno{syscall.ENOSPC, syscall.EIO, syscall.ECANCELED} {
		if strings.HasSuffix(strings.ToLower(e.Desc), errno.Error()) {
			return errno
		}
	}
	return nil
}

// runCreate runs blockdev-create and awaits its end. The job is dismissed in
// any case.
func runCreate(ctx context.Context, m Monitor, id string, options map[string]any) error {
	sub := m.Subscribe(8, "JOB_STATUS_CHANGE")
	defer sub.Close()
	if err := m.Execute(ctx, "blockdev-create", map[string]any{"job-id": id, "options": options}, nil); err != nil {
		return err
	}
	job, err := awaitConcluded(ctx, m, id, changeOf(ctx, sub))
	if err != nil {
		return fmt.Errorf("job %s: %w", id, err) // Remove ends it
	}
	dismiss := m.Execute(context.WithoutCancel(ctx), "job-dismiss", map[string]any{"id": id}, nil)
	if job.Error != "" {
		return errors.Join(&JobError{Job: id, Desc: job.Error}, dismiss)
	}
	return dismiss
}

// endJob awaits the end of a job, if there is one, and dismisses it.
func endJob(ctx context.Context, m Monitor, id string) error {
	ctx, cancel := context.WithTimeout(ctx, endJobTimeout)
	defer cancel()
	sub := m.Subscribe(8, "JOB_STATUS_CHANGE")
	defer sub.Close()
	_, err := awaitConcluded(ctx, m, id, changeOf(ctx, sub))
	if errors.Is(err, ErrNoJob) {
		return nil
	}
	if err == nil {
		err = m.Execute(ctx, "job-dismiss", map[string]any{"id": id}, nil)
	}
	if err != nil {
		return fmt.Errorf("end job %s: %w", id, err)
	}
	return nil
}

// changeOf returns what awaits the next change of a job.
func changeOf(ctx context.Context, sub *monitor.Subscription) func() error {
	return func() error {
		select {
		case _, ok := <-sub.C:
			if !ok {
				return errors.New("the monitor session ended")
			}
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// awaitConcluded asks for the job after each change of any job, and once
// before the first.
func awaitConcluded(ctx context.Context, m Monitor, id string, change func() error) (jobInfo, error) {
	for {
		var jobs []jobInfo
		if err := m.Execute(ctx, "query-jobs", nil, &jobs); err != nil {
			return jobInfo{}, err
		}
		at := slices.IndexFunc(jobs, func(j jobInfo) bool { return j.ID == id })
		if at < 0 {
			return jobInfo{}, ErrNoJob
		}
		if jobs[at].Status == "concluded" {
			return jobs[at], nil
		}
		if err := change(); err != nil {
			return jobInfo{}, err
		}
	}
}
