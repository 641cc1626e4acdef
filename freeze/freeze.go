package freeze

import (
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/hashicorp/go-hclog"
)

// Config is what all guards of an agent have in common.
type Config struct {
	// Executable is the argv of a process that calls Main.
	Executable []string
	// Dir is the absolute path of the directory of lease files. It is made,
	// with mode 0700, if there is none.
	Dir string
	// Logger gets the agent's side of events. Nil logs nothing. The guard
	// itself logs to the standard error that it inherits.
	Logger hclog.Logger
}

// Request is one freeze.
type Request struct {
	VM          string  `json:"vm"`    // name, for people
	VMID        string  `json:"vm_id"` // identity
	Operation   string  `json:"operation"`
	AgentSocket string  `json:"agent_socket"`
	QEMU        Process `json:"qemu"`
	// Mountpoints to freeze; all of the guest's when empty.
	Mountpoints []string `json:"mountpoints,omitempty"`
	// FreezeTimeout bounds the guest's reply to the freeze.
	FreezeTimeout time.Duration `json:"freeze_timeout_ns"`
	// Lease bounds the time from the guest's reply to the thaw.
	Lease time.Duration `json:"lease_ns"`
}

// Filesystem is one that the guest has mounted.
type Filesystem struct {
	Name       string `json:"name"` // block device in the guest
	Mountpoint string `json:"mountpoint"`
	Type       string `json:"type"`
	// Freezable is false for types that Linux cannot freeze, such as vfat.
	Freezable bool `json:"freezable"`
}

// Frozen is a freeze that has happened.
type Frozen struct {
	Count    int       `json:"count"`    // file systems frozen
	Total    int       `json:"total"`    // file systems that the guest reports and could freeze
	At       time.Time `json:"at"`       // when the guest replied
	Deadline time.Time `json:"deadline"` // when the lease ends
}

// Thawed is the end of a freeze that was asked for.
type Thawed struct {
	// Verified tells that the guest was still frozen just before the thaw, and
	// thawed everything that it had frozen.
	Verified bool `json:"verified"`
	// Window is the time from freeze request to thaw reply.
	Window time.Duration `json:"window_ns"`
	// Reason says why it is not verified.
	Reason string `json:"reason,omitempty"`
}

// End is how a freeze ended.
type End string

// The ends of a freeze.
const (
	Unused       End = "unused"        // no freeze was sent
	OnRequest    End = "thawed"        // the agent asked for the thaw
	LeaseExpired End = "lease-expired" // the guard thawed at the lease's end
	AgentGone    End = "agent-gone"    // the guard thawed because its pipe to the agent closed
	FreezeFailed End = "freeze-failed" // the freeze failed, and the guest answered thawed afterwards
	ByRecovery   End = "recovered"     // the guard was lost, and another one thawed
	VMGone       End = "vm-gone"       // the QEMU process ended
	GuestReset   End = "guest-reset"   // the agent has reset the guest, whose next kernel knows of no freeze
	Lost         End = "lost"          // no guard could be kept running; the lease file remains
)

// Resolved tells whether the guest is known not to be frozen any more.
func (e End) Resolved() bool { return e != Lost }

// Outcome is how a freeze ended, and why.
type Outcome struct {
	End      End           `json:"end"`
	Verified bool          `json:"verified"` // see Thawed
	Reason   string        `json:"reason,omitempty"`
	Window   time.Duration `json:"window_ns"` // freeze request to thaw; 0 when unknown
}

func (c Config) check() error {
	switch {
	case len(c.Executable) == 0:
		return errors.New("no executable for the guard")
	case !filepath.IsAbs(c.Dir):
		return fmt.Errorf("the lease directory %q is not an absolute path", c.Dir)
	}
	return nil
}

func (c Config) logger() hclog.Logger {
	if c.Logger == nil {
		return hclog.NewNullLogger()
	}
	return c.Logger
}

func (r Request) check() error {
	switch {
	case r.AgentSocket == "":
		return errors.New("no guest-agent socket")
	case r.QEMU.PID <= 0:
		return errors.New("no QEMU process")
	case r.FreezeTimeout <= 0:
		return fmt.Errorf("freeze timeout %s", r.FreezeTimeout)
	case r.Lease <= 0:
		return fmt.Errorf("lease %s", r.Lease)
	}
	return nil
}
