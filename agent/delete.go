package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/event"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
)

// DeleteSnapshots starts an operation that deletes snapshots of one VM, and merges
// the layers that nothing needs any more.
func (a *Agent) DeleteSnapshots(ctx context.Context, req DeleteRequest) (op.Record, error) {
	v, _, err := a.toDelete(ctx, req)
	if err != nil && req.RequestID != "" { // a repeated request finds nothing to delete any more
		first, known, look := a.catalog.OperationByRequest(ctx, req.UID, req.RequestID)
		if v = a.byID(first.VMID); look == nil && known && v != nil {
			err = nil
		}
	}
	if err != nil {
		return op.Record{}, err
	}
	spec := op.Spec{Kind: op.KindDelete, VMID: v.id, VMName: v.name(), Request: req, RequestID: req.RequestID, UID: req.UID}
	return a.begin(ctx, spec, a.deleteRecipe(v, req))
}

// DeleteSnapshot deletes one snapshot for a retention. Where branches lie on it
// its layers stay for as long as they do.
func (a *Agent) DeleteSnapshot(ctx context.Context, id string, uid uint32) (op.Record, error) {
	return a.DeleteSnapshots(ctx, DeleteRequest{Snapshots: []string{id}, KeepLayers: true, UID: uid})
}

func (a *Agent) deleteRecipe(v *vm, req DeleteRequest) op.Recipe {
	return func(ctx context.Context, o *op.Op) error {
		v.change(ctx, a, o)
		v.leaveCPUs(o)
		return (&deletion{Agent: a, o: o, vm: v}).run(ctx, req)
	}
}

// deletion is snapshots being deleted.
//
// They are declared no restore points any more before anything else, durably.
// Then their layers go one by one (merging.go): each step leaves a tree that is
// whole, in which every other snapshot reads as before, so that the deletion can
// end after any of them. When all have gone their memory goes, their records, and
// last their manifests.
type deletion struct {
	*Agent
	deletionState
	o     *op.Op
	vm    *vm
	count int                  // merges begun
	kept  map[string]keptLayer // layers that stay, by id
}

// deletionState is what the journal keeps of a deletion.
type deletionState struct {
	Gone    []catalog.Snapshot // as they were
	Wanted  map[string]bool    // layers that are to go, as for layerTree.next
	Flatten bool
	Speed   uint64   // bytes a second; 0: no limit
	Upkeep  bool     // no snapshot is deleted
	Dirs    []string // where manifests of the snapshots may be
	Begun   []string // layers that were committed into, or begun to
	Merging *merging `json:",omitempty"` // the merge that is about to be done
}

// The journal entries of a deletion.
const (
	entryDelete = "delete" // the snapshots are about to be declared no restore points
	entryMerge  = "merge"  // layers are about to be merged
	entryLast   = "last"   // all layers have gone; the memory, the records and the manifests are about to
)

// run is the recipe.
func (d *deletion) run(ctx context.Context, req DeleteRequest) error {
	d.o.LeaveAtStop()
	d.o.Pausable()
	err := d.o.Step(ctx, "preflight", func(ctx context.Context) error { return d.preflight(ctx, req) })
	if err != nil {
		return err
	}
	if err := d.o.Step(ctx, "mark", d.mark); err != nil {
		return err
	}
	return d.toEnd(ctx)
}

// preflight plans, and fails where the plan says so.
func (d *deletion) preflight(ctx context.Context, req DeleteRequest) error {
	_, chosen, err := d.toDelete(ctx, req)
	if err != nil {
		return err
	}
	plan, err := d.planDelete(ctx, d.vm, req, chosen, true)
	if err != nil {
		return err
	}
	if len(plan.Blockers) > 0 {
		return plan.Blockers[0]
	}
	for _, w := range plan.Warnings {
		d.o.Warn(w)
	}
	d.Gone, d.Flatten, d.Speed = chosen, req.Flatten, req.Speed
	if d.Speed == 0 {
		d.Speed = d.cfg.MergeSpeed
	}
	d.Wanted = map[string]bool{}
	for _, s := range chosen {
		for _, disk := range s.Disks {
			if disk.LayerID != "" {
				d.Wanted[disk.LayerID] = true
			}
		}
	}
	d.vm.mu.Lock()
	layers := d.vm.layers
	d.vm.mu.Unlock()
	dirs := map[string]bool{}
	for _, l := range layers {
		if dir := manifestDirOf(l, layers); dir != "" && !l.Foreign {
			dirs[dir] = true
		}
	}
	d.Dirs = sortedKeys(dirs)
	d.o.Plan(3 + len(plan.Merges)) // preflight, mark, remove
	return nil
}

// mark declares the snapshots no restore points any more, for good.
func (d *deletion) mark(ctx context.Context) error {
	if err := d.o.Journal(ctx, entryDelete, d.deletionState); err != nil {
		return err
	}
	d.o.RevertAtLength("make the snapshots valid again", d.unmark)
	return d.setStates(ctx, func(_, _ catalog.Snapshot) catalog.PointState { return catalog.PointDeleting })
}

// setStates gives the snapshots that are left a state, in the catalog and in
// their manifests.
func (d *deletion) setStates(ctx context.Context, state func(was, is catalog.Snapshot) catalog.PointState) error {
	var left []catalog.Snapshot
	err := d.catalog.Update(ctx, func(tx *catalog.Tx) error {
		left = nil
		for _, was := range d.Gone {
			s, err := tx.Snapshot(ctx, was.ID)
			if fault.Of(err) == fault.NotFound {
				continue
			}
			if err != nil {
				return err
			}
			s.State = state(was, s)
			if err := tx.SetSnapshotState(ctx, s.ID, s.State); err != nil {
				return err
			}
			left = append(left, s)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, s := range left {
		if err := d.rewriteManifests(s); err != nil {
			d.o.Warn(op.Warning{Code: warnManifest, Message: err.Error()})
		}
	}
	return nil
}

// unmark makes those snapshots valid again of which nothing is lost.
func (d *deletion) unmark(ctx context.Context) error {
	return d.setStates(ctx, func(was, s catalog.Snapshot) catalog.PointState {
		if was.State == catalog.PointInvalid {
			return was.State
		}
		for _, disk := range s.Disks {
			if !disk.Excluded && (disk.LayerID == "" || slices.Contains(d.Begun, disk.LayerID)) {
				return catalog.PointInvalid
			}
		}
		return catalog.PointValid
	})
}

// toEnd merges what can go, and removes the rest.
func (d *deletion) toEnd(ctx context.Context) error {
	if err := d.mergeAll(ctx); err != nil {
		return err
	}
	for _, id := range slices.Sorted(maps.Keys(d.kept)) {
		k := d.kept[id]
		if !d.Wanted[id] {
			continue // it has been there before
		}
		d.o.Warn(op.Warning{Code: warnLayersKept, Message: fmt.Sprintf("the layer %s stays without a snapshot: %s", id, k.Reason)})
	}
	return d.o.Step(ctx, "remove", func(ctx context.Context) error {
		if err := d.o.PointOfNoReturn(); err != nil {
			return err
		}
		ctx = context.WithoutCancel(ctx)
		if err := d.o.Journal(ctx, entryLast, d.deletionState); err != nil {
			return err
		}
		d.o.DropReverts()
		return d.insist(ctx, d.remove)
	})
}

// mergeAll merges layer by layer. What the tree looks like, and what lies on it, is
// read anew before each.
func (d *deletion) mergeAll(ctx context.Context) error {
	for {
		if err := errors.Join(d.rest(ctx), d.reload(ctx, d.vm)); err != nil {
			return err
		}
		at, err := d.standOf(ctx, d.vm, true)
		if err != nil {
			return err
		}
		gone := map[string]bool{}
		for _, s := range d.Gone {
			gone[s.ID] = true
		}
		t, _, err := d.treeOf(ctx, d.vm, at, gone)
		if err != nil {
			return err
		}
		maps.Copy(t.kept, d.kept)
		t.keepLeaves = d.Upkeep
		m, ok, err := t.next(d.Wanted, d.Flatten, newStacks(at.prefix()).costs(ctx))
		if err != nil {
			return fmt.Errorf("VM %s: %w", d.vm.name(), err)
		}
		if d.kept = t.kept; !ok {
			return nil
		}
		device := deviceOf(t.disks, t.layers[m.lower].DiskID)
		err = d.o.Step(ctx, string(m.way)+" "+device, func(ctx context.Context) error { return d.merge(ctx, t, m, at) })
		if keep, stays := errors.AsType[*staysError](err); stays {
			d.kept[m.lower] = keptLayer{Reason: keep.Error()}
			continue
		}
		if err != nil {
			return fault.New(kindOf(err), "VM %s: disk %s: %w", d.vm.name(), device, err)
		}
	}
}

// staysError is why a layer cannot be merged now, and has to stay.
type staysError struct{ why error }

func (e *staysError) Error() string { return e.why.Error() }

func (e *staysError) Unwrap() error { return e.why }

// remove removes what is left of the snapshots when their layers have gone. It can
// be done again after it was interrupted.
func (d *deletion) remove(ctx context.Context) error {
	for _, s := range d.Gone {
		if s.Memory == nil {
			continue
		}
		if err := removeMemory(s.Memory.Path); err != nil {
			return fault.New(kindOf(err), "snapshot %s/%s: its memory: %w", s.VMName, s.Name, err)
		}
	}
	var names []string
	err := d.catalog.Update(ctx, func(tx *catalog.Tx) error {
		names = nil
		for _, s := range d.Gone {
			err := tx.DeleteSnapshot(ctx, s.ID)
			if fault.Of(err) == fault.NotFound {
				continue
			}
			if err != nil {
				return err
			}
			names = append(names, s.Name)
			err = tx.AddEvent(ctx, event.Event{
				Kind: event.SnapshotDeleted, Severity: event.Info, VMID: s.VMID, VMName: s.VMName, Snapshot: s.ID, Operation: d.o.ID(),
				Message: fmt.Sprintf("snapshot %s was deleted", s.Name),
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := d.removeManifests(); err != nil {
		return err
	}
	d.o.Logger().Info("snapshots deleted", "names", strings.Join(names, ", "))
	return d.reload(ctx, d.vm)
}
