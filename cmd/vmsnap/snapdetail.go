package main

import (
	"fmt"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

func snapshotResult(s *vmsnapv1.Snapshot) result {
	return result{document: s, names: []string{snapshotName(s)}, human: func(p page, _ bool) error {
		snapshotDetail(p, s)
		return nil
	}}
}

func snapshotDetail(p page, s *vmsnapv1.Snapshot) {
	partial := ""
	if s.GetPartial() {
		partial = "a disk that was asked for dropped out; see the warnings"
	}
	p.fields(
		"Snapshot", snapshotName(s),
		"ID", s.GetId(),
		"Taken", p.when(s.GetCreated()),
		"Consistency", word(s.GetConsistency()),
		"State", stateText(s.GetState()),
		"Partial", partial,
		"Expires", p.when(s.GetExpires()),
		"Template", templateText(s.GetTemplate()),
		"Parent", s.GetPosition().GetParentId(),
		"Group", groupText(s.GetGroup()),
		"Quiesce", quiesceText(s.GetQuiesce()),
		"Memory", memoryText(s.GetMemory()),
		"Memory file", s.GetMemory().GetPath(),
		"Encrypted to", s.GetMemory().GetRecipient(),
		"Space", snapshotSpaceText(p, s.GetSpace()),
		"Description", s.GetDescription(),
		"Labels", labelsText(s.GetLabels()),
		"Operation", s.GetOperationId(),
	)
	if len(s.GetDisks()) > 0 {
		p.line("")
		p.line("Disks:")
	}
	var rows [][]string
	for _, d := range s.GetDisks() {
		row := []string{d.GetDevice(), size(d.GetVirtualSize()), "excluded"}
		switch {
		case d.GetExcluded():
		case d.GetPath() == "" && s.GetState() > vmsnapv1.PointState_POINT_STATE_VALID:
			row[2] = "merged"
		default:
			row = []string{d.GetDevice(), size(d.GetVirtualSize()), d.GetPath(), d.GetFormat(), size(d.GetAllocated())}
		}
		rows = append(rows, row)
	}
	p.columns("  ", rows)
	cloneList(p, s.GetClones())
	warningList(p, s.GetWarnings())
}

// stateText says why a snapshot cannot be restored.
func stateText(state vmsnapv1.PointState) string {
	switch state {
	case vmsnapv1.PointState_POINT_STATE_DELETING:
		return "deleting: it cannot be restored any more"
	case vmsnapv1.PointState_POINT_STATE_INVALID:
		return "invalid: its deletion was begun, and it cannot be restored; delete it"
	default:
		return ""
	}
}

func templateText(template bool) string {
	if template {
		return "yes: it cannot be deleted"
	}
	return ""
}

// cloneList shows what lies on the layers of a snapshot.
func cloneList(p page, clones []*vmsnapv1.Clone) {
	if len(clones) == 0 {
		return
	}
	p.line("")
	p.line("Linked clones:")
	var rows [][]string
	for _, c := range clones {
		row := []string{c.GetDisk(), c.GetPath(), c.GetVmName(), p.ago(c.GetCreated())}
		if c.GetMissing() {
			row = append(row, "missing: moved or removed")
		}
		rows = append(rows, row)
	}
	p.columns("  ", rows)
}

func snapshotSpaceText(p page, s *vmsnapv1.SnapshotSpace) string {
	if s == nil {
		return ""
	}
	return fmt.Sprintf("%s of its own, %s shared (measured %s)", size(s.GetExclusive()), size(s.GetShared()), p.ago(s.GetMeasured()))
}

// quiesceText says what was asked for and what came of it.
func quiesceText(q *vmsnapv1.QuiesceResult) string {
	text := word(q.GetRequested())
	if q.GetFreezeWindow() != nil {
		text += fmt.Sprintf(": %d of %d file systems frozen for %s", q.GetFrozen(), q.GetTotal(), windowText(q))
	}
	if q.GetReason() != "" {
		text += ": " + q.GetReason()
	}
	return text
}

// memoryText says what was saved, how, and what it cost the guest.
func memoryText(m *vmsnapv1.SnapshotMemory) string {
	if m == nil {
		return ""
	}
	text := size(m.GetSize())
	if m.GetCompressed() {
		text += fmt.Sprintf(" (%s uncompressed)", size(m.GetStreamSize()))
	}
	return fmt.Sprintf("%s in %s, pause %s, %s: %s", text, brief(m.GetDuration().AsDuration()),
		brief(m.GetPause().AsDuration()), word(m.GetStrategy()), m.GetReason())
}

// memoryPlan is what saving the memory would take.
func memoryPlan(p page, m *vmsnapv1.PlanMemory) {
	if m == nil {
		return
	}
	dirty := ""
	if m.GetDirtyRate() > 0 {
		dirty = size(m.GetDirtyRate()) + "/s"
	}
	p.line("")
	p.line("Memory:")
	rows := [][]string{
		{"strategy", word(m.GetStrategy()) + ": " + m.GetReason()},
		{"file in", fmt.Sprintf("%s (%s free, %s set aside)", m.GetDirectory(), size(m.GetFree()), size(m.GetReserve()))},
		{"guest memory", size(m.GetRam())},
		{"dirtied at", dirty},
		{"would save", fmt.Sprintf("about %s in %s", size(m.GetBytes()), brief(m.GetDuration().AsDuration()))},
		{"pause", "about " + brief(m.GetPause().AsDuration())},
	}
	if m.GetRecipient() != "" {
		rows = append(rows, []string{"encrypted to", m.GetRecipient()})
	}
	p.columns("  ", rows)
}

func warningList(p page, warnings []*vmsnapv1.Warning) {
	if len(warnings) == 0 {
		return
	}
	p.line("")
	p.line("Warnings:")
	for _, w := range warnings {
		p.line("  %s", warningText(w))
	}
}

// planResult shows what a snapshot would do.
func planResult(plan *vmsnapv1.Plan) result {
	name := plan.GetVmName() + "/" + plan.GetName()
	return result{document: plan, names: []string{name}, human: func(p page, _ bool) error {
		window := ""
		if plan.GetFreezeWindow() != nil {
			window = "about " + brief(plan.GetFreezeWindow().AsDuration())
		}
		state := "stopped"
		if plan.GetLive() {
			state = "running"
		}
		p.fields(
			"Snapshot", name,
			"VM", state,
			"Consistency", "up to "+word(plan.GetConsistency()),
			"Freeze window", window,
		)
		p.line("")
		p.line("Disks:")
		var rows [][]string
		for _, d := range plan.GetDisks() {
			row := []string{d.GetDevice(), size(d.GetVirtualSize()), "excluded"}
			if !d.GetExcluded() {
				row = []string{
					d.GetDevice(), size(d.GetVirtualSize()),
					fmt.Sprintf("overlay in %s", d.GetDirectory()), size(d.GetFree()) + " free", "settles " + settleText(d.GetSettle()),
				}
			}
			rows = append(rows, row)
		}
		p.columns("  ", rows)
		memoryPlan(p, plan.GetMemory())
		warningList(p, plan.GetWarnings())
		blockerList(p, plan.GetBlockers())
		return nil
	}}
}

func settleText(settle string) string {
	switch settle {
	case "convert":
		return "by converting, when the VM has stopped"
	case "device":
		return "by writing to the block device, when the VM has stopped"
	case "live":
		return "at once"
	default:
		return settle
	}
}

// blockerList shows why what is planned would be refused.
func blockerList(p page, blockers []*vmsnapv1.Error) {
	if len(blockers) > 0 {
		p.line("")
		p.line("Would be refused:")
	}
	for _, b := range blockers {
		p.advice(b.GetMessage(), b.GetHint())
	}
}
