package agent

import (
	"context"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/hook"
	"github.com/vmsnap/vmsnap/agent/op"
)

// hooked sets up the hooks around the cut.
func (c *cut) hooked() {
	c.hooks = c.hooksOf(c.o, c.vm, op.KindSnapshot, c.req.UID)
	c.hooks.warn = func(w op.Warning) { c.warn(w.Code, w.Disk, w.Message) }
	c.hooks.snapshot = c.told
	c.hooks.choose(c.req)
	c.o.OnFailure(c.hooks.failed)
}

// choose takes the directory that a profile names.
func (h *hooks) choose(req SnapshotRequest) {
	if req.Hooks != nil {
		h.dir = *req.Hooks
	}
}

// told is what hooks are told of the snapshot.
func (c *cut) told(ctx context.Context) *hook.Snapshot {
	if c.taken != nil {
		return c.toldOf(ctx, *c.taken)
	}
	s := &hook.Snapshot{Name: c.req.Name, Labels: c.req.Labels, Memory: c.req.Memory, Quiesce: string(c.req.Quiesce), Disks: []string{}}
	for _, d := range c.disks {
		s.Disks = append(s.Disks, d.Device)
	}
	return s
}

// toldOf is what hooks are told of a snapshot that is recorded.
func (a *Agent) toldOf(ctx context.Context, taken catalog.Snapshot) *hook.Snapshot {
	s := &hook.Snapshot{
		ID: taken.ID, Name: taken.Name, Labels: taken.Labels, Memory: taken.Memory != nil, Quiesce: taken.Quiesce.Requested,
		Consistency: string(taken.Consistency), Disks: []string{},
	}
	for _, d := range taken.Disks {
		if d.Excluded {
			continue
		}
		s.Disks = append(s.Disks, d.Device)
		if l, err := a.catalog.Layer(ctx, d.LayerID); err == nil { // else it is told without
			s.Layers = append(s.Layers, hook.Layer{Disk: d.Device, Path: l.Path, Format: l.Format})
		}
	}
	return s
}

// restoreHooks runs the hooks before a restore. Those after it are owed.
func (a *Agent) restoreHooks(ctx context.Context, o *op.Op, v *vm, s catalog.Snapshot, req RestoreRequest) (*hooks, error) {
	h := a.hooksOf(o, v, op.KindRestore, req.UID)
	h.snapshot = func(ctx context.Context) *hook.Snapshot { return a.toldOf(ctx, s) }
	o.OnFailure(h.failed)
	return h, h.before(ctx, hook.PreRestore, hook.PostRestore)
}

// ended lets the hooks follow a snapshot that is recorded.
func (c *cut) ended(ctx context.Context) { c.hooks.last(ctx, hook.PostSnapshot, nil) }
