package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
)

// GroupRestoreRequest asks for several VMs to go back to a group of snapshots.
type GroupRestoreRequest struct {
	Group      string // its name, or the id of the operation that took it
	BestEffort bool   // a VM that fails drops out instead of failing the group
	NoSafety   bool   // do not keep the states before as snapshots
	RequestID  string `json:"-"`
	UID        uint32 `json:"-"`

	VMs []string // set by the agent: those that have a snapshot of the group
}

// RestoreGroup starts an operation that takes the disks of all VMs of a group back,
// each by an operation of its own that this one holds together.
func (a *Agent) RestoreGroup(ctx context.Context, req GroupRestoreRequest) (op.Record, error) {
	snapshots, err := a.groupSnapshots(ctx, req.Group)
	if err != nil {
		return op.Record{}, err
	}
	g := snapshots[0].Group
	spec := op.Spec{Kind: op.KindGroupRestore, RequestID: req.RequestID, UID: req.UID}
	var names []string
	for _, s := range snapshots {
		v := a.byID(s.VMID)
		if v == nil {
			return op.Record{}, fault.New(fault.NotFound, "VM %s of group %s is not known any more", s.VMName, g.Name)
		}
		names = append(names, v.name())
		req.VMs = append(req.VMs, v.id)
		spec.Storage = append(spec.Storage, v.storage()...)
	}
	if missing := g.Members - len(snapshots); missing > 0 && !req.BestEffort {
		return op.Record{}, fault.New(fault.NotFound, "group %s: of its %d VMs only %s have their snapshot of it", g.Name, g.Members, strings.Join(names, ", ")).
			WithHint("--best-effort restores those")
	}
	req.Group, spec.VMName = g.Operation, strings.Join(names, ",")
	spec.Request = req
	return a.begin(ctx, spec, a.groupRestoreRecipe(req))
}

// groupSnapshots returns the snapshots of a group, one of each VM, ordered by the
// VMs' names.
func (a *Agent) groupSnapshots(ctx context.Context, ref string) ([]catalog.Snapshot, error) {
	all, err := a.catalog.Snapshots(ctx, "")
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(s catalog.Snapshot) bool {
		return s.Group == nil || s.Group.Operation != ref && s.Group.Name != ref
	})
	var groups []string
	for _, s := range all {
		if !slices.Contains(groups, s.Group.Operation) {
			groups = append(groups, s.Group.Operation)
		}
	}
	switch len(groups) {
	case 0:
		return nil, fault.New(fault.NotFound, "no group of snapshots is called %q", ref).WithHint("vmsnap snapshot list --label group=%s shows its snapshots", ref)
	case 1:
	default:
		return nil, fault.New(fault.Usage, "%d groups of snapshots are called %q", len(groups), ref).
			WithHint("name it by the operation that took it: %s", strings.Join(groups, ", "))
	}
	slices.SortFunc(all, func(x, y catalog.Snapshot) int { return strings.Compare(x.VMName, y.VMName) })
	return all, nil
}

// groupRestoreRecipe is the recipe of a request that was checked.
func (a *Agent) groupRestoreRecipe(req GroupRestoreRequest) op.Recipe {
	return func(ctx context.Context, o *op.Op) error {
		snapshots, err := a.groupSnapshots(ctx, req.Group)
		if err != nil {
			return err
		}
		t := together{name: snapshots[0].Group.Name, vms: req.VMs, bestEffort: req.BestEffort, step: "restores"}
		t.member = func(o *op.Op, v *vm, m *member) (op.Spec, op.Recipe) {
			at := slices.IndexFunc(snapshots, func(s catalog.Snapshot) bool { return s.VMID == v.id })
			if at < 0 {
				return op.Spec{Kind: op.KindRestore}, func(context.Context, *op.Op) error {
					return fault.New(fault.NotFound, "VM %s: its snapshot of group %s is gone", v.name(), t.name)
				}
			}
			one := RestoreRequest{
				Snapshot: snapshots[at].ID, NoSafety: req.NoSafety, UID: req.UID, Group: &Group{Operation: o.ID(), Name: t.name},
			}
			return op.Spec{Kind: op.KindRestore, Request: one, UID: req.UID}, func(ctx context.Context, o *op.Op) error {
				return a.newRestore(o, v, snapshots[at], one, m).to(ctx, snapshots[at], one, nil)
			}
		}
		_, err = a.runTogether(ctx, o, t)
		return err
	}
}

// newRestore is a restore of a request that was checked.
func (a *Agent) newRestore(o *op.Op, v *vm, s catalog.Snapshot, req RestoreRequest, m *member) *restore {
	r := &restore{cut: &cut{Agent: a, o: o, vm: v, member: m}}
	r.Description, r.NoSafety = fmt.Sprintf("the state before %s was restored", s.Name), req.NoSafety
	r.keepsAs("before-" + generatedName(time.Now(), o.ID()))
	return r
}

// swapPatience is how long a guest whose disks are swapped stands still for others
// of its group: a swap takes some milliseconds.
const swapPatience = 2 * time.Second

// joinSwap waits until all others have made what can be made before their guests
// are stopped.
func (r *restore) joinSwap(ctx context.Context) error {
	r.member.reach(ready)
	return r.member.all(ctx, ready)
}

// joinReset waits until the disks of all others are swapped: up to there each can
// be taken back. A guest does not stand still for one that does not come along.
func (r *restore) joinReset(ctx context.Context) error {
	if r.member == nil {
		return nil
	}
	r.member.reach(cutTaken)
	ctx, cancel := context.WithTimeout(ctx, swapPatience)
	defer cancel()
	err := r.member.all(ctx, cutTaken)
	switch {
	case err == nil:
		return nil
	case !errors.Is(err, context.DeadlineExceeded):
		return err
	case r.member.bestEffort:
		return nil
	default:
		return fault.New(fault.Unresponsive, "VM %s: another VM of the group has not swapped its disks within %s", r.vm.name(), swapPatience)
	}
}

// recoverGroupRestore says what the restore of a group came to whose agent is gone.
func (a *Agent) recoverGroupRestore(ctx context.Context, rec op.Record) error {
	var req GroupRestoreRequest
	if err := json.Unmarshal(rec.Request, &req); err != nil {
		return err
	}
	restored, others, err := a.recoveredMembers(ctx, rec.ID, req.VMs, op.KindRestore)
	switch {
	case err != nil:
		return err
	case len(restored) == 0:
		return errInterrupted()
	case len(others) == 0:
		return nil
	default:
		return fault.New(fault.Failed, "vmsnapd ended while the group was restored; %s went back, %s did not",
			strings.Join(restored, ", "), strings.Join(others, ", ")).WithHint("restore the group again")
	}
}
