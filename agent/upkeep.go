package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
)

// followUpkeep merges, each interval, the layers that nothing needs and that could
// not be merged when their snapshots were deleted: several layers lay on them, a
// clone did, or QEMU had them by another name. It takes one VM after the other,
// copies no faster than the settings say, rests while the guest waits for its disks,
// and gives way to whoever wants the VM for something else.
func (a *Agent) followUpkeep(ctx context.Context) {
	if a.cfg.UpkeepSpeed == 0 || a.cfg.UpkeepInterval == 0 {
		return
	}
	tick := time.NewTicker(a.cfg.UpkeepInterval)
	defer tick.Stop()
	inVain := map[string]string{} // what was there when an upkeep ended, by VM
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		a.mu.RLock()
		var vms []*vm
		for _, v := range a.vms {
			vms = append(vms, v)
		}
		a.mu.RUnlock()
		for _, v := range vms {
			if err := a.keepUp(ctx, v, inVain); err != nil && ctx.Err() == nil {
				a.log.Debug("no upkeep", "vm", v.name(), "error", err)
			}
		}
	}
}

// keepUp merges what can be merged of one VM's layers, and waits for that.
func (a *Agent) keepUp(ctx context.Context, v *vm, inVain map[string]string) error {
	if _, busy := a.ops.Running(v.id); busy {
		return nil
	}
	idle, err := a.idleLayers(ctx, v)
	if err != nil || idle == "" || idle == inVain[v.id] {
		return err
	}
	if possible, err := a.canKeepUp(ctx, v); err != nil || !possible {
		return err
	}
	spec := op.Spec{Kind: op.KindUpkeep, VMID: v.id, VMName: v.name(), Request: struct{}{}}
	rec, err := a.begin(ctx, spec, a.upkeepRecipe(v))
	if err != nil {
		return err
	}
	if rec, err = a.ops.Wait(ctx, rec.ID); err != nil || rec.State == op.Cancelled {
		return err
	}
	inVain[v.id], err = a.idleLayers(ctx, v)
	return err
}

// idleLayers names the layers of a VM that nothing needs and that lie between two
// others, with the process that has them open.
func (a *Agent) idleLayers(ctx context.Context, v *vm) (string, error) {
	disks, layers, snapshots, err := a.records(ctx, v.id)
	if err != nil {
		return "", err
	}
	t := newLayerTree(disks, layers, snapshots, nil)
	var idle []string
	for id := range t.layers {
		if t.idle(id) && len(t.children[id]) == 1 && t.fixed[id] == "" {
			idle = append(idle, id)
		}
	}
	if len(idle) == 0 {
		return "", nil
	}
	slices.Sort(idle)
	pid := 0
	if r, err := v.alone(); err == nil && r != nil {
		pid = r.proc.PID
	}
	return fmt.Sprint(pid, " ", strings.Join(idle, " ")), nil
}

// canKeepUp reports whether there is something to merge, as things are now.
func (a *Agent) canKeepUp(ctx context.Context, v *vm) (bool, error) {
	if !v.changing.TryRLock() {
		return false, nil
	}
	defer v.changing.RUnlock()
	at, err := a.standOf(ctx, v, true)
	if err != nil {
		return false, err
	}
	t, _, err := a.treeOf(ctx, v, at, nil)
	if err != nil {
		return false, err
	}
	t.keepLeaves = true
	_, ok, err := t.next(nil, false, newStacks(at.prefix()).costs(ctx))
	return ok, err
}

// upkeepRecipe is a deletion of no snapshot.
func (a *Agent) upkeepRecipe(v *vm) op.Recipe {
	return func(ctx context.Context, o *op.Op) error {
		v.change(ctx, a, o)
		v.leaveCPUs(o)
		d := &deletion{Agent: a, o: o, vm: v}
		d.Speed, d.Upkeep = a.cfg.UpkeepSpeed, true
		o.LeaveAtStop()
		o.Pausable()
		defer d.yield(ctx)()
		return d.mergeAll(ctx)
	}
}

// giveWayPatience is how long somebody who wants a VM waits for an upkeep to end,
// which cancels a block job or kills qemu-img.
const giveWayPatience = 10 * time.Second

// giveWay ends an operation if it is an upkeep, for somebody who wants its VM.
func (a *Agent) giveWay(ctx context.Context, id string) bool {
	rec, err := a.ops.Operation(ctx, id)
	if err != nil || rec.Kind != op.KindUpkeep {
		return false
	}
	if _, err := a.ops.Cancel(ctx, id); err != nil && fault.Of(err) != fault.TooLate {
		return false
	}
	ctx, stop := context.WithTimeout(ctx, giveWayPatience)
	defer stop()
	_, err = a.ops.Wait(ctx, id)
	return err == nil
}

// start starts an operation, in the place of an upkeep if one holds its VM.
func (a *Agent) start(ctx context.Context, spec op.Spec, recipe op.Recipe) (op.Record, error) {
	rec, err := a.ops.Start(ctx, spec, recipe)
	if busy, held := errors.AsType[*op.BusyError](err); held && spec.Kind != op.KindUpkeep && a.giveWay(ctx, busy.Operation) {
		return a.ops.Start(ctx, spec, recipe)
	}
	return rec, err
}
