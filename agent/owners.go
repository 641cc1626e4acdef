package agent

import (
	"context"

	"github.com/vmsnap/vmsnap/agent/catalog"
)

// Visible reports whether a caller may see what belongs to a VM. vmID is empty of
// what belongs to several, whose names are separated by commas then, or to none.
// A nil one lets all be seen.
type Visible func(vmID, vmName string) bool

// VMOf returns the name of the VM that a name, UUID or id means.
func (a *Agent) VMOf(ref string) (string, error) {
	v, err := a.find(ref)
	if err != nil {
		return "", err
	}
	return v.name(), nil
}

// VMOfSnapshot returns the name of the VM of a snapshot, which is given as VM/NAME
// or id.
func (a *Agent) VMOfSnapshot(ctx context.Context, ref string) (string, error) {
	s, err := a.findSnapshot(ctx, ref)
	if err != nil {
		return "", err
	}
	return a.vmNameOf(s), nil
}

// vmNameOf returns what the VM of a snapshot is called now.
func (a *Agent) vmNameOf(s catalog.Snapshot) string {
	if v := a.byID(s.VMID); v != nil {
		return v.name()
	}
	return s.VMName
}

// VMsOfGroup returns the names of the VMs of a group of snapshots.
func (a *Agent) VMsOfGroup(ctx context.Context, ref string) ([]string, error) {
	snapshots, err := a.groupSnapshots(ctx, ref)
	names := make([]string, len(snapshots))
	for i, s := range snapshots {
		names[i] = a.vmNameOf(s)
	}
	return names, err
}

// VMsOfOperation returns the names of the VMs of an operation.
func (a *Agent) VMsOfOperation(ctx context.Context, id string) ([]string, error) {
	rec, err := a.ops.Operation(ctx, id)
	if err != nil {
		return nil, err
	}
	return rec.VMs(), nil
}
