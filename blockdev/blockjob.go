package blockdev

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/vmsnap/vmsnap/monitor"
)

var (
	// ErrNoJob means that QEMU has no job of that id: it was never started, or it
	// has ended and was dismissed.
	ErrNoJob = errors.New("there is no such job")

	// ErrJobUnfinished means that a job was not seen to end: QEMU did not answer,
	// or the caller left. It may go on, and is found again by its id.
	ErrJobUnfinished = errors.New("the job was not seen to end")

	// ErrLeaveJob as the cause of a context's cancellation leaves a job running
	// instead of cancelling it.
	ErrLeaveJob = errors.New("the job is left to go on")
)

// Job is how a merge runs in QEMU: as a block job.
type Job struct {
	ID    string // by which it is found again after a crash of either side
	Speed uint64 // bytes per second at its start; 0 is without a limit
	// Watch is told of each change of the job, at most 4 times a second while
	// only its progress changes. It is called by who waits, so it must not block.
	// It may be nil.
	Watch func(JobState)
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

// Stop is why QEMU made a job stop by itself. The job waits for ResumeJob.
type Stop string

// The reasons (BlockDeviceIoStatus in qapi/block-core.json).
const (
	NotStopped   Stop = ""
	StopNoSpace  Stop = "nospace" // make room, then ResumeJob
	StopIOFailed Stop = "failed"
)

// JobState is what QEMU says of a block job.
type JobState struct {
	ID      string
	Kind    string // "commit", active or not, or "stream"
	Status  monitor.JobStatus
	Stopped Stop
	Done    uint64 // bytes
	Total   uint64 // bytes; grows when the guest writes meanwhile
	Speed   uint64 // bytes per second; 0 is without a limit
	Error   string // why a concluded job failed, in QEMU's words
}

// blockJobInfo is an element of query-block-jobs (qapi/block-core.json,
// BlockJobInfo).
type blockJobInfo struct {
	Device   string            `json:"device"` // the job's id
	Type     string            `json:"type"`
	Status   monitor.JobStatus `json:"status"`
	IOStatus string            `json:"io-status"`
	Offset   uint64            `json:"offset"`
	Len      uint64            `json:"len"`
	Speed    uint64            `json:"speed"`
	Error    string            `json:"error"`
}

// FindJob asks QEMU for a block job. It fails with ErrNoJob when there is none.
func FindJob(ctx context.Context, m Monitor, id string) (JobState, error) {
	var jobs []blockJobInfo
	if err := m.Execute(ctx, "query-block-jobs", nil, &jobs); err != nil {
		return JobState{}, err
	}
	at := slices.IndexFunc(jobs, func(j blockJobInfo) bool { return j.Device == id })
	if at < 0 {
		return JobState{}, fmt.Errorf("job %s: %w", id, ErrNoJob)
	}
	j := jobs[at]
	s := JobState{ID: id, Kind: j.Type, Status: j.Status, Done: j.Offset, Total: j.Len, Speed: j.Speed, Error: j.Error}
	if j.IOStatus != "ok" {
		s.Stopped = Stop(j.IOStatus)
	}
	return s, nil
}

// SetJobSpeed limits a job to so many bytes per second; 0 lifts the limit.
func SetJobSpeed(ctx context.Context, m Monitor, id string, speed uint64) error {
	return m.Execute(ctx, "block-job-set-speed", map[string]any{"device": id, "speed": speed}, nil)
}

// PauseJob lets a job rest until ResumeJob. Guests are not affected.
func PauseJob(ctx context.Context, m Monitor, id string) error {
	return jobCommand(ctx, m, "job-pause", id)
}

// ResumeJob lets a job go on that was paused, or that QEMU stopped.
func ResumeJob(ctx context.Context, m Monitor, id string) error {
	return jobCommand(ctx, m, "job-resume", id)
}

func jobCommand(ctx context.Context, m Monitor, command, id string) error {
	return m.Execute(ctx, command, map[string]any{"id": id}, nil)
}

// start sends the command that starts the job. A command without an answer is
// reconciled by asking for the job.
func (j Job) start(ctx context.Context, m Monitor, command string, args map[string]any) error {
	args["job-id"] = j.ID
	args["auto-finalize"] = false
	args["on-error"] = "enospc" // stop for want of space, fail for all else
	if j.Speed > 0 {
		args["speed"] = j.Speed
	}
	ctx = context.WithoutCancel(ctx) // the answer decides whether there is a job
	err := m.Execute(ctx, command, args, nil)
	if !errors.Is(err, monitor.ErrOutcomeUnknown) {
		return err
	}
	switch _, look := FindJob(ctx, m, j.ID); {
	case look == nil:
		return nil
	case errors.Is(look, ErrNoJob):
		return err
	default:
		return errors.Join(fmt.Errorf("job %s: %w: %w", j.ID, ErrJobUnfinished, err), look)
	}
}

// await waits until the job has one of the states, or has concluded. It fails
// with the context's cause, with ErrNoJob when the job is gone, whose last words
// are in the state then, or with ErrJobUnfinished when QEMU does not tell any more.
func (j Job) await(ctx context.Context, m Monitor, states ...monitor.JobStatus) (JobState, error) {
	states = append(states, monitor.JobConcluded)
	sub := m.Subscribe(16, "JOB_STATUS_CHANGE", "BLOCK_JOB_ERROR", "BLOCK_JOB_COMPLETED")
	defer sub.Close()
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	last, words := JobState{}, ""
	for events := sub.C; ; {
		s, err := FindJob(ctx, m, j.ID)
		switch {
		case ctx.Err() != nil:
			return last, context.Cause(ctx)
		case errors.Is(err, ErrNoJob):
			s = last
			s.ID, s.Status, s.Error = j.ID, monitor.JobNull, j.lastWords(sub.C, words)
		case err != nil:
			return last, fmt.Errorf("job %s: %w: %w", j.ID, ErrJobUnfinished, err)
		}
		if s != last && j.Watch != nil {
			j.Watch(s)
		}
		last = s
		if err != nil || slices.Contains(states, s.Status) {
			return s, err
		}
		select {
		case e, ok := <-events:
			if !ok {
				events = nil // the next question says why the session ended
			}
			words = j.words(e, words)
		case <-tick.C:
		case <-ctx.Done():
			return last, context.Cause(ctx)
		}
	}
}

// words returns why the job failed, if the event says so, else what was known.
func (j Job) words(e monitor.Event, known string) string {
	var data struct {
		Device string `json:"device"`
		Error  string `json:"error"`
	}
	if e.Name != "BLOCK_JOB_COMPLETED" || e.Decode(&data) != nil || data.Device != j.ID {
		return known
	}
	return data.Error
}

// lastWords reads the events that came before the answer that the job is gone.
func (j Job) lastWords(events <-chan monitor.Event, known string) string {
	for {
		select {
		case e, ok := <-events:
			if !ok {
				return known
			}
			known = j.words(e, known)
		default:
			return known
		}
	}
}

// finalize lets a pending job change the graph, and waits for its end.
func (j Job) finalize(ctx context.Context, m Monitor) (JobState, error) {
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), finalizeTimeout)
	defer stop()
	// A refusal means that somebody else has ended it; how is seen next.
	if err := jobCommand(ctx, m, "job-finalize", j.ID); err != nil && !refused(err) {
		return JobState{}, fmt.Errorf("job %s: %w: %w", j.ID, ErrJobUnfinished, err)
	}
	s, err := j.await(ctx, m)
	if ctx.Err() != nil {
		err = fmt.Errorf("job %s: %w: it did not end within %v of its finalization", j.ID, ErrJobUnfinished, finalizeTimeout)
	}
	return s, err
}

// cancel ends a job without its effect and waits for its end. A job that was
// faster concludes without an error.
func (j Job) cancel(ctx context.Context, m Monitor) (JobState, error) {
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), cancelTimeout)
	defer stop()
	// A refusal means that the job has ended, or nearly so.
	if err := jobCommand(ctx, m, "job-cancel", j.ID); err != nil && !refused(err) {
		return JobState{}, fmt.Errorf("job %s: %w: %w", j.ID, ErrJobUnfinished, err)
	}
	s, err := j.await(ctx, m)
	if ctx.Err() != nil {
		err = fmt.Errorf("job %s: %w: it was cancelled and did not end within %v", j.ID, ErrJobUnfinished, cancelTimeout)
	}
	return s, err
}

// settle brings a job to its end that was waited for with the result (s, err),
// by cancelling it unless it has ended or is to be left. conclude then asks the
// graph whether the merge has happened, whatever the job says of itself.
func (j Job) settle(ctx context.Context, m Monitor, s JobState, err error, conclude func(context.Context) (merged bool, err error)) error {
	var cause error
	switch {
	case err == nil, errors.Is(err, ErrNoJob):
		if cause = s.failure(); cause == nil {
			cause = fmt.Errorf("job %s ended without an effect", j.ID)
		}
	case errors.Is(err, ErrJobUnfinished):
		return err
	case errors.Is(err, ErrLeaveJob):
		return fmt.Errorf("job %s: %w: %w", j.ID, ErrJobUnfinished, err)
	default:
		cause = err
		if _, err := j.cancel(ctx, m); err != nil && !errors.Is(err, ErrNoJob) {
			return errors.Join(cause, err)
		}
	}
	merged, err := conclude(context.WithoutCancel(ctx))
	if merged || errors.Is(err, ErrJobUnfinished) {
		return err
	}
	return errors.Join(fmt.Errorf("%w: %w", ErrNotMerged, cause), err)
}

// dismiss makes QEMU forget a concluded job.
func (j Job) dismiss(ctx context.Context, m Monitor) error {
	err := jobCommand(context.WithoutCancel(ctx), m, "job-dismiss", j.ID)
	if refused(err) {
		if _, look := FindJob(context.WithoutCancel(ctx), m, j.ID); errors.Is(look, ErrNoJob) {
			return nil
		}
	}
	return err
}

// refused reports whether QEMU answered that it did not carry out a command.
func refused(err error) bool {
	_, ok := errors.AsType[*monitor.CommandError](err)
	return ok
}

// failure is the error of a concluded job, or nil.
func (s JobState) failure() error {
	if s.Error == "" {
		return nil
	}
	return &JobError{Job: s.ID, Desc: s.Error}
}
