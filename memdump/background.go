package memdump

import (
	"context"
	"fmt"

	"github.com/vmsnap/vmsnap/monitor"
)

// cutBackground saves by write tracking. QEMU starts it like this: it reads all
// memory once, says "active", stops the CPUs, saves the devices, protects the
// memory from writes, schedules what lets the CPUs run again if they ran, and
// only then counts pages. So pages that are counted, and nothing before, mean
// that writes are tracked.
//
// Up to 8.2 QEMU lets the CPUs run itself, whether they ran before or not; from
// 9.0 on it leaves them as they were.
func (s *Save) cutBackground(ctx context.Context, cut func(context.Context) error) (Pause, error) {
	if ctx.Err() != nil {
		return Pause{}, context.Cause(ctx)
	}
	p, err := s.beginPause(s.limit(backgroundPause))
	if err != nil {
		return Pause{}, err
	}
	// Whoever waits for this may go; the guest may not be left paused for it.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.limit(backgroundPause))
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
	if err := s.awaitTracking(ctx); err != nil {
		return p.failed(ctx, err)
	}
	return s.releaseTracked(ctx, p)
}

// awaitTracking returns when QEMU tracks writes.
func (s *Save) awaitTracking(ctx context.Context) error {
	return poll(ctx, func() (bool, error) {
		m, err := s.session.QueryMigrate(ctx)
		switch {
		case err != nil:
			return false, err
		case m.Status == monitor.MigrationFailed || m.Status == monitor.MigrationCancelled:
			s.ended = true
			return false, s.outcome(m)
		}
		return m.RAM.Normal+m.RAM.Duplicate > 0, nil
	})
}

// releaseTracked ends the pause once writes are tracked.
func (s *Save) releaseTracked(ctx context.Context, p *pause) (Pause, error) {
	// What QEMU scheduled before it counted pages runs in its main loop, not
	// necessarily before the reply that told of them, but before the next one.
	// Resumed before that, the VM would be stopped again, or its state be lost.
	if _, err := s.session.QueryMigrate(ctx); err != nil {
		return p.failed(ctx, err)
	}
	if !s.settings.Running {
		return p.ended(p.resumed() > 0)
	}
	st, err := s.session.QueryStatus(ctx)
	if err != nil {
		return p.failed(ctx, err)
	}
	early := st.Running || p.resumed() > 0
	if !versionOf(s.session).AtLeast(9, 0) {
		early = p.resumed() > 1 // one is QEMU's own
	}
	if !st.Running {
		if err := s.session.Cont(ctx); err != nil {
			return p.failed(ctx, err)
		}
	}
	return p.ended(early)
}
