package rpctest

import (
	"context"
	"iter"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
)

// Script replaces what methods of a Backend do. A nil member leaves the method
// as it is.
type Script struct {
	Create      func(context.Context, agent.SnapshotRequest) (op.Record, error)
	Plan        func(context.Context, agent.SnapshotRequest) (agent.Plan, error)
	Verify      func(ctx context.Context, ref string, uid uint32) (op.Record, error)
	PlanRestore func(context.Context, agent.RestoreRequest) (agent.RestorePlan, error)
	Restore     func(context.Context, agent.RestoreRequest) (op.Record, error)
	PlanDelete  func(context.Context, agent.DeleteRequest) (agent.DeletePlan, error)
	Delete      func(context.Context, agent.DeleteRequest) (op.Record, error)
	OpenPreview func(context.Context, agent.PreviewRequest) (op.Record, error)
	Export      func(context.Context, agent.ExportRequest) (op.Record, error)
	Attach      func(context.Context, agent.AttachRequest) (op.Record, error)
	Detach      func(context.Context, agent.DetachRequest) (op.Record, error)
	CloneDisk   func(context.Context, agent.CloneDiskRequest) (op.Record, error)
	CloneVM     func(context.Context, agent.CloneVMRequest) (op.Record, error)
	Freeze      func(context.Context, agent.FreezeRequest) (agent.FreezeView, error)
	Thaw        func(context.Context, string) (agent.ThawResult, error)
	Forget      func(context.Context, string, bool) ([]string, error)
	Cancel      func(context.Context, string) (op.Record, error)
	VM          func(context.Context, string) (agent.VMView, error)
}

// Backend is a backend in memory.
type Backend struct {
	mu         sync.Mutex
	script     Script
	vms        []agent.VMView
	discovery  agent.Discovery
	snapshots  []agent.SnapshotView
	operations []op.Record
	changed    chan struct{} // closed and replaced at each change of an operation
	events     events
	schedules  []agent.ScheduleView
}

// NewBackend returns a backend that knows nothing.
func NewBackend() *Backend {
	return &Backend{changed: make(chan struct{}), discovery: agent.Discovery{Source: "netlink"}}
}

// Script sets what methods do.
func (b *Backend) Script(s Script) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.script = s
}

func (b *Backend) scripted() Script {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.script
}

// SetDiscovery sets how processes are said to be found.
func (b *Backend) SetDiscovery(d agent.Discovery) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.discovery = d
}

// AddVM adds a VM.
func (b *Backend) AddVM(v agent.VMView) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.vms = append(b.vms, v)
}

// AddSnapshot adds a snapshot.
func (b *Backend) AddSnapshot(s agent.SnapshotView) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.snapshots = append(b.snapshots, s)
}

// PutOperation adds an operation or replaces the one of the same id, with the
// next revision, and tells those who watch it.
func (b *Backend) PutOperation(r op.Record) op.Record {
	b.mu.Lock()
	defer b.mu.Unlock()
	r.Revision = 1
	if i := slices.IndexFunc(b.operations, func(o op.Record) bool { return o.ID == r.ID }); i >= 0 {
		r.Revision = b.operations[i].Revision + 1
		b.operations[i] = r
	} else {
		b.operations = append(b.operations, r)
	}
	close(b.changed)
	b.changed = make(chan struct{})
	return r
}

// VMs returns the VMs that were added.
func (b *Backend) VMs(context.Context) ([]agent.VMView, agent.Discovery) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.vms), b.discovery
}

// VM returns one VM.
func (b *Backend) VM(ctx context.Context, ref string) (agent.VMView, error) {
	if f := b.scripted().VM; f != nil {
		return f(ctx, ref)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, v := range b.vms {
		if ref == v.ID || ref == v.Name || ref == v.UUID {
			return v, nil
		}
	}
	return agent.VMView{}, fault.New(fault.NotFound, "there is no VM %q", ref).
		WithHint("vmsnap vm list shows the VMs of this host")
}

// Forget forgets nothing and names two layers.
func (b *Backend) Forget(ctx context.Context, ref string, release bool) ([]string, error) {
	if f := b.scripted().Forget; f != nil {
		return f(ctx, ref, release)
	}
	if _, err := b.VM(ctx, ref); err != nil {
		return nil, err
	}
	return []string{"/srv/vm/" + ref + "/root.qcow2", "/srv/vm/" + ref + "/root.7f3a.qcow2"}, nil
}

// Freeze says that two of two file systems are frozen from Now on.
func (b *Backend) Freeze(ctx context.Context, req agent.FreezeRequest) (agent.FreezeView, error) {
	if f := b.scripted().Freeze; f != nil {
		return f(ctx, req)
	}
	if _, err := b.VM(ctx, req.VM); err != nil {
		return agent.FreezeView{}, err
	}
	lease := req.Lease
	if lease == 0 {
		lease = agent.DefaultLease
	}
	return agent.FreezeView{Since: Now, Deadline: Now.Add(lease), Frozen: 2, Total: 2, Operation: "0badcafe"}, nil
}

// Thaw says that the guest was frozen for 1.25 s.
func (b *Backend) Thaw(ctx context.Context, ref string) (agent.ThawResult, error) {
	if f := b.scripted().Thaw; f != nil {
		return f(ctx, ref)
	}
	if _, err := b.VM(ctx, ref); err != nil {
		return agent.ThawResult{}, err
	}
	return agent.ThawResult{WasFrozen: true, Window: 1250 * time.Millisecond}, nil
}

// Diagnose finds the VM's problems, and skips one at which an operation works.
func (b *Backend) Diagnose(ctx context.Context, req agent.DoctorRequest) (agent.Diagnosis, error) {
	v, err := b.VM(ctx, req.VM)
	var d agent.Diagnosis
	for _, p := range v.Problems {
		d.Findings = append(d.Findings, agent.Finding{Code: p.Code, Message: p.Message, Hint: p.Hint, Repair: "end the other client", Repairable: true})
	}
	if v.Operation != "" {
		d.Skipped = "operation " + v.Operation + " is at work on it"
	}
	return d, err
}

// Repair repairs them.
func (b *Backend) Repair(ctx context.Context, req agent.DoctorRequest) (agent.Diagnosis, error) {
	d, err := b.Diagnose(ctx, req)
	for i := range d.Findings {
		d.Findings[i].Repaired = true
	}
	return d, err
}

// CheckHost finds a host at which something works, something is lost, and
// something is broken.
func (b *Backend) CheckHost(context.Context) ([]agent.HostCheck, error) {
	return []agent.HostCheck{
		{Code: "kernel", State: agent.HostWorks, Message: "Linux 6.1.0"},
		{Code: "immutable-flag", State: agent.HostLimited, Message: "vmsnapd may not set the immutable flag", Hint: "give it CAP_LINUX_IMMUTABLE"},
		{Code: "vm-sockets", State: agent.HostBroken, Message: "VM legacy: monitor-busy: another client holds its monitor", Hint: "end the other client"},
	}, nil
}

// RebuildCatalog finds one VM, and skips a manifest.
func (b *Backend) RebuildCatalog(_ context.Context, dirs []string) (agent.Rebuilt, error) {
	var r agent.Rebuilt
	for _, dir := range dirs {
		r.VMs = append(r.VMs, agent.RebuiltVM{ID: "5f0c1a2b", Name: "web", Layers: 3, Snapshots: 2})
		r.Skipped = append(r.Skipped, dir+"/.vmsnap/a1b2c3d4.json: unexpected end of JSON input")
	}
	return r, nil
}

// PlanSnapshot plans a snapshot of a running VM with nothing in its way.
func (b *Backend) PlanSnapshot(ctx context.Context, req agent.SnapshotRequest) (agent.Plan, error) {
	if f := b.scripted().Plan; f != nil {
		return f(ctx, req)
	}
	if _, err := b.VM(ctx, req.VM); err != nil {
		return agent.Plan{}, err
	}
	return SamplePlan(req), nil
}

// CreateGroup is refused: it takes real VMs.
func (b *Backend) CreateGroup(context.Context, agent.GroupRequest) (op.Record, error) {
	return op.Record{}, fault.New(fault.Unsupported, "this backend has no groups")
}

// RestoreGroup is refused: it takes real VMs.
func (b *Backend) RestoreGroup(context.Context, agent.GroupRestoreRequest) (op.Record, error) {
	return op.Record{}, fault.New(fault.Unsupported, "this backend has no groups")
}

// CreateSnapshot is an error unless it is scripted.
func (b *Backend) CreateSnapshot(ctx context.Context, req agent.SnapshotRequest) (op.Record, error) {
	if f := b.scripted().Create; f != nil {
		return f(ctx, req)
	}
	return op.Record{}, fault.New(fault.Unsupported, "no script for creating snapshots")
}

// Snapshots returns the snapshots that were added and that the filter leaves,
// the newest first.
func (b *Backend) Snapshots(ctx context.Context, filter agent.SnapshotFilter) ([]agent.SnapshotView, error) {
	if filter.VM != "" {
		if _, err := b.VM(ctx, filter.VM); err != nil {
			return nil, err
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []agent.SnapshotView
	for _, s := range b.snapshots {
		if (filter.VM == "" || filter.VM == s.VMName || filter.VM == s.VMID) && hasLabels(s.Labels, filter.Labels) &&
			(filter.Visible == nil || filter.Visible(s.VMID, s.VMName)) {
			out = append(out, s)
		}
	}
	slices.SortStableFunc(out, func(x, y agent.SnapshotView) int { return y.Created.Compare(x.Created) })
	return out, nil
}

func hasLabels(have, wanted map[string]string) bool {
	for key, value := range wanted {
		if got, ok := have[key]; !ok || got != value {
			return false
		}
	}
	return true
}

// Snapshot returns one snapshot, by VM/NAME or id.
func (b *Backend) Snapshot(_ context.Context, ref string) (agent.SnapshotView, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if i := b.index(ref); i >= 0 {
		return b.snapshots[i], nil
	}
	return agent.SnapshotView{}, fault.New(fault.NotFound, "there is no snapshot %q", ref).
		WithHint("vmsnap snapshot list shows the snapshots")
}

func (b *Backend) index(ref string) int {
	return slices.IndexFunc(b.snapshots, func(s agent.SnapshotView) bool {
		return ref == s.ID || ref == s.VMName+"/"+s.Name
	})
}

// VerifySnapshot is an error unless it is scripted.
func (b *Backend) VerifySnapshot(ctx context.Context, ref string, uid uint32) (op.Record, error) {
	if f := b.scripted().Verify; f != nil {
		return f(ctx, ref, uid)
	}
	return op.Record{}, fault.New(fault.Unsupported, "no script for verifying snapshots")
}

// PlanRestore is an error unless it is scripted.
func (b *Backend) PlanRestore(ctx context.Context, req agent.RestoreRequest) (agent.RestorePlan, error) {
	if f := b.scripted().PlanRestore; f != nil {
		return f(ctx, req)
	}
	return agent.RestorePlan{}, fault.New(fault.Unsupported, "no script for planning restores")
}

// RestoreSnapshot is an error unless it is scripted.
func (b *Backend) RestoreSnapshot(ctx context.Context, req agent.RestoreRequest) (op.Record, error) {
	if f := b.scripted().Restore; f != nil {
		return f(ctx, req)
	}
	return op.Record{}, fault.New(fault.Unsupported, "no script for restoring snapshots")
}

// PreviewSnapshot is an error unless it is scripted.
func (b *Backend) PreviewSnapshot(ctx context.Context, req agent.PreviewRequest) (op.Record, error) {
	if f := b.scripted().OpenPreview; f != nil {
		return f(ctx, req)
	}
	return op.Record{}, fault.New(fault.Unsupported, "no script for previews")
}

// Preview is an error: no VM runs one.
func (b *Backend) Preview(_ context.Context, vm string) (agent.PreviewView, error) {
	return agent.PreviewView{}, fault.New(fault.NotFound, "VM %s runs no preview", vm)
}

// CommitPreview is an error: no VM runs one.
func (b *Backend) CommitPreview(_ context.Context, vm string, _ uint32) (op.Record, error) {
	return op.Record{}, fault.New(fault.NotFound, "VM %s runs no preview", vm)
}

// UndoPreview is an error: no VM runs one.
func (b *Backend) UndoPreview(_ context.Context, vm string, _ uint32) (op.Record, error) {
	return op.Record{}, fault.New(fault.NotFound, "VM %s runs no preview", vm)
}

// RenameSnapshot renames a snapshot.
func (b *Backend) RenameSnapshot(ctx context.Context, ref, newName string) (agent.SnapshotView, error) {
	s, err := b.Snapshot(ctx, ref)
	if err != nil {
		return s, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.index(s.VMName+"/"+newName) >= 0 {
		return s, fault.New(fault.Exists, "VM %q has a snapshot %q already", s.VMName, newName)
	}
	b.snapshots[b.index(ref)].Name = newName
	s.Name = newName
	return s, nil
}

// Operations returns the operations that were put, the newest first.
func (b *Backend) Operations(_ context.Context, filter agent.OperationFilter) ([]op.Record, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []op.Record
	for _, r := range slices.Backward(b.operations) {
		if (filter.VM == "" || filter.VM == r.VMName) && (!filter.Active || !r.State.Final()) &&
			(filter.Visible == nil || filter.Visible(r.VMID, r.VMName)) {
			out = append(out, r)
		}
	}
	if filter.Limit > 0 && len(out) > filter.Limit {
		out = out[:filter.Limit]
	}
	return out, nil
}

// Operation returns one operation.
func (b *Backend) Operation(_ context.Context, id string) (op.Record, error) {
	r, _, err := b.operation(id)
	return r, err
}

// operation also returns what is closed at the next change of any operation.
func (b *Backend) operation(id string) (op.Record, <-chan struct{}, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, r := range b.operations {
		if strings.EqualFold(r.ID, id) {
			return r, b.changed, nil
		}
	}
	return op.Record{}, nil, fault.New(fault.NotFound, "there is no operation %q", id)
}

// WatchOperation yields an operation as it is and after each PutOperation.
func (b *Backend) WatchOperation(ctx context.Context, id string) iter.Seq2[op.Record, error] {
	return func(yield func(op.Record, error) bool) {
		var seen uint64
		for {
			r, changed, err := b.operation(id)
			if err != nil {
				yield(op.Record{}, err)
				return
			}
			if r.Revision != seen {
				seen = r.Revision
				if !yield(r, nil) || r.State.Final() {
					return
				}
			}
			select {
			case <-changed:
			case <-ctx.Done():
				yield(op.Record{}, ctx.Err())
				return
			}
		}
	}
}

// CancelOperation cancels an operation at once.
func (b *Backend) CancelOperation(ctx context.Context, id string) (op.Record, error) {
	if f := b.scripted().Cancel; f != nil {
		return f(ctx, id)
	}
	r, _, err := b.operation(id)
	switch {
	case err != nil:
		return r, err
	case r.State.Final():
		return r, fault.New(fault.TooLate, "operation %s has ended already", id)
	}
	r.State = op.Cancelled
	r.Failure = &op.Failure{Kind: fault.Cancelled, Message: "the snapshot was cancelled"}
	r.Ended = Now
	return b.PutOperation(r), nil
}
