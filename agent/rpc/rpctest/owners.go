package rpctest

import (
	"context"
	"slices"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// VMOf returns the name of a VM.
func (b *Backend) VMOf(ref string) (string, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, v := range b.vms {
		if ref == v.ID || ref == v.Name || ref == v.UUID && ref != "" {
			return v.Name, nil
		}
	}
	return "", fault.New(fault.NotFound, "there is no VM %q", ref)
}

// VMOfSnapshot returns the name of the VM of a snapshot.
func (b *Backend) VMOfSnapshot(ctx context.Context, ref string) (string, error) {
	s, err := b.Snapshot(ctx, ref)
	return s.VMName, err
}

// VMsOfGroup returns the names of the VMs that have a snapshot of a group.
func (b *Backend) VMsOfGroup(_ context.Context, ref string) ([]string, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var names []string
	for _, s := range b.snapshots {
		if g := s.Group; g != nil && (g.Name == ref || g.Operation == ref) && !slices.Contains(names, s.VMName) {
			names = append(names, s.VMName)
		}
	}
	if names == nil {
		return nil, fault.New(fault.NotFound, "there is no group %q", ref)
	}
	return names, nil
}

// VMsOfOperation returns the names of the VMs of an operation.
func (b *Backend) VMsOfOperation(ctx context.Context, id string) ([]string, error) {
	r, err := b.Operation(ctx, id)
	if err != nil {
		return nil, err
	}
	return r.VMs(), nil
}
