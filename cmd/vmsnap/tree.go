package main

import (
	"slices"
	"strings"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// branch is a line of a tree with the lines below it. Its cells are aligned over
// the whole tree.
type branch struct {
	label string
	cells []string
	below []*branch
}

// here marks the running state.
const here = "● you are here"

// treeResult draws the snapshots of each VM as a tree, the oldest first.
func treeResult(msg *vmsnapv1.ListSnapshotsResponse) result {
	r := snapshotsResult(msg)
	r.human = func(p page, _ bool) error {
		var order []string
		ofVM := map[string][]*vmsnapv1.Snapshot{}
		for _, s := range slices.Backward(msg.GetSnapshots()) {
			if ofVM[s.GetVmId()] == nil {
				order = append(order, s.GetVmId())
			}
			ofVM[s.GetVmId()] = append(ofVM[s.GetVmId()], s)
		}
		slices.SortStableFunc(order, func(x, y string) int {
			return strings.Compare(ofVM[x][0].GetVmName(), ofVM[y][0].GetVmName())
		})
		var rows [][]string
		if p.header {
			rows = append(rows, []string{"SNAPSHOT", "CONSISTENCY", "TAKEN", "EXCLUSIVE", "NOTES"})
		}
		for _, id := range order {
			vm := vmBranch(p, ofVM[id])
			rows = append(append(rows, []string{vm.label}), forked(vm.below, "")...)
		}
		p.columns("", rows)
		return nil
	}
	return r
}

// vmBranch is a VM with its snapshots, which come with the oldest first.
func vmBranch(p page, snapshots []*vmsnapv1.Snapshot) *branch {
	vm := &branch{label: snapshots[0].GetVmName()}
	names := map[string]string{}
	branches := map[string]*branch{"": vm}
	for _, s := range snapshots {
		names[s.GetId()] = s.GetName()
		branches[s.GetId()] = &branch{label: s.GetName()}
	}
	current := &branch{label: here}
	home := vm
	for _, s := range snapshots {
		b := branches[s.GetId()]
		b.cells = []string{
			consistencyText(s), p.ago(s.GetCreated()), exclusiveSize(s.GetSpace()), strings.Join(snapshotNotes(s, names), ", "),
		}
		above := branches[s.GetPosition().GetParentId()]
		if above == nil || descends(snapshots, s.GetPosition().GetParentId(), s.GetId()) {
			above = vm
		}
		above.below = append(above.below, b)
		if h := s.GetHere(); h != nil {
			home = b
			if h.GetPreview() {
				current.label += ", in a preview"
			}
			if strays := strayNotes(h.GetStrays(), names); len(strays) > 0 {
				current.cells = []string{"", "", "", strings.Join(strays, ", ")}
			}
		}
	}
	home.below = append(home.below, current)
	return vm
}

// descends reports whether a snapshot stands below another one, as it never
// should where that is its child.
func descends(snapshots []*vmsnapv1.Snapshot, id, from string) bool {
	parents := map[string]string{}
	for _, s := range snapshots {
		parents[s.GetId()] = s.GetPosition().GetParentId()
	}
	for range snapshots {
		if id == from {
			return true
		}
		id = parents[id]
	}
	return false
}

// snapshotNotes are what is special about a snapshot.
func snapshotNotes(s *vmsnapv1.Snapshot, names map[string]string) []string {
	var notes []string
	if s.GetAutomatic() {
		notes = append(notes, "automatic")
	}
	if s.GetTemplate() {
		notes = append(notes, "template")
	}
	if m := s.GetMemory(); m != nil {
		notes = append(notes, "memory "+size(m.GetSize()))
	}
	return append(notes, strayNotes(s.GetPosition().GetStrays(), names)...)
}

// strayNotes tell of disks that do not fit the tree.
func strayNotes(strays []*vmsnapv1.Stray, names map[string]string) []string {
	var notes []string
	for _, s := range strays {
		notes = append(notes, s.GetDevice()+" from "+names[s.GetSnapshotId()])
	}
	return notes
}

// rowsOf draws a branch: first stands before its own label, rest before those of
// the lines below it. What follows alone on a snapshot stands right below it, so
// that only branches are indented.
func rowsOf(b *branch, first, rest string) [][]string {
	rows := [][]string{append([]string{first + b.label}, b.cells...)}
	if len(b.below) == 1 {
		return append(rows, rowsOf(b.below[0], rest, rest)...)
	}
	return append(rows, forked(b.below, rest)...)
}

// forked draws branches that begin at one point.
func forked(branches []*branch, before string) (rows [][]string) {
	for i, b := range branches {
		if i < len(branches)-1 {
			rows = append(rows, rowsOf(b, before+"├─ ", before+"│  ")...)
		} else {
			rows = append(rows, rowsOf(b, before+"└─ ", before+"   ")...)
		}
	}
	return rows
}
