package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
)

// storage names what the VM's disks are on, as of the last look at them: it asks
// no file system, which may hang.
func (v *vm) storage() []string {
	v.mu.Lock()
	defer v.mu.Unlock()
	var all []string
	for _, d := range v.disks {
		active := layerOf(v.layers, d.ActiveLayer)
		switch {
		case d.Removed || active.ID == "":
		case active.Device != "":
			all = append(all, "device "+active.Device)
		default:
			all = append(all, fmt.Sprintf("file system %d:%d", unix.Major(active.Dev), unix.Minor(active.Dev)))
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// requeue takes up an operation that had not begun when the agent before stopped.
func (a *Agent) requeue(ctx context.Context, v *vm, rec op.Record) error {
	recipe, err := a.recipeOf(v, rec)
	if err != nil {
		return a.ops.Resume(rec, func(ctx context.Context, o *op.Op) error {
			a.attended(ctx, o, v, rec.Kind, rec.UID)
			return err
		})
	}
	spec := op.Spec{}
	if v != nil {
		spec.Storage = v.storage()
	}
	return a.ops.Requeue(ctx, rec, spec, func(ctx context.Context, o *op.Op) error {
		a.attended(ctx, o, v, rec.Kind, rec.UID)
		return recipe(ctx, o)
	})
}

// recipeOf makes the recipe of an operation again, from its request.
func (a *Agent) recipeOf(v *vm, rec op.Record) (op.Recipe, error) {
	if rec.Kind == op.KindGroup {
		var req GroupRequest
		if err := json.Unmarshal(rec.Request, &req); err != nil {
			return nil, fmt.Errorf("the request of operation %s: %w", rec.ID, err)
		}
		req.RequestID, req.UID = rec.RequestID, rec.UID
		return a.groupRecipe(req), nil
	}
	if rec.Kind == op.KindGroupRestore {
		var req GroupRestoreRequest
		if err := json.Unmarshal(rec.Request, &req); err != nil {
			return nil, fmt.Errorf("the request of operation %s: %w", rec.ID, err)
		}
		req.RequestID, req.UID = rec.RequestID, rec.UID
		return a.groupRestoreRecipe(req), nil
	}
	nothing := fault.New(fault.Failed, "vmsnapd was stopped before operation %s began; nothing was done", rec.ID).
		WithHint("ask for it again")
	if rec.Kind == op.KindUpkeep && v != nil {
		return a.upkeepRecipe(v), nil
	}
	if rec.Kind == op.KindDelete && v != nil {
		var req DeleteRequest
		if err := json.Unmarshal(rec.Request, &req); err != nil {
			return nil, fmt.Errorf("the request of operation %s: %w", rec.ID, err)
		}
		return a.deleteRecipe(v, req), nil
	}
	if rec.Kind != op.KindSnapshot || v == nil {
		return nil, nothing
	}
	var req SnapshotRequest
	if err := json.Unmarshal(rec.Request, &req); err != nil {
		return nil, fmt.Errorf("the request of operation %s: %w", rec.ID, err)
	}
	if req.Group != nil {
		return nil, nothing // the others of its group are not there any more
	}
	req.RequestID, req.UID = rec.RequestID, rec.UID
	return a.snapshotRecipe(v, req), nil
}
