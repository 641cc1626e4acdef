package memdump

import (
	"context"
	"errors"

	"github.com/vmsnap/vmsnap/monitor"
)

// ErrNotStuck means that there is nothing to rescue, or that it cannot be told
// apart from a save that goes on.
var ErrNotStuck = errors.New("the guest is not held by a save that has ended")

// A Suspect is a QEMU whose guest may be stuck.
type Suspect struct {
	PID       int
	StartTime uint64 // clock ticks since boot, so that it is no other process
	// Migration asks QEMU about its latest migration. It may fail with
	// monitor.ErrBusy or monitor.ErrUnresponsive: QEMU's main loop can be stuck
	// as well.
	Migration func(context.Context) (monitor.Migration, error)
}

// StuckResult is what was seen of a suspect.
type StuckResult struct {
	Stuck     bool
	Reason    string // why it is stuck, or why not
	Protected uint64 // bytes of the guest's memory that cannot be written
	Blocked   int    // threads that wait for a write to be allowed
}

// Stuck tells whether a guest is held for good by a background save that has
// ended, as those of QEMU before 8.1 that failed or were cancelled do.
func Stuck(ctx context.Context, s Suspect) (StuckResult, error) {
	return StuckResult{}, errors.ErrUnsupported
}

// Rescue lets a stuck guest go on. It fails with ErrNotStuck unless Stuck says
// so, and leaves the VM alone then.
func Rescue(ctx context.Context, s Suspect) (StuckResult, error) {
	return StuckResult{}, ErrNotStuck
}
