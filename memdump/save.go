package memdump

import (
	"context"
	"os"
	"time"

	"github.com/vmsnap/vmsnap/monitor"
)

// A Guard resumes the VM when this process cannot. PauseGuard is one.
//
// With Precopy it is armed before the guest is paused, which QEMU does at a
// moment of its own: a guard that acts must cancel a migration that is not a
// background one before it resumes the VM.
type Guard interface {
	// Arm has the guard resume the VM when this process dies or stops, or when
	// the limit is over, until Disarm.
	Arm(limit time.Duration) error
	// Disarm ends that. It tells whether the guard has acted.
	Disarm() (acted bool, err error)
}

// Config is what a save needs.
type Config struct {
	Session  *monitor.Session
	Strategy Strategy
	Facts    Facts
	ID       string   // names the descriptor in QEMU
	Target   *os.File // positioned where the stream shall begin
	PID      int      // of QEMU; 0 if unknown
	Guard    Guard

	// Note makes the settings durable. Prepare calls it before it changes any.
	Note func(Settings) error

	// MaxPause is how long the guest may stand still. Precopy fails with
	// ErrNotConverging rather than exceed it by its own estimate. 0 is no limit.
	MaxPause time.Duration
	// GuardLimit is how long the guest may stand still until the guard resumes
	// it; 0 for the strategy's own.
	GuardLimit time.Duration
}

// Pause is how long the guest stood still, by this host's clock.
type Pause struct {
	Began   time.Time
	Length  time.Duration
	ByGuard bool // ended by the guard
}

// A Save is a save of one VM's memory. Prepare makes it.
type Save struct{}

// Prepare notes the owner's settings, changes them, and hands QEMU the target.
// The guest feels nothing. On failure everything is as before.
func Prepare(ctx context.Context, c Config) (*Save, error) { return nil, nil }

// Settings returns what the save has changed, as it was.
func (s *Save) Settings() Settings { return Settings{} }

// Cut pauses the guest, calls cut, and lets the guest run again as soon as its
// memory of that instant is safe. With Precopy and Stopped it returns when all
// is saved.
func (s *Save) Cut(ctx context.Context, cut func(context.Context) error, progress func(Progress)) (Pause, error) {
	return Pause{}, nil
}

// Wait returns when the memory is saved.
func (s *Save) Wait(ctx context.Context, progress func(Progress)) error { return nil }

// Cancel ends a save that is under way and returns when it has ended. Before
// QEMU 8.1 a background save is let run to its end.
func (s *Save) Cancel(ctx context.Context, progress func(Progress)) error { return nil }

// Close puts the owner's settings back.
func (s *Save) Close(ctx context.Context) error { return nil }

// Adopt takes over a save that another process has begun.
func Adopt(ctx context.Context, m *monitor.Session, settings Settings, strategy Strategy) (*Save, error) {
	return nil, nil
}
