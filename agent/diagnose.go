package agent

import (
	"context"
	"errors"
	"fmt"

	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/memdump"
	"github.com/vmsnap/vmsnap/monitor"
)

// Finding is something that the doctor has found out about a VM.
type Finding struct {
	Code, Message, Hint string
	Repair              string // what Repair would do about it; empty when it can do nothing
	Repairable          bool   // Repair can put it right
	Repaired            bool   // Repair has put it right
}

// DoctorRequest asks for a VM to be looked at.
type DoctorRequest struct {
	VM   string
	Deep bool   // also read saved memory and compare it with its checksum
	UID  uint32 `json:"-"`
}

// Diagnosis is what the doctor says of a VM.
type Diagnosis struct {
	Findings []Finding
	Skipped  string // why the VM's files were not looked at; empty when they were
}

// findStuck is a guest that a save which has ended holds for good (QEMU before
// 8.1).
const findStuck = "guest-write-protected"

// Diagnose looks for what is wrong with a VM, and changes nothing. A VM that an
// operation is changing is looked at from outside only.
func (a *Agent) Diagnose(ctx context.Context, req DoctorRequest) (Diagnosis, error) {
	v, err := a.find(req.VM)
	if err != nil {
		return Diagnosis{}, err
	}
	d, err := a.diagnoseOutside(ctx, v, false)
	if err != nil {
		return d, err
	}
	if v.unfinished.Load() {
		d.Skipped = "an operation that an earlier vmsnapd left unfinished is being recovered"
		d.Findings = append(d.Findings, Finding{
			Code: findRecovering, Message: d.Skipped, Hint: "vmsnap operation list --active tells what it waits for",
		})
		return d, nil
	}
	if id, busy := a.ops.Running(v.id); busy {
		d.Skipped = "operation " + id + " is at work on it"
		return d, nil
	}
	if v.migrated() {
		d.Skipped = migratedAway
		return d, nil
	}
	x, err := a.examine(ctx, v, nil, req.Deep)
	if err != nil {
		return d, err
	}
	if id, busy := a.ops.Running(v.id); busy || !x.current(ctx) {
		d.Skipped = "operation " + id + " has begun to work on it"
		return d, nil
	}
	d.Findings = append(d.Findings, x.findings...)
	return d, nil
}

// migratedAway is why the files of a VM are left alone.
const migratedAway = "it has migrated to another host, where its disks may be in use"

// migrated reports whether the VM's disks may be another host's.
func (v *vm) migrated() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.runs) == 0 && v.rec.Stopped == endedByMigration
}

// findRecovering is an operation that recovery has not brought to its end.
const findRecovering = "recovery-unfinished"

// Repair puts right what it can of what Diagnose finds. What it does to files is
// an operation, which holds the VM.
func (a *Agent) Repair(ctx context.Context, req DoctorRequest) (Diagnosis, error) {
	v, err := a.find(req.VM)
	if err != nil {
		return Diagnosis{}, err
	}
	d, err := a.diagnoseOutside(ctx, v, true)
	if err != nil {
		return d, err
	}
	if v.migrated() {
		d.Skipped = migratedAway
		return d, nil
	}
	var found []Finding
	spec := op.Spec{Kind: op.KindRepair, VMID: v.id, VMName: v.name(), Request: req, UID: req.UID}
	rec, err := a.begin(ctx, spec, func(ctx context.Context, o *op.Op) error {
		v.changing.Lock()
		defer v.changing.Unlock()
		x, err := a.examine(ctx, v, o, req.Deep)
		if err != nil {
			return err
		}
		found = x.findings
		return a.reload(ctx, v)
	})
	if err != nil {
		return d, err
	}
	if rec, err = a.ops.Wait(ctx, rec.ID); err != nil {
		return d, err
	}
	d.Findings = append(d.Findings, found...)
	return d, failureOf(rec)
}

// diagnoseOutside finds what can be seen without a look into the VM's files, and
// lets a guest go that a save holds.
func (a *Agent) diagnoseOutside(ctx context.Context, v *vm, repair bool) (Diagnosis, error) {
	view, err := a.VM(ctx, v.id)
	if err != nil {
		return Diagnosis{}, err
	}
	d := Diagnosis{Findings: problemsOf(view)}
	r, err := v.known(ctx)
	if err != nil || r == nil {
		return d, nil //nolint:nilerr // two processes are among the problems
	}
	stuck, found, err := a.diagnoseStuck(ctx, v, r, repair)
	if found {
		d.Findings = append(d.Findings, stuck)
	}
	return d, err
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
	f := Finding{Code: findStuck, Message: result.Reason, Repair: "let the guest go on", Repairable: true, Repaired: repair}
	if !repair {
		f.Hint = fmt.Sprintf("vmsnap doctor %s --repair lets the guest go on", v.name())
	} else {
		a.log.Warn("a guest that a save had left without leave to write was let go on", "vm", v.name(), "protected", result.Protected)
	}
	return f, true, nil
}
