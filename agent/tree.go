package agent

import (
	"slices"

	"github.com/vmsnap/vmsnap/agent/catalog"
)

// Position says where a state of a VM stands in the tree of its snapshots: a
// snapshot, or what the VM's disks hold now.
//
// The layers of each disk are a tree, and a VM with several disks has several.
// What is shown is one tree whose nodes are snapshots. A state descends from a
// snapshot on a disk when the layer of the one lies on that of the other,
// directly or not. Its parent is the last taken snapshot from which it descends
// on all disks that both of them have: a disk that either leaves out says
// nothing. When there is none, it is the one from which it descends on the most
// disks, the last taken of several. A state that descends from none is a root.
//
// One tree cannot say everything of disks that went different ways, as after a
// restore of some of them. A disk whose own nearest snapshot is neither the
// parent nor one above it is a stray.
type Position struct {
	Parent string // the snapshot's id; empty for a root
	Strays []Stray
}

// Stray is a disk that went another way than the others.
type Stray struct {
	Device   string
	Snapshot string // the id of the one that it descends from most nearly
}

// arrange finds the position of each snapshot of a VM, by id, and that of its
// disks as they are now. The snapshots come with the newest first.
func arrange(snapshots []catalog.Snapshot, layers []catalog.Layer, disks []catalog.Disk) (map[string]Position, Position) {
	t := &arrangement{parents: map[string]string{}, points: map[string][]int{}, positions: map[string]Position{}, snapshots: snapshots}
	for _, l := range layers {
		t.parents[l.ID] = l.Parent
	}
	for i, s := range snapshots {
		for _, d := range s.Disks {
			if d.LayerID != "" {
				t.points[d.LayerID] = append(t.points[d.LayerID], i)
			}
		}
	}
	now := catalog.Snapshot{}
	for _, d := range disks {
		if !d.Removed && d.ActiveLayer != "" {
			now.Disks = append(now.Disks, catalog.SnapshotDisk{DiskID: d.ID, Device: d.Device, LayerID: d.ActiveLayer})
		}
	}
	lines := make([][][]int, len(snapshots))
	for i, s := range slices.Backward(snapshots) {
		lines[i] = t.lines(s, i)
		t.positions[s.ID] = Position{Parent: t.parent(s, lines[i])}
	}
	for i, s := range snapshots {
		t.positions[s.ID] = t.withStrays(s, t.positions[s.ID].Parent, lines[i])
	}
	line := t.lines(now, -1)
	return t.positions, t.withStrays(now, t.parent(now, line), line)
}

// arrangement is what arrange works on. Snapshots are known by their place in the
// list.
type arrangement struct {
	snapshots []catalog.Snapshot
	parents   map[string]string // of layers
	points    map[string][]int  // the snapshots that can be restored from a layer, the newest first
	positions map[string]Position
}

// lines returns, for each disk of a state, the snapshots from which it descends
// there, the nearest first.
func (t *arrangement) lines(s catalog.Snapshot, at int) [][]int {
	lines := make([][]int, len(s.Disks))
	for n, d := range s.Disks {
		layer := d.LayerID
		for range len(t.parents) + 1 { // no more, whatever the catalog says
			if layer == "" {
				break
			}
			for _, p := range t.points[layer] {
				if p > at { // of those of its own layer, the ones that were taken before it
					lines[n] = append(lines[n], p)
				}
			}
			layer = t.parents[layer]
		}
	}
	return lines
}

// parent chooses the parent of a state.
func (t *arrangement) parent(s catalog.Snapshot, lines [][]int) string {
	fits := map[int]int{} // on how many disks it descends from a snapshot
	for _, line := range lines {
		for _, p := range line {
			fits[p]++
		}
	}
	best, bestMisses := -1, 0
	for p, n := range fits {
		misses := t.shared(s, p) - n
		better := best < 0
		if !better && (misses == 0) == (bestMisses == 0) {
			better = misses == 0 && p < best || misses > 0 && (n > fits[best] || n == fits[best] && p < best)
		} else if !better {
			better = misses == 0
		}
		if better {
			best, bestMisses = p, misses
		}
	}
	if best < 0 {
		return ""
	}
	return t.snapshots[best].ID
}

// shared counts the disks that both a state and a snapshot have.
func (t *arrangement) shared(s catalog.Snapshot, p int) (n int) {
	for _, d := range s.Disks {
		if d.LayerID != "" && slices.ContainsFunc(t.snapshots[p].Disks, func(o catalog.SnapshotDisk) bool {
			return o.DiskID == d.DiskID && o.LayerID != ""
		}) {
			n++
		}
	}
	return n
}

// withStrays adds the disks that went another way to a position.
func (t *arrangement) withStrays(s catalog.Snapshot, parent string, lines [][]int) Position {
	above := map[string]bool{"": true}
	for id := parent; !above[id]; id = t.positions[id].Parent {
		above[id] = true
	}
	p := Position{Parent: parent}
	for n, line := range lines {
		if len(line) > 0 && !above[t.snapshots[line[0]].ID] {
			p.Strays = append(p.Strays, Stray{s.Disks[n].Device, t.snapshots[line[0]].ID})
		}
	}
	return p
}

// place adds to views of a VM's snapshots where they stand. all are its
// snapshots, the newest first. previewed says that its disks are a trial state.
func (v *vm) place(views []*SnapshotView, all []catalog.Snapshot, previewed bool) {
	v.mu.Lock()
	layers, disks := v.layers, v.disks
	v.mu.Unlock()
	positions, here := arrange(all, layers, disks)
	for _, view := range views {
		view.Position = positions[view.ID]
		if here.Parent == view.ID {
			view.Here, view.Previewed = &here, previewed
		}
	}
}
