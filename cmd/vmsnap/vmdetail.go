package main

import (
	"fmt"
	"strconv"
	"strings"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// vmDetail writes everything that is known of a VM.
func vmDetail(p page, vm *vmsnapv1.VM) {
	state := word(vm.GetState())
	if run := vm.GetRunState(); run != "" && run != state {
		state += " (" + run + ")"
	}
	p.fields(
		"Name", vm.GetName(),
		"ID", vm.GetId(),
		"UUID", vm.GetUuid(),
		"State", state,
		"Frozen", frozenText(p, vm.GetFreeze()),
		"Operation", vm.GetOperationId(),
		"Guest agent", agentText(vm.GetGuestAgent()),
		"Process", processText(p, vm.GetProcess()),
		"QMP socket", vm.GetProcess().GetQmpSocket(),
		"Unit", unitText(vm.GetProcess()),
		"Snapshots", strconv.Itoa(int(vm.GetSnapshots())),
		"Space", vmSpaceText(p, vm.GetSpace()),
		"First seen", p.when(vm.GetFirstSeen()),
		"Last seen", p.when(vm.GetLastSeen()),
	)
	for _, d := range vm.GetDisks() {
		p.line("")
		diskDetail(p, d)
	}
	if len(vm.GetProblems()) > 0 {
		p.line("")
		p.line("Problems:")
	}
	for _, problem := range vm.GetProblems() {
		p.advice(problem.GetCode()+": "+problem.GetMessage(), problem.GetHint())
	}
}

// vmSpaceText says what a VM takes, and what of it is there for its snapshots.
func vmSpaceText(p page, s *vmsnapv1.VMSpace) string {
	if s == nil {
		return ""
	}
	text := size(s.GetLayers()) + " in layers"
	if s.GetForeign() > 0 {
		text += ", " + size(s.GetForeign()) + " in foreign ones"
	}
	if s.GetMemory() > 0 {
		text += ", " + size(s.GetMemory()) + " of memory"
	}
	if s.GetIncomplete() {
		text += ", without files that cannot be read"
	} else {
		text += "; without snapshots " + size(s.GetReclaimable()) + " less"
	}
	return fmt.Sprintf("%s (measured %s)", text, p.ago(s.GetMeasured()))
}

func frozenText(p page, f *vmsnapv1.Freeze) string {
	if f == nil {
		return ""
	}
	text := fmt.Sprintf("%d of %d file systems, thawed at the latest at %s", f.GetFrozen(), f.GetTotal(), p.when(f.GetDeadline()))
	if f.GetUnresolved() {
		text = "perhaps still: the guest agent does not answer, and is asked to thaw until it does; since " + p.when(f.GetSince())
	}
	return text
}

func agentText(g *vmsnapv1.GuestAgent) string {
	text := word(g.GetPresence())
	if g.GetSocket() != "" {
		text += " at " + g.GetSocket()
	}
	return text
}

func processText(p page, proc *vmsnapv1.Process) string {
	if proc == nil {
		return ""
	}
	text := fmt.Sprintf("pid %d", proc.GetPid())
	if proc.GetStarted() != nil {
		text += ", started " + p.ago(proc.GetStarted())
	}
	if proc.GetQemuVersion() != "" {
		text += ", QEMU " + proc.GetQemuVersion()
	}
	if proc.GetBinary() != "" {
		text += ", " + proc.GetBinary()
	}
	return text
}

func unitText(proc *vmsnapv1.Process) string {
	if proc.GetSlice() == "" {
		return proc.GetUnit()
	}
	return strings.TrimPrefix(fmt.Sprintf("%s in %s", proc.GetUnit(), proc.GetSlice()), " in ")
}

func diskDetail(p page, d *vmsnapv1.Disk) {
	about := []string{size(d.GetVirtualSize())}
	if d.GetBus() != "" {
		about = append(about, d.GetBus())
	}
	if d.GetNode() != "" {
		about = append(about, "node "+d.GetNode())
	}
	if d.GetIothread() != "" {
		about = append(about, "I/O thread "+d.GetIothread())
	}
	if d.GetThrottled() {
		about = append(about, "throttled")
	}
	p.line("Disk %s: %s", d.GetDevice(), strings.Join(about, ", "))
	launch := d.GetLaunchPath()
	switch {
	case launch != "" && d.GetLaunchFormat() != "":
		launch += " (" + d.GetLaunchFormat() + ")"
	case launch != "":
		launch += " (format not declared)"
	}
	if d.GetSettleNeeded() {
		launch += ", not yet the active layer: it is settled when the VM has stopped"
	}
	if launch != "" {
		p.line("  launched as %s", launch)
	}
	if d.GetNotCuttable() != "" {
		p.line("  cannot be snapshotted: %s", d.GetNotCuttable())
	}
	var rows [][]string
	for i, l := range d.GetLayers() {
		rows = append(rows, []string{l.GetPath(), l.GetFormat(), size(l.GetAllocated()), layerNotes(l, i == 0)})
	}
	p.columns("  ", rows)
}

func layerNotes(l *vmsnapv1.Layer, active bool) string {
	var notes []string
	if active {
		notes = append(notes, "active")
	}
	switch {
	case l.GetVm() != "":
		notes = append(notes, "a layer of VM "+l.GetVm())
	case l.GetForeign():
		notes = append(notes, "foreign")
	}
	if l.GetImmutable() {
		notes = append(notes, "immutable")
	}
	return strings.Join(notes, ", ")
}
