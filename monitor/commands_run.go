package monitor

import (
	"context"
	"fmt"
	"time"

	"github.com/digitalocean/go-qemu/qmp"
)

// A RunState is QEMU's run state (RunState in qapi/run-state.json).
type RunState string

// The run states that decide what may be done with a VM.
const (
	RunStateRunning       RunState = "running"
	RunStatePaused        RunState = "paused"         // by stop
	RunStatePrelaunch     RunState = "prelaunch"      // by -S, never started
	RunStateInMigrate     RunState = "inmigrate"      // by -incoming
	RunStatePostMigrate   RunState = "postmigrate"    // migrated away: its images are another's
	RunStateFinishMigrate RunState = "finish-migrate" // completing a migration
	RunStateSaveVM        RunState = "save-vm"
	RunStateRestoreVM     RunState = "restore-vm"
	RunStateShutdown      RunState = "shutdown"  // by the guest, under -no-shutdown
	RunStateSuspended     RunState = "suspended" // by the guest (ACPI S3)
	RunStateIOError       RunState = "io-error"  // by a failed request, under werror=stop
	RunStateInternalError RunState = "internal-error"
	RunStateGuestPanicked RunState = "guest-panicked"
	RunStateWatchdog      RunState = "watchdog"
	RunStateDebug         RunState = "debug"
)

// Status is what query-status returns.
type Status struct {
	Running bool     `json:"running"` // the guest's CPUs run
	Status  RunState `json:"status"`
}

// QueryStatus returns the run state.
func (s *Session) QueryStatus(ctx context.Context) (Status, error) {
	var r Status
	err := s.Execute(ctx, "query-status", nil, &r)
	return r, err
}

// QueryName returns the VM's name (-name), which may be empty.
func (s *Session) QueryName(ctx context.Context) (string, error) {
	var r struct {
		Name string `json:"name"`
	}
	err := s.Execute(ctx, "query-name", nil, &r)
	return r.Name, err
}

// QueryUUID returns the VM's UUID (-uuid): all zeros if it was given none.
func (s *Session) QueryUUID(ctx context.Context) (string, error) {
	var r struct {
		UUID string `json:"UUID"`
	}
	err := s.Execute(ctx, "query-uuid", nil, &r)
	return r.UUID, err
}

// QueryVersion asks for QEMU's version. Session.Version knows it already; this
// shows that the main loop answers.
func (s *Session) QueryVersion(ctx context.Context) (qmp.Version, error) {
	var r qmp.Version
	err := s.Execute(ctx, "query-version", nil, &r)
	return r, err
}

// Stop pauses the guest's CPUs. It answers when disks are drained and flushed,
// and leaves a paused VM as it is.
func (s *Session) Stop(ctx context.Context) error {
	return s.Execute(ctx, "stop", nil, nil)
}

// Cont lets the guest's CPUs run. It leaves a running VM as it is.
func (s *Session) Cont(ctx context.Context) error {
	return s.Execute(ctx, "cont", nil, nil)
}

// SystemReset asks for a reset, as the button would. It answers before the
// reset is done, which the event RESET tells. Under -no-reboot it ends QEMU.
func (s *Session) SystemReset(ctx context.Context) error {
	return s.Execute(ctx, "system_reset", nil, nil)
}

// RebootAction is what QEMU does when the guest is reset (qapi/run-state.json,
// QEMU 6.0).
type RebootAction string

// The actions at a reset.
const (
	RebootReset    RebootAction = "reset"
	RebootShutdown RebootAction = "shutdown" // what -no-reboot sets
)

// SetRebootAction changes what a reset does.
func (s *Session) SetRebootAction(ctx context.Context, action RebootAction) error {
	return s.Execute(ctx, "set-action", map[string]RebootAction{"reboot": action}, nil)
}

// resetDeadline bounds the wait for a reset: each device of the machine is
// reset, some of which wait for I/O that is under way.
const resetDeadline = 30 * time.Second

// ResetAndWait resets the guest and returns when that is done. It fails with
// ErrOutcomeUnknown when no RESET comes.
func (s *Session) ResetAndWait(ctx context.Context) error {
	sub := s.Subscribe(4, "RESET")
	defer sub.Close()
	if err := s.SystemReset(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, resetDeadline)
	defer cancel()
	select {
	case _, ok := <-sub.C:
		if ok {
			return nil
		}
		return s.Err()
	case <-ctx.Done():
		return fmt.Errorf("system_reset: %w: no RESET within %s", ErrOutcomeUnknown, resetDeadline)
	}
}

// resetsQuiet is how long no reset comes once those of a firmware are over: it
// asks for one in several ways, one after the other (tryReboot in SeaBIOS'
// src/resume.c), and QEMU does each that was asked for in time.
const resetsQuiet = time.Second

// AwaitGuestReset waits until the guest has reset itself and has done so for the
// last time, as the events of a subscription to RESET tell, or the context or the
// session ends. A nil subscription is one to what comes from now on.
func (s *Session) AwaitGuestReset(ctx context.Context, sub *Subscription) {
	if sub == nil {
		sub = s.Subscribe(8, "RESET")
		defer sub.Close()
	}
	var quiet <-chan time.Time // nil until the guest has reset itself
	for {
		select {
		case e, ok := <-sub.C:
			if !ok {
				return
			}
			var data struct {
				Guest bool `json:"guest"`
			}
			if e.Decode(&data) == nil && data.Guest {
				quiet = time.After(resetsQuiet)
			}
		case <-quiet:
			return
		case <-ctx.Done():
			return
		}
	}
}
