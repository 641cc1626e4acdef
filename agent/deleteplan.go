package agent

import (
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/blockdev"
)

// DeleteRequest asks for snapshots of one VM to be deleted: those that are named,
// or those of a VM that have all the labels, and are old enough.
type DeleteRequest struct {
	Snapshots []string          // VM/NAME or id
	VM        string            // when none is named
	Labels    map[string]string // that they must have
	OlderThan time.Duration     // 0: of any age
	All       bool              // without labels and age
	// Flatten gives each branch that lies on a layer of theirs its own copy of what
	// it needs of it.
	Flatten bool
	// KeepLayers deletes a snapshot although several branches, or somebody outside,
	// lie on a layer of it: the layer stays for as long as they do.
	KeepLayers bool
	Speed      uint64 // bytes a second at most; 0: as the settings say

	RequestID string `json:"-"`
	UID       uint32 `json:"-"`
}

// DeletePlan is what deleting snapshots would do.
type DeletePlan struct {
	VM        string
	Snapshots []string // names
	Live      bool     // the VM runs
	Merges    []PlanMerge
	Kept      []PlanKept // layers that stay although no snapshot needs them any more
	Memory    uint64     // bytes of the memory files that go
	Moved     uint64     // bytes that are copied
	Freed     uint64     // bytes that come back, memory included
	Warnings  []op.Warning
	Blockers  []*fault.Error // why it would be refused
}

// PlanMerge is one layer in the plan of a deletion.
type PlanMerge struct {
	Device string
	Way    MergeWay
	Layer  string // path of the layer that goes, or that is copied from
	Into   string // path of the file that is written to; empty for MergeRemove
	Live   bool   // by QEMU, while the disk runs
	Bytes  uint64 // that are copied
	Other  uint64 // that would be by MergeStream instead of MergeCommit, or the other way round
	Only   string // why that is impossible; empty when it is not
	Room   uint64 // that the file which is written to grows by
}

// PlanKept is a layer that stays without a snapshot.
type PlanKept struct {
	Device     string
	Layer      string // path
	Reason     string
	Dependants []string // what lies on it
}

// PlanDelete looks at everything that deleting snapshots depends on, and changes
// nothing.
func (a *Agent) PlanDelete(ctx context.Context, req DeleteRequest) (DeletePlan, error) {
	v, chosen, err := a.toDelete(ctx, req)
	if err != nil {
		return DeletePlan{}, err
	}
	register := v.changing.TryRLock()
	if register {
		defer v.changing.RUnlock()
	}
	plan, err := a.planDelete(ctx, v, req, chosen, register)
	if id, busy := a.ops.Running(v.id); busy && err == nil {
		plan.Blockers = append(plan.Blockers, fault.New(fault.Busy, "VM %s: operation %s is running", v.name(), id))
	}
	return plan, err
}

// toDelete finds the VM and the snapshots that a request is for.
func (a *Agent) toDelete(ctx context.Context, req DeleteRequest) (*vm, []catalog.Snapshot, error) {
	filtered := len(req.Labels) > 0 || req.OlderThan > 0 || req.All
	switch {
	case len(req.Snapshots) > 0 && (filtered || req.VM != ""):
		return nil, nil, fault.New(fault.Usage, "snapshots are either named, or chosen among those of a VM")
	case len(req.Snapshots) == 0 && (req.VM == "" || !filtered):
		return nil, nil, fault.New(fault.Usage, "name the snapshots to delete, or choose them by label, by age, or all of a VM")
	case req.OlderThan < 0:
		return nil, nil, fault.New(fault.Usage, "an age of %s is negative", req.OlderThan)
	case len(req.Snapshots) == 0:
		v, err := a.find(req.VM)
		if err != nil {
			return nil, nil, err
		}
		chosen, err := a.matching(ctx, v, req)
		return v, chosen, err
	}
	var v *vm
	var chosen []catalog.Snapshot
	for _, ref := range req.Snapshots {
		s, of, err := a.snapshotOf(ctx, ref)
		if err != nil {
			return nil, nil, err
		}
		if v != nil && of != v {
			return nil, nil, fault.New(fault.Usage, "snapshots of two VMs, %s and %s, are named", v.name(), of.name()).WithHint("name those of one VM at a time")
		}
		v = of
		if !slices.ContainsFunc(chosen, func(c catalog.Snapshot) bool { return c.ID == s.ID }) {
			chosen = append(chosen, s)
		}
	}
	return v, chosen, nil
}

// matching returns the snapshots of a VM that a request chooses.
func (a *Agent) matching(ctx context.Context, v *vm, req DeleteRequest) ([]catalog.Snapshot, error) {
	all, err := a.catalog.Snapshots(ctx, v.id)
	if err != nil {
		return nil, err
	}
	before := a.clock().Add(-req.OlderThan)
	chosen := slices.DeleteFunc(all, func(s catalog.Snapshot) bool {
		return s.Template || !hasLabels(s.Labels, req.Labels) || req.OlderThan > 0 && s.Created.After(before)
	})
	if len(chosen) == 0 {
		return nil, fault.New(fault.NotFound, "VM %s has no such snapshot", v.name()).WithHint("vmsnap snapshot list %s shows its snapshots", v.name())
	}
	return chosen, nil
}

// planDelete plans the deletion of snapshots. The error is for what makes looking
// impossible; reasons to refuse are in the plan.
func (a *Agent) planDelete(ctx context.Context, v *vm, req DeleteRequest, chosen []catalog.Snapshot, register bool) (DeletePlan, error) {
	plan := DeletePlan{VM: v.name()}
	refuse := func(err *fault.Error) { plan.Blockers = append(plan.Blockers, err) }
	stand, err := a.standOf(ctx, v, register)
	if err != nil {
		return plan, err
	}
	plan.Live = stand.run != nil
	gone, wanted := map[string]bool{}, map[string]bool{}
	for _, s := range chosen {
		if err := a.checkDeletable(ctx, s); fault.Of(err) == fault.Denied {
			refuse(fault.New(fault.Denied, "%w", err).WithHint("%s", fault.Hint(err)))
		} else if err != nil && fault.Of(err) != fault.HasDependants { // which the plan tells of all
			return plan, err
		}
		gone[s.ID] = true
		plan.Snapshots = append(plan.Snapshots, s.Name)
		for _, d := range s.Disks {
			if d.LayerID != "" {
				wanted[d.LayerID] = true
			}
		}
		if s.Memory != nil {
			if info, err := blockdev.StatPath(s.Memory.Path); err == nil {
				plan.Memory += info.Allocated
			}
		}
	}
	plan.Freed = plan.Memory
	t, snapshots, err := a.treeOf(ctx, v, stand, gone)
	if err != nil {
		return plan, err
	}
	if err := stand.check(t, wanted); err != nil {
		refuse(fault.New(kindOf(err), "VM %s: %w", v.name(), err).WithHint("%s", fault.Hint(err)))
		return plan, nil
	}
	rooms := map[string]*room{}
	s := newStacks(stand.prefix())
	for {
		m, ok, err := t.next(wanted, req.Flatten, s.costs(ctx))
		if err != nil {
			return plan, fmt.Errorf("VM %s: %w", v.name(), err)
		}
		if !ok {
			a.planKept(&plan, t, snapshots, wanted, req, refuse)
			break
		}
		s.add(ctx, &plan, t, m, stand, rooms)
		t.apply(m)
		s.apply(m)
	}
	for _, dir := range slices.Sorted(maps.Keys(rooms)) {
		if err := a.roomFor(stand.prefix()+dir, rooms[dir].peak); err != nil {
			refuse(fault.New(kindOf(err), "VM %s: %w", v.name(), err))
		}
	}
	return plan, nil
}

// planKept notes the layers that stay, and refuses what they stand in the way of.
func (a *Agent) planKept(plan *DeletePlan, t *layerTree, snapshots []catalog.Snapshot, primary map[string]bool, req DeleteRequest, refuse func(*fault.Error)) {
	for _, id := range slices.Sorted(maps.Keys(t.kept)) {
		if !primary[id] {
			continue // it has been there before
		}
		l, k := t.layers[id], t.kept[id]
		kept := PlanKept{Device: deviceOf(t.disks, l.DiskID), Layer: l.Path, Reason: k.Reason, Dependants: k.Dependants}
		if k.Branches {
			kept.Dependants = append(t.dependantsOf(id, snapshots), t.held[id]...)
		}
		plan.Kept = append(plan.Kept, kept)
		if len(kept.Dependants) == 0 || req.KeepLayers {
			continue
		}
		err := fault.New(fault.HasDependants, "VM %s: disk %s: %s lie on the layer %s", plan.VM, kept.Device, strings.Join(kept.Dependants, ", "), l.Path)
		if !k.Branches {
			refuse(err.WithHint("flatten them or remove them; --keep-layers deletes the snapshot and keeps the layer for as long as something lies on it"))
			continue
		}
		refuse(err.WithHint("--flatten copies into each what it needs; --keep-layers keeps the layer for as long as they lie on it"))
	}
}

// treeOf reads the layers of a VM as they are now, for a deletion of snapshots.
func (a *Agent) treeOf(ctx context.Context, v *vm, at *stand, gone map[string]bool) (*layerTree, []catalog.Snapshot, error) {
	disks, layers, snapshots, err := a.records(ctx, v.id)
	if err != nil {
		return nil, nil, err
	}
	t := newLayerTree(disks, layers, snapshots, gone)
	held, err := a.outsiders(ctx, v, layers, at.prefix())
	if err != nil {
		return nil, nil, fmt.Errorf("VM %s: look for what lies on its layers: %w", v.name(), err)
	}
	for _, id := range slices.Sorted(maps.Keys(held)) {
		t.hold(id, held[id])
	}
	for id, l := range t.layers {
		if at.prefix() != "" && !at.inUse(t, id) && t.fixed[id] == "" {
			t.fixed[id] = "QEMU has a file system tree of its own, in which qemu-img cannot work on " + l.Path
		}
	}
	return t, snapshots, nil
}

// stacks are the images that the layers of a plan are made of: after a merge that
// is only planned a layer is what two or more of them hold together.
type stacks struct {
	prefix string
	images map[string][]blockdev.Image // by layer id, the lowest first
	known  map[string]uint64
}

func newStacks(prefix string) *stacks {
	return &stacks{prefix: prefix, images: map[string][]blockdev.Image{}, known: map[string]uint64{}}
}

// of returns the images of a layer.
func (s *stacks) of(l catalog.Layer) []blockdev.Image {
	if s.images[l.ID] == nil {
		s.images[l.ID] = []blockdev.Image{{Path: s.prefix + l.Path, Format: l.Format}}
	}
	return s.images[l.ID]
}

// data returns how much data images hold together.
func (s *stacks) data(ctx context.Context, images []blockdev.Image) (uint64, error) {
	key := fmt.Sprint(images)
	n, known := s.known[key]
	if !known {
		var err error
		if n, err = blockdev.MergedBytes(ctx, images); err != nil {
			return 0, err
		}
		s.known[key] = n
	}
	return n, nil
}

// costs measures merges by what the images hold now.
func (s *stacks) costs(ctx context.Context) costs {
	return func(lower, upper catalog.Layer) (mergeCost, error) {
		below, above := s.of(lower), s.of(upper)
		down, err := s.data(ctx, above)
		if err != nil {
			return mergeCost{}, err
		}
		low, err := s.data(ctx, below)
		if err != nil {
			return mergeCost{}, err
		}
		both, err := s.data(ctx, slices.Concat(below, above))
		if err != nil {
			return mergeCost{}, err
		}
		up := both - min(both, down)
		return mergeCost{Low: low, Down: down, Up: up, RoomBelow: both - min(both, low), RoomAbove: up, Freed: low + down - min(both, low+down)}, nil
	}
}

// room is how much of a file system a plan takes: merges come one after the other,
// and each gives something back at its end.
type room struct{ now, peak uint64 }

// add adds a merge to the plan, before it is applied.
func (s *stacks) add(ctx context.Context, plan *DeletePlan, t *layerTree, m merge, at *stand, rooms map[string]*room) {
	lower, upper := t.layers[m.lower], t.layers[m.upper]
	p := PlanMerge{Device: deviceOf(t.disks, lower.DiskID), Way: m.way, Layer: lower.Path, Live: m.way != MergeRemove && at.inUse(t, m.writes())}
	var into catalog.Layer
	var back uint64
	switch m.way {
	case MergeRemove:
		if n, err := s.data(ctx, s.of(lower)); err == nil { // else it is not known what it gives back
			plan.Freed, back = plan.Freed+n, n
		}
	case MergeCommit:
		p.Layer, into, p.Bytes, p.Room, back = upper.Path, lower, m.cost.Down, m.cost.RoomBelow, m.cost.Down
		p.Other, p.Only = m.cost.Up, m.only
	case MergeStream:
		into, p.Bytes, p.Room, back = upper, m.cost.Up, m.cost.RoomAbove, m.cost.Low
		p.Other, p.Only = m.cost.Down, m.only
	case MergeFlatten:
		into, p.Bytes, p.Room = upper, m.cost.Up, m.cost.RoomAbove
	}
	if into.ID != "" {
		p.Into = into.Path
		r := rooms[filepath.Dir(into.Path)]
		if r == nil {
			r = &room{}
			rooms[filepath.Dir(into.Path)] = r
		}
		r.now += p.Room
		r.peak = max(r.peak, r.now)
	}
	if r := rooms[filepath.Dir(p.Layer)]; r != nil {
		r.now -= min(r.now, back)
	}
	if m.way == MergeCommit || m.way == MergeStream {
		plan.Freed += m.cost.Freed
	}
	plan.Moved += p.Bytes
	plan.Merges = append(plan.Merges, p)
}

// apply puts together what a merge would.
func (s *stacks) apply(m merge) {
	if m.upper != "" {
		s.images[m.upper] = slices.Concat(s.images[m.lower], s.images[m.upper])
	}
}
