package memdump

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/monitor"
)

// Why a guest is not rescued.
var (
	// ErrNotStuck: no save that has ended holds the guest. The error says what
	// there is instead.
	ErrNotStuck = errors.New("the guest is not held by a save that has ended")

	// ErrUndecided: QEMU does not tell whether a save goes on, and what its
	// threads do does not either. Its monitor may be another client's: ask
	// there.
	ErrUndecided = errors.New("it cannot be told whether a save goes on")
)

// Flags of a mapping whose faults userfaultfd handles.
const (
	flagTracked = "uw" // of writes: a background save
	flagMissing = "um" // of pages that are not there: an incoming postcopy
)

// A Suspect is a QEMU whose guest may be stuck.
type Suspect struct {
	PID       int
	StartTime uint64 // clock ticks since boot (proc(5), stat field 22)
	// Migration asks this QEMU about its latest migration. An error means that
	// QEMU does not tell: a main loop that has run into the protection answers
	// nothing, and a monitor may be held by another client.
	Migration func(context.Context) (monitor.Migration, error)
}

// StuckResult is what was seen of a suspect.
type StuckResult struct {
	Stuck     bool
	Reason    string // for an operator: why it is stuck, or why not
	Protected uint64 // bytes of its memory whose writes are tracked
	Blocked   int    // threads that wait to be let write, when last looked at
	Silent    bool   // QEMU did not answer
}

// Stuck tells whether a background save that has ended still holds the guest:
// its memory is protected from writes, and nobody is there any more to lift
// that. Before QEMU 8.1 every such save that fails or is cancelled leaves the
// guest like this, for good. Nothing is changed.
//
// What tells is a userfaultfd, tracked memory, and no migration under way, at
// two looks. If QEMU does not answer, a thread has to wait for leave to write
// all the time, and none may be in what could be the writing of a save; else
// the error is ErrUndecided. It needs CAP_SYS_PTRACE for a QEMU of another
// user.
func Stuck(ctx context.Context, s Suspect) (StuckResult, error) {
	pidfd, err := openProcess(s.PID, s.StartTime)
	if err != nil {
		return StuckResult{}, fmt.Errorf("examine process %d: %w", s.PID, err)
	}
	r, err := s.examine(ctx, pidfd)
	if err = errors.Join(err, unix.Close(pidfd)); err != nil {
		return r, fmt.Errorf("examine process %d: %w", s.PID, err)
	}
	return r, nil
}

// Rescue lets a stuck guest go on, as soon as it returns. QEMU is as good as
// before then: another save can be made. A VM that is paused stays paused.
//
// It fails with ErrNotStuck unless Stuck says otherwise, and with ErrUndecided,
// and leaves the VM alone then. A save that another client begins in the very
// moment fails, and the guest runs on.
func Rescue(ctx context.Context, s Suspect) (StuckResult, error) {
	pidfd, err := openProcess(s.PID, s.StartTime)
	if err != nil {
		return StuckResult{}, fmt.Errorf("rescue process %d: %w", s.PID, err)
	}
	r, err := s.examine(ctx, pidfd)
	if err == nil && !r.Stuck {
		err = fmt.Errorf("%w: %s", ErrNotStuck, r.Reason)
	}
	if err == nil {
		err = liftProtection(pidfd, s.PID)
	}
	if err = errors.Join(err, unix.Close(pidfd)); err != nil {
		return r, fmt.Errorf("rescue process %d: %w", s.PID, err)
	}
	return r, nil
}

// examine judges the process that pidfd is of.
func (s Suspect) examine(ctx context.Context, pidfd int) (StuckResult, error) {
	r, err := s.judge(ctx)
	if err == nil {
		err = stillRuns(pidfd)
	}
	if err != nil {
		r.Stuck = false
	}
	return r, err
}

// judge looks and asks, twice.
func (s Suspect) judge(ctx context.Context) (StuckResult, error) {
	for second := false; ; second = true {
		r, err := s.look()
		if err != nil || r.Reason != "" {
			return r, err
		}
		m, err := s.ask(ctx)
		if ctx.Err() != nil {
			return r, context.Cause(ctx)
		}
		if err != nil {
			return s.watchSilent(ctx, err)
		}
		if underWay(m.Status) {
			r.Reason = fmt.Sprintf("a migration is under way (%s)", m.Status)
			return r, nil
		}
		if second {
			r.Stuck = true
			r.Reason = fmt.Sprintf("the latest migration is %q, and the memory is still protected from writes", m.Status)
			return r, nil
		}
		if err := waitFor(ctx, stuckSettle); err != nil {
			return r, err
		}
	}
}

// ask asks QEMU about its migration.
func (s Suspect) ask(ctx context.Context) (monitor.Migration, error) {
	ctx, cancel := context.WithTimeout(ctx, stuckAsk)
	defer cancel()
	return s.Migration(ctx)
}

// look looks at the process once. A reason means that it is not stuck.
func (s Suspect) look() (StuckResult, error) {
	var r StuckResult
	descriptors, err := userfaultfds(s.PID)
	if err != nil {
		return r, ended(err)
	}
	all, err := mappings(s.PID)
	if err != nil {
		return r, ended(err)
	}
	blocked, err := threads(s.PID)
	if err != nil {
		return r, ended(err)
	}
	for _, t := range blocked {
		if t.faulting {
			r.Blocked++
		}
	}
	r.Protected = protectedBytes(all)
	for _, m := range all {
		if m.has(flagMissing) {
			r.Reason = "memory is arriving by postcopy"
		}
	}
	if r.Protected == 0 || len(descriptors) == 0 {
		r.Reason = "its memory is not protected from writes"
	}
	return r, nil
}

func protectedBytes(all []mapping) uint64 {
	var sum uint64
	for _, m := range all {
		if m.has(flagTracked) {
			sum += m.size()
		}
	}
	return sum
}

// watchSilent judges a QEMU that does not answer, by what its threads do for a
// while.
func (s Suspect) watchSilent(ctx context.Context, silence error) (StuckResult, error) {
	undecided := func(why string) error {
		return fmt.Errorf("%w: %s, and QEMU does not tell: %w", ErrUndecided, why, silence)
	}
	waiting := map[int]string{} // threads that have waited from the first look on
	r := StuckResult{Silent: true}
	for end, first := time.Now().Add(stuckSilent), true; first || time.Now().Before(end); first = false {
		if !first {
			if err := waitFor(ctx, stuckEvery); err != nil {
				return r, err
			}
		}
		all, err := threads(s.PID)
		if err != nil {
			return r, ended(err)
		}
		for _, t := range all {
			if t.halted() {
				return r, undecided("the process was stopped")
			}
			if t.mayBeSaving() {
				return r, undecided(fmt.Sprintf("thread %d may be writing", t.tid))
			}
		}
		waiting = stillWaiting(waiting, all, first)
		if len(waiting) == 0 {
			return r, undecided("no thread waits all the time to be let write")
		}
	}
	now, err := s.look()
	now.Silent = true
	if err != nil || now.Reason != "" {
		return now, err
	}
	now.Stuck = true
	now.Reason = "QEMU does not answer, threads of it wait to be let write, and no save lets them"
	return now, nil
}

// stillWaiting returns those threads, and how often they have waited for
// something before, that have done nothing but wait for userfaultfd since the
// first look.
func stillWaiting(before map[int]string, all []thread, first bool) map[int]string {
	now := map[int]string{}
	for _, t := range all {
		if t.faulting && (first || before[t.tid] == t.switches) {
			now[t.tid] = t.switches
		}
	}
	return now
}

// stillRuns fails if the process has ended: then its number may have become
// another's, and so may what was seen.
func stillRuns(pidfd int) error {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	if err != nil {
		return fmt.Errorf("watch the process: %w", err)
	}
	if n > 0 {
		return ErrQEMUEnded
	}
	return nil
}

func waitFor(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
