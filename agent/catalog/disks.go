package catalog

import (
	"context"

	"github.com/vmsnap/vmsnap/agent/fault"
)

const diskColumns = "id, vm, device, launch_path, launch_format, active_layer, settle_needed, removed, attached"

func scanDisk(row scanner) (Disk, error) {
	var d Disk
	err := row.Scan(&d.ID, &d.VMID, &d.Device, &d.LaunchPath, &d.LaunchFormat, &d.ActiveLayer, &d.SettleNeeded, &d.Removed, &d.Attached)
	return d, err
}

// selectDisk selects diskColumns, "" for no active layer.
const selectDisk = `SELECT id, vm, device, launch_path, launch_format, ifnull(active_layer, ''), settle_needed, removed, attached FROM disks`

// UpsertDisk records a disk and returns it as it is recorded. With an ID it
// replaces the disk of that ID; without, the one of the same VM and device that
// was not removed. A disk that is not known is added and gets an ID if it has
// none. All other fields are replaced. The active layer may be recorded later in
// the same transaction. It returns fault.NotFound for a VM that is not known and
// fault.Exists when another disk of the VM has the device.
func (c *Catalog) UpsertDisk(ctx context.Context, d Disk) (out Disk, err error) {
	err = c.Update(ctx, func(tx *Tx) error {
		out, err = tx.UpsertDisk(ctx, d)
		return err
	})
	return out, err
}

// UpsertDisk records a disk; see Catalog.UpsertDisk.
func (tx *Tx) UpsertDisk(ctx context.Context, d Disk) (Disk, error) {
	if _, err := tx.VM(ctx, d.VMID); err != nil {
		return Disk{}, err
	}
	same, known, err := queryOne(ctx, tx.reader, scanDisk, selectDisk+" WHERE vm = ? AND device = ? AND removed = 0", d.VMID, d.Device)
	switch {
	case err != nil:
		return Disk{}, err
	case known && d.ID == "":
		d.ID = same.ID
	case known && d.ID != same.ID && !d.Removed:
		return Disk{}, fault.New(fault.Exists, "VM %q has another disk %q", tx.vmName(ctx, d.VMID), d.Device)
	case d.ID == "":
		if d.ID, err = tx.freeID(ctx, "disks"); err != nil {
			return Disk{}, err
		}
	}
	_, err = tx.exec(ctx, `
		INSERT INTO disks (`+diskColumns+`) VALUES (?, ?, ?, ?, ?, nullif(?, ''), ?, ?, ?)
		ON CONFLICT (id) DO UPDATE SET vm = excluded.vm, device = excluded.device, launch_path = excluded.launch_path,
			launch_format = excluded.launch_format, active_layer = excluded.active_layer,
			settle_needed = excluded.settle_needed, removed = excluded.removed, attached = excluded.attached`,
		d.ID, d.VMID, d.Device, d.LaunchPath, d.LaunchFormat, d.ActiveLayer, d.SettleNeeded, d.Removed, d.Attached)
	return d, err
}

// Disks returns the disks of a VM by device, removed ones included.
func (r reader) Disks(ctx context.Context, vmID string) ([]Disk, error) {
	return query(ctx, r, scanDisk, selectDisk+" WHERE vm = ? ORDER BY device, removed, id", vmID)
}
