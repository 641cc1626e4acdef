package rpctest

import (
	"context"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
)

// ExportSnapshot is an error unless it is scripted.
func (b *Backend) ExportSnapshot(ctx context.Context, req agent.ExportRequest) (op.Record, error) {
	if f := b.scripted().Export; f != nil {
		return f(ctx, req)
	}
	return op.Record{}, fault.New(fault.Unsupported, "no script for exporting snapshots")
}

// CloneDisk is an error unless it is scripted.
func (b *Backend) CloneDisk(ctx context.Context, req agent.CloneDiskRequest) (op.Record, error) {
	if f := b.scripted().CloneDisk; f != nil {
		return f(ctx, req)
	}
	return op.Record{}, fault.New(fault.Unsupported, "no script for cloning disks")
}

// CloneVM is an error unless it is scripted.
func (b *Backend) CloneVM(ctx context.Context, req agent.CloneVMRequest) (op.Record, error) {
	if f := b.scripted().CloneVM; f != nil {
		return f(ctx, req)
	}
	return op.Record{}, fault.New(fault.Unsupported, "no script for cloning VMs")
}

// ForgetClone knows no clone.
func (b *Backend) ForgetClone(_ context.Context, path string) error {
	return fault.New(fault.NotFound, "no clone is known at %s", path)
}

// SetTemplate marks a snapshot.
func (b *Backend) SetTemplate(ctx context.Context, ref string, template bool) (agent.SnapshotView, error) {
	s, err := b.Snapshot(ctx, ref)
	if err != nil {
		return s, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.snapshots[b.index(ref)].Template = template
	s.Template = template
	return s, nil
}

// AttachDisk is an error unless it is scripted.
func (b *Backend) AttachDisk(ctx context.Context, req agent.AttachRequest) (op.Record, error) {
	if f := b.scripted().Attach; f != nil {
		return f(ctx, req)
	}
	return op.Record{}, fault.New(fault.Unsupported, "no script for attaching disks")
}

// DetachDisk is an error unless it is scripted.
func (b *Backend) DetachDisk(ctx context.Context, req agent.DetachRequest) (op.Record, error) {
	if f := b.scripted().Detach; f != nil {
		return f(ctx, req)
	}
	return op.Record{}, fault.New(fault.Unsupported, "no script for detaching disks")
}
