package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
)

// DefaultMaxSkew is by how much the cuts of a group may lie apart unless it is
// chosen: some milliseconds are usual.
const DefaultMaxSkew = time.Second

// maxGroup bounds the VMs of a group.
const maxGroup = 64

// groupLabel is the label that each snapshot of a group has.
const groupLabel = "group"

// GroupRequest asks for snapshots of several VMs, of one moment.
type GroupRequest struct {
	Name       string   // of the group, and of each of its snapshots
	VMs        []string // frozen in this order, and thawed in reverse
	BestEffort bool     // a VM that fails drops out instead of failing the group
	MaxSkew    time.Duration
	Options    SnapshotRequest // of each snapshot; VM and Name are the group's to choose
	RequestID  string          `json:"-"`
	UID        uint32          `json:"-"`
}

// Group is the part of a snapshot or a restore in the operation of a group.
type Group struct {
	Operation string // of the group
	Name      string
}

// CreateGroup starts an operation that takes a snapshot of each VM of a group,
// each by an operation of its own that this one holds together.
func (a *Agent) CreateGroup(ctx context.Context, req GroupRequest) (op.Record, error) {
	vms, err := a.checkGroup(&req)
	if err != nil {
		return op.Record{}, err
	}
	spec := op.Spec{Kind: op.KindGroup, Request: req, RequestID: req.RequestID, UID: req.UID}
	var names []string
	for _, v := range vms {
		names = append(names, v.name())
		spec.Storage = append(spec.Storage, v.storage()...)
	}
	spec.VMName = strings.Join(names, ",")
	return a.begin(ctx, spec, a.groupRecipe(req))
}

// checkGroup refuses what cannot be meant, and replaces names by ids.
func (a *Agent) checkGroup(req *GroupRequest) ([]*vm, error) {
	if err := checkName(req.Name); err != nil {
		return nil, err
	}
	req.MaxSkew = cmp.Or(req.MaxSkew, DefaultMaxSkew)
	switch {
	case len(req.VMs) < 2 || len(req.VMs) > maxGroup:
		return nil, fault.New(fault.Usage, "group %s: %d VMs are given; 2 to %d are a group", req.Name, len(req.VMs), maxGroup)
	case req.MaxSkew < 0:
		return nil, fault.New(fault.Usage, "group %s: a skew of %s cannot be had", req.Name, req.MaxSkew)
	}
	var vms []*vm
	for i, ref := range req.VMs {
		v, err := a.find(ref)
		if err != nil {
			return nil, err
		}
		if slices.Contains(vms, v) {
			return nil, fault.New(fault.Usage, "group %s: VM %s is given twice", req.Name, v.name())
		}
		vms = append(vms, v)
		req.VMs[i] = v.id
	}
	if err := a.checkRequest(&req.Options); err != nil {
		return nil, err
	}
	if req.Options.Memory {
		return nil, fault.New(fault.Unsupported, "group %s: memory is saved of one VM at a time", req.Name).WithHint("leave out --memory")
	}
	return vms, nil
}

// together is operations of several VMs that another one holds together.
type together struct {
	name       string   // of the group
	vms        []string // ids
	bestEffort bool
	step       string // what the members' operations are called together
	// member returns what a VM's own operation is.
	member func(o *op.Op, v *vm, m *member) (op.Spec, op.Recipe)
}

// groupRecipe is the recipe of a request that was checked.
func (a *Agent) groupRecipe(req GroupRequest) op.Recipe {
	t := together{name: req.Name, vms: req.VMs, bestEffort: req.BestEffort, step: "snapshots"}
	t.member = func(o *op.Op, v *vm, m *member) (op.Spec, op.Recipe) { return a.groupSnapshot(o, v, m, req) }
	return func(ctx context.Context, o *op.Op) error {
		g, err := a.runTogether(ctx, o, t)
		if err != nil {
			return err
		}
		if skew := g.skew(); skew > req.MaxSkew {
			o.Warn(op.Warning{Code: warnSkew, Message: "the cuts lie up to " + skew.String() + " apart, more than the " + req.MaxSkew.String() + " allowed"})
			o.SetPartial()
		}
		return nil
	}
}

// runTogether begins the members' own operations, which hold the VMs, waits for
// them, and says what they came to.
func (a *Agent) runTogether(ctx context.Context, o *op.Op, t together) (*gathering, error) {
	g := newGathering(len(t.vms), t.bestEffort)
	o.Plan(2)
	var members []op.Record
	err := o.Step(ctx, "begin", func(ctx context.Context) (err error) {
		members, err = a.beginMembers(ctx, o, g, t)
		return err
	})
	if err != nil {
		a.cancelAll(ctx, members)
	}
	stop := context.AfterFunc(ctx, func() { a.cancelAll(ctx, members) })
	defer stop()
	if len(members) == 0 {
		return g, err
	}
	var ended []op.Record
	waited := o.StepInAnyCase(context.WithoutCancel(ctx), t.step, func(ctx context.Context) (err error) {
		ended, err = a.awaitMembers(ctx, members)
		return err
	})
	if err = errors.Join(err, waited); err != nil {
		return g, err
	}
	if cause := context.Cause(ctx); cause != nil && !slices.ContainsFunc(ended, succeeded) {
		return g, cause
	}
	return g, groupEnd(o, t, ended)
}

func succeeded(rec op.Record) bool { return rec.State == op.Succeeded }

// beginMembers begins the operations of the members. Those whose VM is busy drop
// out.
func (a *Agent) beginMembers(ctx context.Context, o *op.Op, g *gathering, t together) (members []op.Record, err error) {
	for i, id := range t.vms {
		m := &member{gathering: g, at: i, vm: id}
		rec, err := a.beginMember(ctx, o, m, t)
		if err == nil {
			members = append(members, rec)
			continue
		}
		m.drop(err)
		if !t.bestEffort {
			return members, fault.New(fault.Of(err), "group %s: %w", t.name, err)
		}
		o.Warn(op.Warning{Code: warnMember, Message: "VM " + m.vm + " dropped out: " + err.Error()})
		o.SetPartial()
	}
	return members, nil
}

func (a *Agent) beginMember(ctx context.Context, o *op.Op, m *member, t together) (op.Record, error) {
	v := a.byID(m.vm)
	if v == nil {
		return op.Record{}, fault.New(fault.NotFound, "VM %s of group %s is not known any more", m.vm, t.name)
	}
	m.vm = v.name()
	spec, recipe := t.member(o, v, m)
	// Light, because the group's own operation has waited for its turn: members
	// that wait for each other must not wait for each other's turn.
	spec.VMID, spec.VMName, spec.Light = v.id, m.vm, true
	return a.begin(ctx, spec, func(ctx context.Context, o *op.Op) (err error) {
		defer func() { m.drop(err) }()
		v.change(ctx, a, o)
		return recipe(ctx, o)
	})
}

// groupSnapshot is a member's snapshot.
func (a *Agent) groupSnapshot(o *op.Op, v *vm, m *member, req GroupRequest) (op.Spec, op.Recipe) {
	one := req.Options
	one.VM, one.Name, one.UID, one.Group = v.id, req.Name, req.UID, &Group{Operation: o.ID(), Name: req.Name}
	one.Labels = map[string]string{groupLabel: req.Name}
	for k, value := range req.Options.Labels {
		one.Labels[k] = value
	}
	return op.Spec{Kind: op.KindSnapshot, Request: one, UID: req.UID}, func(ctx context.Context, o *op.Op) error {
		return a.snapshot(ctx, o, v, one, m)
	}
}

// awaitMembers waits until all have ended.
func (a *Agent) awaitMembers(ctx context.Context, members []op.Record) (ended []op.Record, err error) {
	for _, m := range members {
		rec, err := a.ops.Wait(ctx, m.ID)
		select {
		case <-a.stopping:
			if err != nil || !rec.State.Final() {
				return nil, op.ErrLeave
			}
		default:
		}
		if err != nil {
			return nil, err
		}
		ended = append(ended, rec)
	}
	return ended, nil
}

// cancelAll asks members to stop. One that is past its cut completes, or is taken
// back with the group.
func (a *Agent) cancelAll(ctx context.Context, members []op.Record) {
	for _, m := range members {
		if _, err := a.ops.Cancel(context.WithoutCancel(ctx), m.ID); err != nil {
			a.log.Debug("a member of a group is not cancelled", "operation", m.ID, "vm", m.VMName, "error", err)
		}
	}
}

// groupEnd says what a group came to, by its members.
func groupEnd(o *op.Op, t together, ended []op.Record) error {
	var first *op.Record
	taken := 0
	for i, rec := range ended {
		if rec.State == op.Succeeded {
			taken++
			if rec.Partial {
				o.SetPartial()
			}
			for _, w := range rec.Warnings {
				w.Message = "VM " + rec.VMName + ": " + w.Message
				o.Warn(w)
			}
			continue
		}
		if first == nil || isSecondary(first.Failure) && !isSecondary(rec.Failure) {
			first = &ended[i]
		}
		if t.bestEffort {
			o.Warn(op.Warning{Code: warnMember, Message: "VM " + rec.VMName + " dropped out: " + messageOf(rec)})
			o.SetPartial()
		}
	}
	if first != nil && (!t.bestEffort || taken == 0) {
		kind := fault.Failed
		if first.Failure != nil {
			kind = first.Failure.Kind
		}
		return fault.New(kind, "group %s: %s", t.name, messageOf(*first)).WithHint("vmsnap operation show %s tells more", first.ID)
	}
	return nil
}

// isSecondary reports whether an operation failed because another of its group
// did.
func isSecondary(f *op.Failure) bool { return f != nil && strings.Contains(f.Message, ofTheGroup) }

func messageOf(rec op.Record) string {
	if rec.Failure == nil {
		return string(rec.State)
	}
	return rec.Failure.Message
}

// The patience of a guest that is frozen with others that are not yet where they
// should be.
const (
	cutPatience  = 2 * time.Second
	thawPatience = 500 * time.Millisecond
)

// joinFreeze journals the cut and waits until all others can go on with theirs
// and it is this guest's turn to be frozen.
func (c *cut) joinFreeze(ctx context.Context) error {
	if c.member == nil {
		return nil
	}
	if err := c.announce(ctx); err != nil {
		return err
	}
	c.member.reach(ready)
	if err := c.member.all(ctx, ready); err != nil {
		return err
	}
	return c.member.earlier(ctx, frozen)
}

// joinCut waits until all guests are frozen that are to be, so that all cuts come
// at the same time.
func (c *cut) joinCut(ctx context.Context) error {
	c.member.reach(frozen)
	return c.member.all(ctx, frozen)
}

// joinThaw keeps the guest frozen until all are cut, and those are thawed that
// were frozen after it.
func (c *cut) joinThaw(ctx context.Context) {
	c.member.reach(cutTaken)
	if c.guard != nil {
		c.member.allAWhile(ctx, cutTaken, cutPatience)
		c.member.laterAWhile(ctx, thawed, thawPatience)
	}
}

// joinEnd waits until it is known that all members have what was asked for. If
// not, the cut is merged back.
func (c *cut) joinEnd(ctx context.Context) error {
	if c.member == nil {
		return nil
	}
	ctx, stop := c.leaving(ctx)
	defer stop()
	c.member.reach(thawed)
	if c.req.Quiesce == QuiesceRequire && c.quiesce.Reason != "" {
		return fault.New(fault.NotQuiesced, "VM %s was cut, but not while the guest was frozen (%s)", c.vm.name(), c.quiesce.Reason)
	}
	c.member.reach(fit)
	if err := c.member.all(ctx, fit); err != nil {
		return err
	}
	c.o.DropReverts()
	c.groupCut = &catalog.GroupCut{Operation: c.req.Group.Operation, Name: c.req.Group.Name, Members: len(c.member.stages), Skew: c.member.skew()}
	return nil
}

// revertable pushes what takes the cut of a member back that has happened.
func (c *cut) revertable() {
	if c.member == nil {
		return
	}
	c.o.RevertAtLength("merge the overlays back", c.mergeBack)
	c.o.RevertAtLength("announce that they are merged back", func(ctx context.Context) error {
		return c.o.Journal(ctx, entryDiscard, struct{}{})
	})
}

// recoverGroup says what a group came to whose agent is gone: its members are
// recovered, each by itself.
func (a *Agent) recoverGroup(ctx context.Context, rec op.Record) error {
	var req GroupRequest
	if err := json.Unmarshal(rec.Request, &req); err != nil {
		return err
	}
	taken, lost, err := a.recoveredMembers(ctx, rec.ID, req.VMs, op.KindSnapshot)
	switch {
	case err != nil:
		return err
	case len(taken) == 0:
		return errInterrupted()
	case len(lost) == 0:
		return nil
	default:
		return fault.New(fault.Failed, "group %s: vmsnapd ended while it was cut; there are snapshots of %s, and none of %s",
			req.Name, strings.Join(taken, ", "), strings.Join(lost, ", ")).WithHint("take the group again; the snapshots that are there are whole, each by itself")
	}
}

// recoveredMembers waits for the recovery of the members of a group, and returns
// the names of the VMs whose operations have succeeded, and of the others.
func (a *Agent) recoveredMembers(ctx context.Context, group string, vms []string, kind op.Kind) (done, lost []string, err error) {
	for _, id := range vms {
		name, ok, err := a.recoveredMember(ctx, group, id, kind)
		switch {
		case err != nil:
			return nil, nil, err
		case ok:
			done = append(done, name)
		default:
			lost = append(lost, name)
		}
	}
	return done, lost, nil
}

// recoveredMember waits for the recovery of a member, and says whether it has what
// was asked for.
func (a *Agent) recoveredMember(ctx context.Context, group, vmID string, kind op.Kind) (name string, done bool, err error) {
	records, err := a.catalog.Operations(ctx, op.Filter{VMID: vmID, Limit: 20})
	if err != nil {
		return "", false, err
	}
	name = vmID
	for _, rec := range records {
		var req struct{ Group *Group } // of a snapshot's request, and of a restore's
		name = rec.VMName
		if rec.Kind != kind || json.Unmarshal(rec.Request, &req) != nil || req.Group == nil || req.Group.Operation != group {
			continue
		}
		if rec, err = a.ops.Wait(ctx, rec.ID); err != nil {
			select {
			case <-a.stopping:
				return name, false, op.ErrLeave
			default:
				return name, false, err
			}
		}
		return name, rec.State == op.Succeeded, nil
	}
	return name, false, nil
}
