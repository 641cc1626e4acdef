package monitor

import (
	"context"

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
