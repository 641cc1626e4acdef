package memdump

import (
	"fmt"
	"strings"

	"github.com/vmsnap/vmsnap/monitor"
)

// A Warning is something that an operator should know, with a code for
// programs.
type Warning struct {
	Code    string
	Message string
}

// The codes of warnings.
const (
	// WarnTracking: writes to this guest's memory cannot be tracked, so the
	// pause depends on how fast the guest changes its memory, or on how much it has.
	WarnTracking = "write-tracking-unavailable"
	// WarnPostmigrate: QEMU will call the paused VM "postmigrate" and refuse
	// further saves, and changes to its disks, until it has run again.
	WarnPostmigrate = "vm-left-postmigrate"
)

// A Choice is a strategy and why.
type Choice struct {
	Strategy Strategy
	Reason   string
	Warnings []Warning
}

// Choose picks the strategy with the shortest pause, or verifies that the one
// that is wanted can be used ("" for any). It fails with an *UnsuitableError,
// or with ErrBusy.
func Choose(f Facts, want Strategy) (Choice, error) {
	if f.Busy != "" {
		return Choice{}, fmt.Errorf("%w (%s)", ErrBusy, f.Busy)
	}
	if reason := unsavable(f); reason != "" {
		return Choice{}, &UnsuitableError{Reason: reason}
	}
	if !f.Running {
		return choosePaused(f, want)
	}
	switch want {
	case "":
		if f.Tracking == "" {
			return Choice{Strategy: Background, Reason: "QEMU can track writes to the guest's memory"}, nil
		}
		if f.Inexact != "" {
			why := f.Tracking + "; " + f.Inexact
			return Choice{Strategy: Stopped, Reason: why, Warnings: []Warning{{
				Code:    WarnTracking,
				Message: "the guest stands still until its memory is saved: " + why,
			}}}, nil
		}
		return Choice{Strategy: Precopy, Reason: f.Tracking, Warnings: []Warning{{
			Code:    WarnTracking,
			Message: "the pause depends on how fast the guest changes its memory: " + f.Tracking,
		}}}, nil
	case Background:
		if f.Tracking != "" {
			return Choice{}, &UnsuitableError{Strategy: want, Reason: f.Tracking}
		}
	case Precopy:
		if f.Inexact != "" {
			return Choice{}, &UnsuitableError{Strategy: want, Reason: f.Inexact}
		}
	case Stopped:
	default:
		return Choice{}, &UnsuitableError{Strategy: want, Reason: "there is no such strategy"}
	}
	return Choice{Strategy: want, Reason: "asked for"}, nil
}

// choosePaused chooses for a VM that its owner has paused.
func choosePaused(f Facts, want Strategy) (Choice, error) {
	if want != "" && want != Stopped {
		return Choice{}, &UnsuitableError{Strategy: want, Reason: fmt.Sprintf("the VM is not running (%s)", f.Status)}
	}
	c := Choice{Strategy: Stopped, Reason: fmt.Sprintf("the VM is not running (%s)", f.Status)}
	if !staysPaused(f) {
		c.Warnings = append(c.Warnings, Warning{
			Code:    WarnPostmigrate,
			Message: "QEMU will show the VM as postmigrate, and no further snapshot can be taken, until it is resumed",
		})
	}
	return c, nil
}

// staysPaused tells whether a VM that does not run can be saved as if in the
// background, which leaves it as it was. Before 9.0 QEMU resumes a VM at that,
// and in any state but "paused" it aborts (10.0, "prelaunch"). Any other way of
// saving ends in "postmigrate" on all versions.
func staysPaused(f Facts) bool {
	return f.Status == monitor.RunStatePaused && f.Tracking == "" && f.Version.AtLeast(9, 0)
}

// unsavable returns why no strategy can save the memory.
func unsavable(f Facts) string {
	if len(f.Blocked) > 0 {
		return "QEMU cannot migrate this VM: " + strings.Join(f.Blocked, "; ")
	}
	switch f.Status {
	case monitor.RunStateRunning, monitor.RunStatePaused, monitor.RunStatePrelaunch:
		return ""
	case monitor.RunStatePostMigrate:
		return "the VM was saved or migrated away and has not run since (postmigrate); resume it first, " +
			"unless it runs on another host"
	case monitor.RunStateInMigrate:
		return "the VM waits for its memory (inmigrate)"
	case monitor.RunStateSuspended:
		return "the guest sleeps (suspended); wake it first"
	}
	return fmt.Sprintf("the VM is in state %s", f.Status)
}
