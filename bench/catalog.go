package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"connectrpc.com/connect"
	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/agent/catalog"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/internal/daemon"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// A large catalog: its VMs are stopped, and no file of theirs is there.
const (
	catalogVMs       = 500
	catalogSnapshots = 100 // of each VM
	catalogShort     = 20  // times fewer VMs in a short run
)

// large is what was measured with a large catalog.
type large struct {
	snapshots int
	ready     time.Duration
	resident  int64           // bytes, when it is ready
	lists     []time.Duration // of one VM's snapshots
}

// measureCatalog measures vmsnapd with a catalog of ever more snapshots.
func measureCatalog(ctx context.Context, c config, r *report, qemu string) (err error) {
	sizes := []int{catalogVMs / 5, catalogVMs / 2, catalogVMs}
	if c.short {
		sizes = []int{catalogVMs / catalogShort}
	}
	dir, err := os.MkdirTemp("", "vmsnap-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, testvm.RemoveAll(dir)) }()
	state := filepath.Join(dir, "state")
	if err := os.Mkdir(state, 0o700); err != nil {
		return err
	}
	filled := 0
	for _, vms := range sizes {
		one := large{snapshots: vms * catalogSnapshots}
		progress("%d snapshots in the catalog", one.snapshots)
		if err := fillCatalog(ctx, state, filled, vms); err != nil {
			return fmt.Errorf("fill the catalog: %w", err)
		}
		filled = vms
		if err := one.measure(ctx, dir, vms); err != nil {
			return err
		}
		r.addCatalog(qemu, one)
	}
	return nil
}

// measure measures a vmsnapd whose catalog has so many VMs.
func (one *large) measure(ctx context.Context, dir string, vms int) (err error) {
	d, err := daemon.Start(ctx, daemon.Config{Binary: vmsnapdPath, Dir: dir})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Stop()) }()
	one.ready = d.Ready
	u, err := usageOf(d.PID())
	if err != nil {
		return err
	}
	one.resident = u.resident
	for i := range shortCalls {
		began := time.Now()
		res, err := d.Snapshots().ListSnapshots(ctx, connect.NewRequest(&vmsnapv1.ListSnapshotsRequest{Vm: catalogVM(i % vms)}))
		if err != nil {
			return err
		}
		if n := len(res.Msg.GetSnapshots()); n != catalogSnapshots {
			return fmt.Errorf("%s has %d snapshots, not %d", catalogVM(i%vms), n, catalogSnapshots)
		}
		one.lists = append(one.lists, time.Since(began))
	}
	return nil
}

func catalogVM(i int) string { return fmt.Sprintf("vm%04d", i) }

// fillCatalog adds VMs from one number up to another.
func fillCatalog(ctx context.Context, dir string, from, to int) (err error) {
	cat, err := catalog.Open(ctx, dir, hclog.NewNullLogger())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cat.Close()) }()
	for i := from; i < to; i++ {
		if err := cat.Update(ctx, func(tx *catalog.Tx) error { return fillVM(ctx, tx, catalogVM(i)) }); err != nil {
			return err
		}
	}
	return nil
}

// fillVM records a VM with a disk and its snapshots, each on a layer.
func fillVM(ctx context.Context, tx *catalog.Tx, name string) error {
	now := time.Now()
	vm, err := tx.UpsertVM(ctx, catalog.VM{Name: name, Identity: "name:" + name, FirstSeen: now, LastSeen: now, Stopped: "shutdown"})
	if err != nil {
		return err
	}
	dir := "/nowhere/" + name
	disk := catalog.Disk{VMID: vm.ID, Device: "root", LaunchPath: dir + "/root.qcow2", LaunchFormat: "qcow2"}
	if disk, err = tx.UpsertDisk(ctx, disk); err != nil {
		return err
	}
	parent := ""
	for i := range catalogSnapshots {
		id := fmt.Sprintf("%s-%03d", name, i)
		layer := catalog.Layer{
			ID: id, DiskID: disk.ID, Parent: parent, Path: dir + "/" + id + ".qcow2", Format: "qcow2", VirtualSize: 8 << 20,
			Covered: true, Created: now,
		}
		err := tx.CommitSnapshot(ctx, catalog.Commit{
			Layers: []catalog.Layer{layer},
			Snapshot: catalog.Snapshot{
				ID: id, VMID: vm.ID, VMName: name, Name: fmt.Sprintf("s%03d", i), Created: now, Consistency: catalog.Filesystem,
				Labels: map[string]string{"schedule": "nightly"},
				Disks:  []catalog.SnapshotDisk{{DiskID: disk.ID, Device: disk.Device, LayerID: id, Size: layer.VirtualSize}},
			},
		})
		if err != nil {
			return err
		}
		parent = id
	}
	return nil
}

func (r *report) addCatalog(qemu string, one large) {
	add := func(measure, ours, allowed string, ratio float64) {
		w := row{measure: fmt.Sprintf("%d snapshots in the catalog: %s", one.snapshots, measure), qemu: qemu, ours: ours}
		if ratio > 0 {
			w.rival, w.ratio, w.budget = allowed+" allowed", ratio, 1
		}
		r.rows = append(r.rows, w)
	}
	add("ready", short(one.ready), short(maxReady), float64(one.ready)/float64(maxReady))
	add("resident memory", mib(one.resident), "", 0)
	add(fmt.Sprintf("the %d of a VM, p99", catalogSnapshots), short(quantile(one.lists, 0.99)), "", 0)
	r.run(fmt.Sprintf("Catalog/snapshots=%d", one.snapshots), median(one.lists),
		measurement{"ready-ns", int64(one.ready)}, measurement{"resident-bytes", one.resident})
}
