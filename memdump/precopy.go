package memdump

import (
	"context"
	"fmt"
	"time"

	"github.com/vmsnap/vmsnap/monitor"
)

// firstDowntime is how long the last pass of precopy may take at first. It is
// raised when the guest changes its memory too fast for that. The guest is
// never slowed down (auto-converge): a snapshot must not be felt for minutes.
const firstDowntime = 30 * time.Millisecond

// cutPrecopy saves by live migration: pass after pass over what the guest has
// changed, until the rest can be saved within the downtime limit. Then QEMU
// stops the CPUs and waits; the disks are cut; it saves the rest.
func (s *Save) cutPrecopy(ctx context.Context, cut func(context.Context) error, progress func(Progress)) (Pause, error) {
	p, err := s.beginPause(beforePause)
	if err != nil {
		return Pause{}, err
	}
	c := convergence{maxPause: s.maxPause, limit: firstDowntime}
	if s.maxPause > 0 && s.maxPause < firstDowntime {
		c.limit = s.maxPause
		err = setDowntime(ctx, s.session, c.limit)
	}
	if err == nil {
		err = s.start(ctx)
	}
	if err == nil {
		err = s.converge(ctx, &c, progress)
	}
	if err != nil {
		result, err := p.failed(ctx, err)
		return Pause{ByGuard: result.ByGuard}, err
	}
	return s.switchOver(ctx, p, cut)
}

// converge returns when QEMU has stopped the CPUs for the last pass.
func (s *Save) converge(ctx context.Context, c *convergence, progress func(Progress)) error {
	m, err := s.follow(ctx, progress, func(m monitor.Migration) (bool, error) {
		if m.Status == monitor.MigrationPreSwitch {
			return true, nil
		}
		limit, err := c.look(m)
		if err == nil && limit > 0 {
			err = setDowntime(ctx, s.session, limit)
		}
		return false, err
	})
	if err != nil || m.Status == monitor.MigrationPreSwitch {
		return err
	}
	if err := s.outcome(m); err != nil {
		return err
	}
	return &FailedError{Desc: "it completed without waiting for the cut"}
}

// switchOver cuts the disks and saves the rest, with the CPUs stopped.
func (s *Save) switchOver(ctx context.Context, p *pause, cut func(context.Context) error) (Pause, error) {
	p.stopped()
	limit := s.limit(precopyPause)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
	defer cancel()
	if p.guarded {
		if err := s.guard.Arm(limit + guardGrace); err != nil {
			return p.failed(ctx, err)
		}
	}
	if err := cut(ctx); err != nil {
		return p.failed(ctx, fmt.Errorf("cut the disks: %w", err))
	}
	args := map[string]string{"state": string(monitor.MigrationPreSwitch)}
	if err := s.session.Execute(ctx, "migrate-continue", args, nil); err != nil {
		return p.failed(ctx, err)
	}
	return s.complete(ctx, ctx, p, nil)
}

// convergence decides how long the last pass may take.
type convergence struct {
	maxPause time.Duration // 0 for no limit
	limit    time.Duration // that QEMU has been told

	pass  int64 // the last one seen
	left  int64 // bytes to save when it began
	tries int   // passes that had the longest pause allowed
}

// maxTries is how many passes may fail to end within the longest pause that is
// allowed, before the guest is taken for one that never lets them.
const maxTries = 5

// look returns a new limit, 0 for none, when another pass has begun. A pass
// that finds three quarters or more of what the one before found will not lead
// to the end: then the limit becomes what the rest needs.
func (c *convergence) look(m monitor.Migration) (time.Duration, error) {
	pass, left := m.RAM.DirtySyncCount, m.RAM.Remaining
	if pass <= c.pass {
		return 0, nil
	}
	before := c.left
	c.pass, c.left = pass, left
	if pass < 3 || left < before/4*3 {
		return 0, nil
	}
	need := max(needed(m)*5/4, 2*c.limit)
	if c.maxPause > 0 && need > c.maxPause {
		need = c.maxPause
		if c.tries++; c.tries > maxTries {
			return 0, fmt.Errorf("%w: at %d MB/s the last pass would take %s, %s are allowed",
				ErrNotConverging, int64(m.RAM.Mbps/8), needed(m).Round(time.Millisecond), c.maxPause)
		}
	}
	if need <= c.limit {
		return 0, nil
	}
	c.limit = need
	return need, nil
}

// needed is how long the last pass would take now.
func needed(m monitor.Migration) time.Duration {
	estimate := time.Duration(m.ExpectedDowntime) * time.Millisecond
	if bytesPerSecond := m.RAM.Mbps * 1e6 / 8; bytesPerSecond > 0 {
		own := time.Duration(float64(m.RAM.Remaining) / bytesPerSecond * float64(time.Second))
		estimate = max(estimate, own)
	}
	return estimate
}
