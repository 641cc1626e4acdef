package blockdev

import (
	"context"
	"errors"
	"fmt"
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

// runCreate runs blockdev-create and awaits its end. The job is dismissed in
// any case.
func runCreate(ctx context.Context, m Monitor, id string, options map[string]any) error {
	sub := m.Subscribe(8, "JOB_STATUS_CHANGE")
	defer sub.Close()
	if err := m.Execute(ctx, "blockdev-create", map[string]any{"job-id": id, "options": options}, nil); err != nil {
		return err
	}
	job, err := awaitConcluded(ctx, m, id, func() error {
		select {
		case _, ok := <-sub.C:
			if !ok {
				return errors.New("the monitor session ended")
			}
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	if err != nil {
		return fmt.Errorf("job %s: %w", id, err) // one that has not concluded cannot be dismissed
	}
	dismiss := m.Execute(context.WithoutCancel(ctx), "job-dismiss", map[string]any{"id": id}, nil)
	if job.Error != "" {
		return errors.Join(&JobError{Job: id, Desc: job.Error}, dismiss)
	}
	return dismiss
}

// awaitConcluded asks for the job after each change of any job, and once
// before the first.
func awaitConcluded(ctx context.Context, m Monitor, id string, change func() error) (jobInfo, error) {
	for {
		var jobs []jobInfo
		if err := m.Execute(ctx, "query-jobs", nil, &jobs); err != nil {
			return jobInfo{}, err
		}
		for _, j := range jobs {
			if j.ID == id && j.Status == "concluded" {
				return j, nil
			}
		}
		if err := change(); err != nil {
			return jobInfo{}, err
		}
	}
}
