package agent

import (
	"context"
	"errors"
	"fmt"

	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/memdump"
	"github.com/vmsnap/vmsnap/monitor"
)

// Finding is something that the doctor has found out about a VM.
type Finding struct {
	Code, Message, Hint string
	Repairable          bool // Repair can put it right
	Repaired            bool // Repair has put it right
}

// findStuck is a guest that a save which has ended holds for good (QEMU before
// 8.1).
const findStuck = "guest-write-protected"

// Diagnose looks for what is wrong with a VM, and changes nothing.
func (a *Agent) Diagnose(ctx context.Context, ref string) ([]Finding, error) {
	return a.diagnose(ctx, ref, false)
}

// Repair puts right what it can of what Diagnose finds.
func (a *Agent) Repair(ctx context.Context, ref string) ([]Finding, error) {
	return a.diagnose(ctx, ref, true)
}

func (a *Agent) diagnose(ctx context.Context, ref string, repair bool) ([]Finding, error) {
	v, err := a.find(ref)
	if err != nil {
		return nil, err
	}
	view, err := a.VM(ctx, ref)
	if err != nil {
		return nil, err
	}
	findings := problemsOf(view)
	r, err := v.alone()
	if err != nil || r == nil {
		return findings, nil //nolint:nilerr // two processes are among the problems
	}
	stuck, found, err := a.diagnoseStuck(ctx, v, r, repair)
	if found {
		findings = append(findings, stuck)
	}
	return findings, err
}

// problemsOf are the findings that need no further look.
func problemsOf(view VMView) []Finding {
	var findings []Finding
	for _, p := range view.Problems {
		if p.Code == "note" || p.Code == "other-mount-namespace" {
			continue // nothing is wrong
		}
		findings = append(findings, Finding{Code: p.Code, Message: p.Message, Hint: p.Hint})
	}
	if f := view.Freeze; f != nil && f.Unresolved {
		findings = append(findings, Finding{
			Code: "guest-freeze-unresolved", Message: "the guest may be frozen, and its agent does not answer the thaw", Hint: hintUnresolved,
		})
	}
	for _, d := range view.Disks {
		if d.NotCuttable != "" {
			findings = append(findings, Finding{
				Code: "disk-not-cuttable", Message: fmt.Sprintf("disk %s cannot be snapshotted: %s", d.Device, d.NotCuttable),
			})
		}
		if d.SettleNeeded {
			findings = append(findings, Finding{
				Code: "disk-not-settled", Message: fmt.Sprintf("the launch path of disk %s does not lead to its newest layer", d.Device),
				Hint: "it is settled when the VM has stopped, by a vmsnapd that runs then",
			})
		}
	}
	return findings
}

// diagnoseStuck finds out whether a save that has ended holds the guest, and
// lets it go.
func (a *Agent) diagnoseStuck(ctx context.Context, v *vm, r *run, repair bool) (Finding, bool, error) {
	suspect := memdump.Suspect{
		PID: r.proc.PID, StartTime: r.proc.StartTime,
		Migration: func(ctx context.Context) (monitor.Migration, error) {
			s, err := v.monitorOf(r)
			if err != nil {
				return monitor.Migration{}, err
			}
			return s.QueryMigrate(ctx)
		},
	}
	look := memdump.Stuck
	if repair {
		look = memdump.Rescue
	}
	result, err := look(ctx, suspect)
	switch {
	case errors.Is(err, memdump.ErrUndecided):
		return Finding{Code: findStuck, Message: err.Error(), Hint: "ask the client that holds the VM's monitor"}, true, nil
	case errors.Is(err, memdump.ErrNotStuck), err == nil && !result.Stuck:
		return Finding{}, false, nil
	case err != nil:
		return Finding{}, false, fault.New(kindOf(err), "VM %s: %w", v.name(), err)
	}
	f := Finding{Code: findStuck, Message: result.Reason, Repairable: true, Repaired: repair}
	if !repair {
		f.Hint = fmt.Sprintf("vmsnap doctor %s --repair lets the guest go on", v.name())
	} else {
		a.log.Warn("a guest that a save had left without leave to write was let go on", "vm", v.name(), "protected", result.Protected)
	}
	return f, true, nil
}
