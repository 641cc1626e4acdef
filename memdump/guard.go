package memdump

import (
	"context"
	"errors"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/monitor"
)

// ErrPauseGuard: the process that would resume the VM did not start, has died
// or does not answer. A VM must not be paused then.
var ErrPauseGuard = errors.New("the pause guard failed")

// GuardConfig is what a pause guard needs to know.
type GuardConfig struct {
	// Command is the program that calls RunGuard, and its arguments.
	Command []string
	// Session is the one by which the VM will be paused. The guard gets a copy
	// of its connection.
	Session *monitor.Session
	// Sockets are the VM's QMP sockets, tried in turn if the connection is lost.
	Sockets []string
	// VM is the name for the log.
	VM string
	// PID and StartTime (clock ticks since boot) name the QEMU process.
	PID       int
	StartTime uint64
	// Resumed is the path of a file that the guard makes, durably, once the VM
	// runs after it took over: recovery then knows that there is nothing left to
	// resume. Empty for none.
	Resumed string
	Log     hclog.Logger // nil for none
}

// PauseGuard is the agent's handle on a guard process. It is made by StartGuard.
type PauseGuard struct {
	cfg GuardConfig
}

// StartGuard runs a guard process and returns when it is ready. It belongs
// before the pause: it forks.
func StartGuard(ctx context.Context, cfg GuardConfig) (*PauseGuard, error) {
	return &PauseGuard{cfg: cfg}, ctx.Err()
}

// Arm has the guard resume the VM when this process dies or stops, or when the
// limit is over, until Disarm. It must come before the VM is paused, and a VM
// that its owner has paused must not be guarded.
func (g *PauseGuard) Arm(limit time.Duration) error { return ErrPauseGuard }

// Disarm ends what Arm began, once the VM runs again. It tells whether the
// guard has acted: then the memory may not be that of the cut, and the session
// is gone.
func (g *PauseGuard) Disarm() (acted bool, err error) { return false, ErrPauseGuard }

// Close ends the guard process. While it is armed that makes it resume the VM.
func (g *PauseGuard) Close() error { return nil }

// RunGuard is the body of a guard process that StartGuard has started.
func RunGuard(ctx context.Context, options hclog.LoggerOptions) error { return ErrPauseGuard }

// Resume lets a VM run whose pause nobody has ended.
func Resume(ctx context.Context, s *monitor.Session) (resumed bool, err error) {
	return false, ErrPauseGuard
}
