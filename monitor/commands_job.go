package monitor

import "context"

// A JobStatus is a state of a job (JobStatus in qapi/job.json).
type JobStatus string

// The states of a job, in the order in which it can pass through them.
const (
	JobUndefined JobStatus = "undefined"
	JobCreated   JobStatus = "created"
	JobRunning   JobStatus = "running"
	JobPaused    JobStatus = "paused"
	JobReady     JobStatus = "ready"   // awaits job-complete
	JobStandby   JobStatus = "standby" // paused while ready
	JobWaiting   JobStatus = "waiting" // for the other jobs of its transaction
	JobPending   JobStatus = "pending" // awaits job-finalize
	JobAborting  JobStatus = "aborting"
	JobConcluded JobStatus = "concluded" // awaits job-dismiss; Error tells how it went
	JobNull      JobStatus = "null"      // dismissed
)

// A Job is one background job (JobInfo in qapi/job.json).
type Job struct {
	ID     string    `json:"id"`
	Type   string    `json:"type"` // create, commit, stream, mirror, backup, …
	Status JobStatus `json:"status"`
	// CurrentProgress of TotalProgress is done, in units of the job's own (bytes
	// for block jobs). The total may grow.
	CurrentProgress int64  `json:"current-progress"`
	TotalProgress   int64  `json:"total-progress"`
	Error           string `json:"error"` // why a concluded job failed; empty if it did not
}

// QueryJobs returns all jobs that are not dismissed.
func (s *Session) QueryJobs(ctx context.Context) ([]Job, error) {
	var r []Job
	err := s.Execute(ctx, "query-jobs", nil, &r)
	return r, err
}
