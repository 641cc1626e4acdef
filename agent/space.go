package agent

import (
	"slices"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
)

// SnapshotSpace is what a snapshot takes, in bytes. Data is counted in parts of
// the virtual disks, as the layers hold them: the tables of a qcow2 are left out,
// and what is compressed counts in full.
type SnapshotSpace struct {
	Exclusive uint64 // what deleting it gives back, its memory included
	Shared    uint64 // what it needs as well, and others too
	Memory    uint64 // its memory file, on its file system
	Measured  time.Time
}

// VMSpace is what the layers and saved memory of a VM take, in bytes that are
// counted as SnapshotSpace counts them.
type VMSpace struct {
	Layers      uint64 // data of all layers that the agent may write, branches included
	Foreign     uint64 // data of the layers below them, which other VMs may share
	Memory      uint64 // the memory files of all snapshots
	Reclaimable uint64 // what deleting all snapshots would give back, memory included
	// Incomplete means that a layer could not be read, and is left out.
	Incomplete bool
	Measured   time.Time
}

// yardstick measures files. Its errors leave a file out of the sums.
type yardstick interface {
	data(catalog.Layer) (uint64, error)                 // what a layer holds by itself
	overlap(lower, upper catalog.Layer) (uint64, error) // what of it another one hides
	merged(lowestFirst []catalog.Layer) (uint64, error) // what is left when all are merged
	file(path string) (allocated uint64, err error)     // on the file system
}

// holdings are a VM's layers and who needs them.
type holdings struct {
	layers    map[string]catalog.Layer
	children  map[string][]string // layers that lie on a layer, other VMs' included
	points    map[string]int      // restore points that a layer is
	active    map[string]bool
	snapshots []catalog.Snapshot
	order     []catalog.Layer
}

// newHoldings puts together what the catalog knows. dependants are layers of
// other VMs that lie on this one's.
func newHoldings(disks []catalog.Disk, layers, dependants []catalog.Layer, snapshots []catalog.Snapshot) *holdings {
	h := &holdings{
		layers: map[string]catalog.Layer{}, children: map[string][]string{}, points: map[string]int{},
		active: map[string]bool{}, snapshots: snapshots, order: layers,
	}
	for _, l := range layers {
		h.layers[l.ID] = l
	}
	for _, l := range append(layers[:len(layers):len(layers)], dependants...) {
		if l.Parent != "" {
			h.children[l.Parent] = append(h.children[l.Parent], l.ID)
		}
	}
	for _, d := range disks {
		h.active[d.ActiveLayer] = true
	}
	for _, s := range snapshots {
		for _, d := range s.Disks {
			h.points[d.LayerID]++
		}
	}
	return h
}

// freed is what deleting a restore point gives back on one disk.
//
// A layer that something else needs gives back nothing: another snapshot, a VM
// that writes to it, or two branches, of which each may need another part. One
// that nothing lies on goes whole, and the layer below it goes or is merged in
// turn when it was kept for this branch only. Any other one is merged with the
// layer that lies on it, which gives back what that one hides.
func (h *holdings) freed(id string, y yardstick) (uint64, error) {
	var sum uint64
	gone, points := "", 1 // the child and the restore points that are about to go
	for {
		l, known := h.layers[id]
		if !known || l.Foreign || h.active[id] || h.points[id] > points {
			return sum, nil
		}
		left := slices.DeleteFunc(slices.Clone(h.children[id]), func(child string) bool { return child == gone })
		switch len(left) {
		case 0:
			data, err := y.data(l)
			if err != nil {
				return 0, err
			}
			sum += data
			gone, points, id = id, 0, l.Parent
		case 1:
			child, known := h.layers[left[0]]
			if !known { // another VM's, with which nothing is merged
				return sum, nil
			}
			hidden, err := y.overlap(l, child)
			return sum + hidden, err
		default:
			return sum, nil
		}
	}
}

// snapshot is what one snapshot takes. What cannot be measured makes its number
// unknown.
func (h *holdings) snapshot(s catalog.Snapshot, y yardstick) (SnapshotSpace, error) {
	var space SnapshotSpace
	var needed uint64
	for _, d := range s.Disks {
		if d.Excluded || d.LayerID == "" {
			continue
		}
		freed, err := h.freed(d.LayerID, y)
		if err != nil {
			return space, err
		}
		space.Exclusive += freed
		for l := h.layers[d.LayerID]; l.ID != ""; l = h.layers[l.Parent] {
			data, err := y.data(l)
			if err != nil {
				return space, err
			}
			needed += data
		}
	}
	space.Shared = needed - min(space.Exclusive, needed)
	if s.Memory != nil {
		memory, err := y.file(s.Memory.Path)
		if err != nil {
			return space, err
		}
		space.Memory = memory
		space.Exclusive += memory
	}
	return space, nil
}

// vm is what the whole VM takes. What cannot be measured is left out.
func (h *holdings) vm(disks []catalog.Disk, y yardstick) VMSpace {
	var space VMSpace
	note := func(n uint64, err error) uint64 {
		if err != nil {
			space.Incomplete = true
			return 0
		}
		return n
	}
	for _, l := range h.order {
		data := note(y.data(l))
		if l.Foreign {
			space.Foreign += data
		} else {
			space.Layers += data
		}
	}
	var stays uint64
	for _, d := range disks {
		var chain []catalog.Layer
		for l := h.layers[d.ActiveLayer]; l.ID != "" && !l.Foreign; l = h.layers[l.Parent] {
			chain = append(chain, l)
		}
		slices.Reverse(chain)
		if len(chain) > 0 {
			stays += note(y.merged(chain))
		}
	}
	for _, s := range h.snapshots {
		if s.Memory != nil {
			space.Memory += note(y.file(s.Memory.Path))
		}
	}
	if !space.Incomplete { // else the sums have nothing to do with each other
		space.Reclaimable = space.Layers - min(stays, space.Layers) + space.Memory
	}
	return space
}
