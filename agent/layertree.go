package agent

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/vmsnap/vmsnap/agent/catalog"
)

// MergeWay is how a layer goes that nothing needs by itself any more.
type MergeWay string

// The ways. Which of MergeCommit and MergeStream it is, is up to the bytes that
// each moves, and to what depends on the two layers.
const (
	MergeRemove  MergeWay = "remove"  // nothing lies on it: its file goes
	MergeCommit  MergeWay = "commit"  // what lies on it is copied down into its file
	MergeStream  MergeWay = "stream"  // what it holds is copied up into what lies on it, and its file goes
	MergeFlatten MergeWay = "flatten" // what it holds is copied up into one of several layers on it, which needs it no more
)

// layerTree is what deleting snapshots is planned on: the layers of all disks of
// a VM, and what stands in the way. It is of one moment, and for one goroutine.
//
// A layer goes when it is no restore point of a snapshot that stays, nothing
// writes to it, and at most one layer lies on it. What is left of a merge is one
// file that reads as the upper of the two did; it keeps the upper's id, so that
// whatever refers to that need not be changed.
type layerTree struct {
	disks    []catalog.Disk
	layers   map[string]catalog.Layer
	children map[string][]string // ids, sorted
	needed   map[string]bool     // restore points of snapshots that stay
	active   map[string]catalog.Disk
	fixed    map[string]string   // layers that may be neither written to nor removed, and why
	held     map[string][]string // what somebody outside has on a layer, or above it: nothing is done to it
	kept     map[string]keptLayer

	keepLeaves bool // layers that nobody asked for go only by a merge
}

// keptLayer is why a layer stays that no snapshot needs any more.
type keptLayer struct {
	Reason     string
	Dependants []string // what lies on it; none when something else keeps it
	Branches   bool     // they are layers, by id
}

// newLayerTree puts together what the catalog knows. gone are the ids of the
// snapshots that are to go.
func newLayerTree(disks []catalog.Disk, layers []catalog.Layer, snapshots []catalog.Snapshot, gone map[string]bool) *layerTree {
	t := &layerTree{
		disks: disks, layers: map[string]catalog.Layer{}, children: map[string][]string{}, needed: map[string]bool{},
		active: map[string]catalog.Disk{}, fixed: map[string]string{}, held: map[string][]string{}, kept: map[string]keptLayer{},
	}
	for _, l := range layers {
		t.layers[l.ID] = l
		if l.Foreign {
			t.fixed[l.ID] = "it was there before vmsnapd first saw the disk"
		}
		if l.Device != "" {
			t.fixed[l.ID] = "it is a block device"
		}
		if l.Parent != "" {
			t.children[l.Parent] = append(t.children[l.Parent], l.ID)
		}
	}
	for _, children := range t.children {
		slices.Sort(children)
	}
	for _, d := range disks {
		if d.ActiveLayer != "" {
			t.active[d.ActiveLayer] = d
		}
		if d.SettleNeeded && !d.Removed {
			for _, l := range layers {
				if l.DiskID == d.ID {
					t.fixed[l.ID] = "the launch path of its disk is settled when the VM has stopped"
				}
			}
		}
	}
	for _, s := range snapshots {
		for _, d := range s.Disks {
			if !gone[s.ID] && d.LayerID != "" {
				t.needed[d.LayerID] = true
			}
		}
	}
	return t
}

// hold notes what somebody outside has on a layer. Who has it open has all layers
// below open too.
func (t *layerTree) hold(id string, names []string) {
	n := 0
	for l := t.layers[id]; l.ID != "" && n <= len(t.layers); l = t.layers[l.Parent] {
		for _, name := range names {
			if !slices.Contains(t.held[l.ID], name) {
				t.held[l.ID] = append(t.held[l.ID], name)
			}
		}
		n++
	}
}

// merge is one layer on its way out.
type merge struct {
	lower string // the layer that goes
	upper string // the one that lies on it; empty for MergeRemove
	way   MergeWay
	cost  mergeCost
	only  string // why it could not go the other way; empty when it could
}

// mergeCost is what merging two layers takes, in bytes of data.
type mergeCost struct {
	Low                  uint64 // that the lower one holds
	Down, Up             uint64 // that are copied, by committing and by streaming
	RoomBelow, RoomAbove uint64 // that the file which is written to grows by
	Freed                uint64 // that the two hold twice
}

// costs measures two layers that lie on each other.
type costs func(lower, upper catalog.Layer) (mergeCost, error)

// next chooses the next merge for layers that are to go: those that snapshots
// were restored from, which are true in wanted, and those that nothing needs since
// an earlier deletion or with this one. ok is false when all that can go have gone;
// those that stay are in kept.
//
// What can be removed goes first, for it costs nothing and may leave a branch
// with one layer on it. Of the others the lowest comes first, so that nothing is
// copied twice on its way down.
func (t *layerTree) next(wanted map[string]bool, flatten bool, measure costs) (m merge, ok bool, err error) {
	wanted = t.withAbandoned(wanted)
	for _, id := range t.order(wanted) {
		if _, kept := t.kept[id]; !kept && t.idle(id) && len(t.children[id]) == 0 && t.fixed[id] == "" && len(t.held[id]) == 0 {
			return merge{lower: id, way: MergeRemove}, true, nil
		}
	}
	for _, id := range t.order(wanted) {
		if _, kept := t.kept[id]; kept || !t.idle(id) {
			continue
		}
		if held := t.held[id]; len(held) > 0 || t.fixed[id] != "" {
			t.kept[id] = keptLayer{Reason: cmp.Or(t.fixed[id], strings.Join(held, ", ")+" lies on it"), Dependants: held}
			continue
		}
		children := t.children[id]
		if len(children) > 1 && (!flatten || !wanted[id]) {
			t.kept[id] = keptLayer{Reason: fmt.Sprintf("%d layers lie on it", len(children)), Dependants: children, Branches: true}
			continue
		}
		m, err := t.choose(id, children, measure)
		if err != nil {
			return merge{}, false, err
		}
		if m.way != "" {
			return m, true, nil
		}
	}
	return merge{}, false, nil
}

// withAbandoned adds the layers that nothing needs and nobody asked for. A file that
// the agent has not made is never among those that would go without a merge.
func (t *layerTree) withAbandoned(wanted map[string]bool) map[string]bool {
	all := map[string]bool{}
	maps.Copy(all, wanted)
	for id, l := range t.layers {
		if _, asked := all[id]; !asked && t.idle(id) && (len(t.children[id]) > 0 || l.Operation != "" && !t.keepLeaves) {
			all[id] = false
		}
	}
	return all
}

// order returns the layers that are to go, those below before those above.
func (t *layerTree) order(wanted map[string]bool) []string {
	ids := sortedKeys(wanted)
	slices.SortStableFunc(ids, func(x, y string) int { return cmp.Compare(t.depth(x), t.depth(y)) })
	return slices.DeleteFunc(ids, func(id string) bool { return t.layers[id].ID == "" })
}

// depth is how many layers lie below one.
func (t *layerTree) depth(id string) (n int) {
	for l := t.layers[id]; l.Parent != "" && n <= len(t.layers); l = t.layers[l.Parent] {
		n++
	}
	return n
}

// idle reports whether nothing needs a layer by itself.
func (t *layerTree) idle(id string) bool {
	_, active := t.active[id]
	return !active && !t.needed[id]
}

// choose decides how a layer goes on which one or several lie. A merge without a
// way says that it stays, which is noted.
func (t *layerTree) choose(id string, children []string, measure costs) (merge, error) {
	lower := t.layers[id]
	if len(children) > 1 {
		// The one that costs the most stays for last: it may be committed.
		var best merge
		for _, c := range children {
			cost, err := measure(lower, t.layers[c])
			if err != nil {
				return merge{}, err
			}
			if why := t.noStream(c); why != "" {
				continue
			}
			if best.upper == "" || cost.RoomAbove < best.cost.RoomAbove {
				best = merge{lower: id, upper: c, way: MergeFlatten, cost: cost}
			}
		}
		if best.upper == "" {
			t.kept[id] = keptLayer{Reason: "none of the layers that lie on it can be written to", Dependants: children, Branches: true}
		}
		return best, nil
	}
	upper := children[0]
	cost, err := measure(lower, t.layers[upper])
	if err != nil {
		return merge{}, err
	}
	m := merge{lower: id, upper: upper, cost: cost}
	noCommit, noStream := t.noCommit(id, upper), t.noStream(upper)
	switch {
	case noCommit != "" && noStream != "":
		t.kept[id] = keptLayer{Reason: noStream}
	case noCommit != "", noStream == "" && cost.Up < cost.Down:
		m.way, m.only = MergeStream, noCommit
	default:
		m.way, m.only = MergeCommit, noStream
	}
	return m, nil
}

// noCommit says why a layer cannot be committed into the one below it.
func (t *layerTree) noCommit(lower, upper string) string {
	l, u := t.layers[lower], t.layers[upper]
	disk, active := t.active[upper]
	switch {
	case t.fixed[upper] != "":
		return t.fixed[upper]
	case len(t.children[upper]) > 1:
		return "several layers lie on " + u.Path
	case len(t.children[upper]) == 1 && t.fixed[t.children[upper][0]] != "":
		return t.fixed[t.children[upper][0]]
	case l.VirtualSize != u.VirtualSize:
		return "the two are of different sizes"
	case active && disk.Removed:
		return "its disk was taken from the VM"
	case active && disk.LaunchFormat != "" && disk.LaunchFormat != l.Format:
		return "the launch command declares the format " + disk.LaunchFormat
	}
	return ""
}

// noStream says why what lies below a layer cannot be copied into it.
func (t *layerTree) noStream(upper string) string { return t.fixed[upper] }

// writes returns the layer by which it is told who does a merge: a QEMU that runs
// on the lower layer of two need not run on the upper one.
func (m merge) writes() string { return cmp.Or(m.upper, m.lower) }

// apply changes the tree as a merge changes the layers.
func (t *layerTree) apply(m merge) {
	lower := t.layers[m.lower]
	if m.upper != "" {
		upper := t.layers[m.upper]
		if m.way == MergeCommit {
			upper.Path, upper.Format, upper.Dev, upper.Ino, upper.Operation = lower.Path, lower.Format, lower.Dev, lower.Ino, lower.Operation
		}
		upper.Parent = lower.Parent
		t.layers[m.upper] = upper
	}
	without := func(of, child string) {
		left := slices.DeleteFunc(slices.Clone(t.children[of]), func(c string) bool { return c == child })
		if t.children[of] = left; len(left) == 0 {
			delete(t.children, of)
		}
	}
	if m.upper != "" {
		without(m.lower, m.upper)
		if lower.Parent != "" {
			t.children[lower.Parent] = append(slices.Clone(t.children[lower.Parent]), m.upper)
			slices.Sort(t.children[lower.Parent])
		}
	}
	if m.way == MergeFlatten {
		return
	}
	if lower.Parent != "" {
		without(lower.Parent, m.lower)
	}
	delete(t.layers, m.lower)
}
