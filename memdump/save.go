package memdump

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/vmsnap/vmsnap/monitor"
)

// A Guard resumes the VM when this process cannot. PauseGuard is one.
//
// Precopy arms it before the guest is paused, which QEMU does at a moment of
// its own: a guard that acts must first cancel a migration that is not a
// background save.
type Guard interface {
	// Arm has the guard resume the VM when this process dies or stops, or when
	// the limit is over, until Disarm. Armed again it takes the new limit.
	Arm(limit time.Duration) error
	// Disarm ends that, once the VM runs. It tells whether the guard has acted.
	Disarm() (acted bool, err error)
}

// Config is what a save needs.
type Config struct {
	Session  *monitor.Session
	Strategy Strategy // of Choose
	Facts    Facts    // of Probe, not long ago
	ID       string   // of the operation; names the descriptor in QEMU
	Target   *os.File // positioned where the stream shall begin; QEMU gets a duplicate
	PID      int      // of QEMU; 0 if unknown

	// Guard is armed while the VM is paused; nil for none. A VM that its owner
	// has paused is not guarded.
	Guard Guard
	// Note makes the settings durable; nil for none. Prepare calls it before it
	// changes any, so that they can be put back whatever happens.
	Note func(Settings) error

	// MaxPause is how long the guest may stand still by QEMU's own estimate
	// before the last pass of precopy; ErrNotConverging rather than longer. 0
	// is no limit. The other strategies have no choice.
	MaxPause time.Duration
	// PauseLimit ends a pause that something has gone wrong with; 0 for the
	// strategy's own.
	PauseLimit time.Duration
}

// Pause is how long the guest stood still, by the host's clock.
type Pause struct {
	Began   time.Time
	Length  time.Duration
	ByGuard bool // ended by the guard
}

// A Save is a save of one VM's memory, made by Prepare or Adopt.
type Save struct {
	session  *monitor.Session
	strategy Strategy
	settings Settings
	status   monitor.RunState // of the VM, which must not have changed
	tracked  bool             // by write tracking: nothing pauses the guest once it runs

	guard      Guard
	maxPause   time.Duration
	pauseLimit time.Duration
	ram        uint64 // bytes

	begun bool // migrate was sent
	ended bool // and has ended, in QEMU's words
}

// Prepare notes the owner's migration settings, changes them as the strategy
// needs, and hands QEMU the target. The guest feels nothing. When it fails,
// everything is as before.
//
// It fails with an *UnsuitableError when QEMU refuses what Probe had nothing
// against; choose again with the reason as Facts.Tracking. ErrUnsafeTarget
// means that a background save into this file could harm the guest.
func Prepare(ctx context.Context, c Config) (*Save, error) {
	s := &Save{
		session: c.Session, strategy: c.Strategy, status: c.Facts.Status,
		tracked: c.Strategy == Background || c.Strategy == Stopped && !c.Facts.Running && staysPaused(c.Facts),
		guard:   c.Guard, maxPause: c.MaxPause, pauseLimit: c.PauseLimit, ram: c.Facts.RAM,
	}
	if err := s.prepare(ctx, c); err != nil {
		return nil, fmt.Errorf("prepare to save memory: %w", err)
	}
	return s, nil
}

func (s *Save) prepare(ctx context.Context, c Config) error {
	if err := s.checkReady(ctx); err != nil {
		return err
	}
	if s.tracked {
		if err := checkTarget(ctx, c); err != nil {
			return err
		}
	}
	todo, old, err := plan(ctx, c.Session, c.Strategy, s.tracked)
	if err != nil {
		return err
	}
	old.FD, old.Running = "vmsnap-"+c.ID, c.Facts.Running
	s.settings = old
	if c.Note != nil {
		if err := c.Note(old); err != nil {
			return fmt.Errorf("note the settings: %w", err)
		}
	}
	err = todo.apply(ctx, c.Session)
	var refused *monitor.CommandError
	if errors.As(err, &refused) && s.tracked && refused.Command == "migrate-set-capabilities" {
		err = &UnsuitableError{Strategy: c.Strategy, Reason: refused.Desc, Err: err}
	}
	if err == nil {
		args := map[string]string{"fdname": old.FD}
		err = c.Session.ExecuteWithFile(ctx, "getfd", args, nil, c.Target)
	}
	if err != nil {
		return errors.Join(err, old.Restore(context.WithoutCancel(ctx), c.Session))
	}
	return nil
}

// checkReady fails unless the VM is in the state that the strategy was chosen
// for, and nothing migrates it.
func (s *Save) checkReady(ctx context.Context) error {
	st, err := s.session.QueryStatus(ctx)
	if err != nil {
		return err
	}
	if st.Status != s.status {
		reason := fmt.Sprintf("the VM was %s when it was chosen, and is %s", s.status, st.Status)
		return &UnsuitableError{Strategy: s.strategy, Reason: reason}
	}
	m, err := s.session.QueryMigrate(ctx)
	if err != nil {
		return err
	}
	if underWay(m.Status) {
		return fmt.Errorf("%w (%s)", ErrBusy, m.Status)
	}
	return nil
}

// Settings returns what the save has changed, as it was.
func (s *Save) Settings() Settings { return s.settings }

// Cut pauses the guest, calls cut, which cuts the disks, and lets the guest run
// again as soon as its memory of that instant is safe from change. With
// Precopy and Stopped that is when all is saved; before the pause of Precopy
// the context can end it. A VM that its owner has paused stays paused.
//
// When it fails the guest runs again, unless the error wraps ErrStillPaused,
// and cut may or may not have been called; what has begun is to be ended with
// Cancel. ErrResumed means that the save goes on and is worth nothing.
//
// cut must do what is needed and nothing else: the guest waits for it. So does it
// for QEMU's stop, which flushes every image: what the host has not written of
// them yet is better synced before. The context of cut ends with the pause's
// limit. progress is called by this goroutine,
// and not in a pause except that of Stopped; it may be nil.
func (s *Save) Cut(ctx context.Context, cut func(context.Context) error, progress func(Progress)) (Pause, error) {
	if s.begun {
		return Pause{}, errors.New("save memory: it was begun before")
	}
	if err := s.checkReady(ctx); err != nil {
		return Pause{}, fmt.Errorf("save memory: %w", err)
	}
	var p Pause
	var err error
	switch s.strategy {
	case Background:
		p, err = s.cutBackground(ctx, cut)
	case Precopy:
		p, err = s.cutPrecopy(ctx, cut, progress)
	default:
		p, err = s.cutStopped(ctx, cut, progress)
	}
	if err != nil {
		err = fmt.Errorf("save memory (%s): %w", s.strategy, err)
	}
	return p, err
}

// start begins the migration.
func (s *Save) start(ctx context.Context) error {
	err := s.session.Execute(ctx, "migrate", map[string]string{"uri": "fd:" + s.settings.FD}, nil)
	s.begun = err == nil || errors.Is(err, monitor.ErrOutcomeUnknown)
	return err
}

// Wait returns when the memory is saved. It fails with ErrFailed, with
// ErrCancelled if another client cancelled the save, or when the context ends,
// which leaves the save to go on. Complete does not mean durable.
func (s *Save) Wait(ctx context.Context, progress func(Progress)) error {
	if !s.begun {
		return errors.New("save memory: it was not begun")
	}
	m, err := s.follow(ctx, progress, nil)
	if err == nil {
		err = s.outcome(m)
	}
	if err != nil {
		return fmt.Errorf("save memory: %w", err)
	}
	return nil
}

// follow looks at the migration four times a second, and at each event, until
// it has ended or what is seen is enough.
func (s *Save) follow(ctx context.Context, progress func(Progress), enough func(monitor.Migration) (bool, error)) (monitor.Migration, error) {
	events := s.session.Subscribe(migrationEvents, "MIGRATION", "MIGRATION_PASS")
	defer events.Close()
	tick := time.NewTicker(progressEvery)
	defer tick.Stop()
	samples := sampler{report: progress}
	for {
		m, err := s.query(ctx)
		if err != nil {
			return m, err
		}
		if !underWay(m.Status) {
			s.ended = true
			samples.sample(m, time.Now())
			return m, nil
		}
		if enough != nil {
			if ok, err := enough(m); ok || err != nil {
				return m, err
			}
		}
		samples.sample(m, time.Now())
		select {
		case <-events.C: // closed with the session, which the query tells
		case <-tick.C:
		case <-ctx.Done():
			return m, context.Cause(ctx)
		}
	}
}

// migrationEvents holds more events than a migration has between two looks.
const migrationEvents = 64

func (s *Save) query(ctx context.Context) (monitor.Migration, error) {
	ctx, cancel := context.WithTimeout(ctx, queryWithin)
	defer cancel()
	return s.session.QueryMigrate(ctx)
}

// outcome says what the end of a migration means.
func (s *Save) outcome(m monitor.Migration) error {
	switch m.Status {
	case monitor.MigrationCompleted:
		return nil
	case monitor.MigrationCancelled:
		return ErrCancelled
	case monitor.MigrationFailed:
		return &FailedError{Desc: m.ErrorDesc}
	}
	return &FailedError{Desc: fmt.Sprintf("the migration is %q", m.Status)}
}

// Cancel ends a save that is under way and returns when it has ended, with the
// guest running if it ran before. Before QEMU 8.1 it waits for a background
// save to come to its end by itself, and tells of its progress, since the guest
// would not survive anything else; an ErrFailed from it means that the guest
// may have been frozen (see Stuck). A save that has ended, or was not begun,
// needs no cancelling. The context ends the waiting only.
func (s *Save) Cancel(ctx context.Context, progress func(Progress)) error {
	if err := s.cancel(ctx, progress); err != nil {
		return fmt.Errorf("cancel the save of memory: %w", err)
	}
	return nil
}

func (s *Save) cancel(ctx context.Context, progress func(Progress)) error {
	if !s.begun {
		return nil
	}
	if s.ended {
		return s.resumeLeft(ctx)
	}
	if s.tracked && mayHang(versionOf(s.session)) {
		m, err := s.follow(ctx, progress, nil)
		if err == nil && m.Status == monitor.MigrationFailed {
			err = s.outcome(m)
		}
		return err
	}
	if err := s.session.Execute(ctx, "migrate_cancel", nil, nil); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, cancelWithin)
	defer cancel()
	if _, err := s.follow(ctx, progress, nil); err != nil {
		return err
	}
	if s.tracked || !s.settings.Running {
		return nil
	}
	return s.resume(ctx)
}

// resumeLeft lets a guest run that a completed save has left in "postmigrate",
// which nobody else's pause is.
func (s *Save) resumeLeft(ctx context.Context) error {
	if s.tracked || !s.settings.Running {
		return nil
	}
	st, err := s.session.QueryStatus(ctx)
	if err != nil || st.Status != monitor.RunStatePostMigrate {
		return err
	}
	return s.resume(ctx)
}

// resume lets the guest run again after its pause went another way than it
// should, unless the guest was not ours to pause.
func (s *Save) resume(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), resumeWithin)
	defer cancel()
	if _, err := Resume(ctx, s.session); err != nil {
		return fmt.Errorf("%w: %w", ErrStillPaused, err)
	}
	return nil
}

// Close puts the owner's settings back and takes the descriptor from QEMU. It
// is safe after anything that went before, and may be repeated; while the save
// is under way it fails with ErrBusy.
func (s *Save) Close(ctx context.Context) error { return s.settings.Restore(ctx, s.session) }

// Adopt takes over a save that another process has begun and not closed, to
// Wait for its end, or to Cancel and Close it. Of the strategies only
// Background goes on by itself: what another one has left is to be cancelled,
// unless it has completed.
func Adopt(ctx context.Context, m *monitor.Session, settings Settings, strategy Strategy) (*Save, error) {
	caps, err := queryCapabilities(ctx, m)
	if err != nil {
		return nil, fmt.Errorf("adopt the save of memory: %w", err)
	}
	now, err := m.QueryMigrate(ctx)
	if err != nil {
		return nil, fmt.Errorf("adopt the save of memory: %w", err)
	}
	return &Save{
		session: m, strategy: strategy, settings: settings, tracked: caps[capBackground],
		begun: now.Status != "" && now.Status != monitor.MigrationNone,
		ended: !underWay(now.Status),
	}, nil
}
