package memdump

import (
	"context"
	"fmt"
	"time"

	"github.com/vmsnap/vmsnap/monitor"
)

// cutStopped saves with the CPUs stopped throughout. A VM that its owner has
// paused is saved as if in the background, if that leaves it as it was: then
// the rest is left to Wait.
func (s *Save) cutStopped(ctx context.Context, cut func(context.Context) error, progress func(Progress)) (Pause, error) {
	if s.tracked {
		return s.cutBackground(ctx, cut)
	}
	if ctx.Err() != nil {
		return Pause{}, context.Cause(ctx)
	}
	limit := s.limit(stoppedPause + time.Duration(s.ram/stoppedRate)*time.Second)
	p, err := s.beginPause(limit)
	if err != nil {
		return Pause{}, err
	}
	wait, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	// The cancelling of a command leaves unknown what it did; that of the
	// waiting does not.
	ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), limit)
	defer cancel()
	if err := s.stop(ctx, p); err != nil {
		return p.failed(ctx, err)
	}
	if err := cut(ctx); err != nil {
		return p.failed(ctx, fmt.Errorf("cut the disks: %w", err))
	}
	if err := s.start(ctx); err != nil {
		return p.failed(ctx, err)
	}
	return s.complete(ctx, wait, p, progress)
}

// complete waits until a save with the CPUs stopped has completed, and lets the
// guest run if it ran before. The waiting ends with wait.
//
// QEMU leaves the VM in "postmigrate", its images let go. A VM that its owner
// has paused stays in it, since nothing but running leads out of it; QEMU takes
// its images back, where it can (10.0).
func (s *Save) complete(ctx, wait context.Context, p *pause, progress func(Progress)) (Pause, error) {
	m, err := s.follow(wait, progress, nil)
	if err == nil {
		err = s.outcome(m)
	}
	if err == nil {
		err = s.awaitPostmigrate(ctx)
	}
	if err != nil {
		return p.failed(ctx, err)
	}
	early := p.resumed() > 0
	switch {
	case s.settings.Running || early: // or its owner meant it to run meanwhile
		err = s.session.Cont(ctx)
	case versionOf(s.session).AtLeast(10, 0):
		err = s.session.Execute(ctx, "blockdev-set-active", map[string]bool{"active": true}, nil)
	}
	if err != nil {
		return p.failed(ctx, err)
	}
	return p.ended(early)
}

// awaitPostmigrate returns when QEMU is done with a completed migration: it
// says "completed" a moment before, and refuses cont until then.
func (s *Save) awaitPostmigrate(ctx context.Context) error {
	return poll(ctx, func() (bool, error) {
		st, err := s.session.QueryStatus(ctx)
		return st.Status != monitor.RunStateFinishMigrate, err
	})
}
