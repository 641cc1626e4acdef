package memdump

import (
	"context"
	"fmt"
	"time"

	"github.com/vmsnap/vmsnap/monitor"
)

// pause is a pause of the guest, from before it begins until the guest runs.
type pause struct {
	save    *Save
	guarded bool
	runs    *monitor.Subscription // STOP and RESUME
	began   time.Time
	resumes []time.Time // by QEMU's clock, which is this host's
}

// runEvents holds more events than come in a pause.
const runEvents = 64

// beginPause is what has to be ready before the guest is paused: the guard,
// which a VM that its owner has paused does not get.
func (s *Save) beginPause(limit time.Duration) (*pause, error) {
	p := &pause{save: s, runs: s.session.Subscribe(runEvents, "STOP", "RESUME")}
	if s.guard != nil && s.settings.Running {
		if err := s.guard.Arm(limit + guardGrace); err != nil {
			p.runs.Close()
			return nil, err
		}
		p.guarded = true
	}
	p.began = time.Now()
	return p, nil
}

// limit is how long a pause may last: the caller's limit, or the given one.
func (s *Save) limit(own time.Duration) time.Duration {
	if s.pauseLimit > 0 {
		return s.pauseLimit
	}
	return own
}

// stop pauses the guest, if it runs.
func (s *Save) stop(ctx context.Context, p *pause) error {
	if !s.settings.Running {
		return nil
	}
	p.began = time.Now()
	return s.session.Stop(ctx)
}

// stopped notes when QEMU itself paused the guest.
func (p *pause) stopped() {
	p.began = time.Now()
	for {
		select {
		case e, ok := <-p.runs.C:
			if !ok {
				return
			}
			if e.Name == "STOP" && !e.Timestamp.IsZero() {
				p.began = e.Timestamp
			}
		default:
			return
		}
	}
}

// resumed returns how often the VM has been resumed so far.
func (p *pause) resumed() int {
	for {
		select {
		case e, ok := <-p.runs.C:
			if !ok {
				return len(p.resumes)
			}
			if e.Name == "RESUME" {
				p.resumes = append(p.resumes, e.Timestamp)
			}
		default:
			return len(p.resumes)
		}
	}
}

// ended is the end of a pause after which QEMU has said that the guest runs, if
// it did before. early means that it ran too soon.
func (p *pause) ended(early bool) (Pause, error) {
	defer p.runs.Close()
	result := Pause{Began: p.began, Length: p.length(time.Now())}
	if !p.save.settings.Running {
		result.Length = 0 // it was none of ours
	}
	var err error
	if p.guarded {
		if result.ByGuard, err = p.save.guard.Disarm(); err != nil {
			return result, err
		}
	}
	if early || result.ByGuard {
		return result, ErrResumed
	}
	return result, nil
}

// length is how long the pause lasted. Where QEMU resumes the guest by itself
// its event tells when, before this process can know.
func (p *pause) length(now time.Time) time.Duration {
	length := now.Sub(p.began)
	if p.resumed() > 0 {
		if at := p.resumes[len(p.resumes)-1].Sub(p.began); at > 0 && at < length {
			return at
		}
	}
	return length
}

// failed is the end of a pause that something went wrong in. It lets the guest
// run. A guard is disarmed only if that succeeds.
func (p *pause) failed(ctx context.Context, cause error) (Pause, error) {
	s := p.save
	defer p.runs.Close()
	result := Pause{Began: p.began}
	if s.settings.Running {
		if err := s.resume(ctx); err != nil {
			result.Length = time.Since(p.began)
			if p.guarded && s.session.Err() != nil {
				// It acts when it takes the session away, and when the session
				// ends.
				result.ByGuard = true
				return result, fmt.Errorf("%w: %w", ErrResumed, cause)
			}
			return result, fmt.Errorf("%w: %w", cause, err)
		}
		if !s.tracked {
			s.ended = true // Resume has cancelled it
		}
		result.Length = p.length(time.Now())
	}
	if !p.guarded {
		return result, cause
	}
	acted, err := s.guard.Disarm()
	switch {
	case err != nil:
		return result, fmt.Errorf("%w: %w", cause, err)
	case acted:
		result.ByGuard = true
		return result, fmt.Errorf("%w: %w", ErrResumed, cause)
	}
	return result, cause
}

// poll looks until it sees what it waits for, with the guest paused: at first
// without a rest, since most waits are short.
func poll(ctx context.Context, look func() (bool, error)) error {
	for n := 0; ; n++ {
		if seen, err := look(); seen || err != nil {
			return err
		}
		if n < pausePollSpins {
			continue
		}
		select {
		case <-time.After(pausePoll): // QEMU announces none of what is awaited
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
