package memdump

import (
	"context"

	"github.com/vmsnap/vmsnap/monitor"
)

// Version is a version of QEMU.
type Version struct{ Major, Minor, Micro int }

// Facts are what decides how the memory of a VM can be saved.
type Facts struct {
	Version Version
	Status  monitor.RunState
	Running bool // the guest's CPUs run

	RAM      uint64 // bytes that a save covers, video memory and firmware included
	Resident uint64 // bytes of it that the guest has touched; RAM if unknown
	Huge     uint64 // bytes of it in huge pages

	Blocked  []string // why QEMU would refuse any migration
	Tracking string   // why write tracking cannot be used, "" if it can
	Busy     string   // a migration that is under way, as its status
}

// Probe asks QEMU, and the kernel about the process with this pid, for what
// decides how its memory can be saved. Nothing is changed. A pid of 0 leaves
// the kernel out: what QEMU will refuse is then found out by Prepare only.
func Probe(ctx context.Context, s *monitor.Session, pid int) (Facts, error) {
	return Facts{}, nil
}

// Reserve is how much space a save of these facts takes at most, in bytes, if
// every page is saved once.
func (f Facts) Reserve() uint64 { return 0 }
