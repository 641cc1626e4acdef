package catalog

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/vmsnap/vmsnap/agent/fault"
)

const snapshotColumns = `id, vm, vm_name, name, description, labels, created, consistency,
	quiesce_requested, quiesce_reason, quiesce_frozen, quiesce_total, freeze_window,
	warnings, operation, config, partial, memory, automatic, group_cut, template, state, expires`

// selectSnapshot selects snapshotColumns and the disks as JSON, so that one
// statement tells a snapshot whole.
const selectSnapshot = `SELECT ` + snapshotColumns + `,
	(SELECT json_group_array(json_object('disk', ifnull(d.disk, ''), 'device', d.device, 'layer', ifnull(d.layer, ''),
		'size', d.size, 'excluded', d.excluded) ORDER BY d.position)
	 FROM snapshot_disks d WHERE d.snapshot = s.id)
	FROM snapshots s`

func scanSnapshot(row scanner) (Snapshot, error) {
	var s Snapshot
	err := row.Scan(&s.ID, &s.VMID, &s.VMName, &s.Name, &s.Description, jsonColumn{&s.Labels}, timeColumn{&s.Created}, &s.Consistency,
		&s.Quiesce.Requested, &s.Quiesce.Reason, &s.Quiesce.Frozen, &s.Quiesce.Total, &s.Quiesce.Window,
		jsonColumn{&s.Warnings}, &s.Operation, rawColumn{&s.Config}, &s.Partial, jsonColumn{&s.Memory}, &s.Automatic, jsonColumn{&s.Group}, &s.Template, &s.State,
		timeColumn{&s.Expires}, diskColumn{&s.Disks})
	return s, err
}

// diskColumn reads the disks of a snapshot.
type diskColumn struct{ disks *[]SnapshotDisk }

// Scan implements sql.Scanner.
func (c diskColumn) Scan(v any) error {
	var rows []struct {
		Disk, Device, Layer string
		Size                int64
		Excluded            int
	}
	if err := (jsonColumn{&rows}).Scan(v); err != nil {
		return err
	}
	*c.disks = nil
	for _, d := range rows {
		*c.disks = append(*c.disks, SnapshotDisk{
			DiskID: d.Disk, Device: d.Device, LayerID: d.Layer, Size: uint64(d.Size), Excluded: d.Excluded != 0,
		})
	}
	return nil
}

// Commit is a new snapshot with what its cut changed.
type Commit struct {
	Snapshot Snapshot // with an ID
	Layers   []Layer  // to be recorded as by PutLayer
	Disks    []Disk   // to be recorded as by UpsertDisk
}

// CommitSnapshot records a snapshot, its layers and its disks, all or nothing.
// It returns fault.Exists when the VM has a snapshot of that name.
func (c *Catalog) CommitSnapshot(ctx context.Context, n Commit) error {
	return c.Update(ctx, func(tx *Tx) error { return tx.CommitSnapshot(ctx, n) })
}

// CommitSnapshot records a snapshot; see Catalog.CommitSnapshot.
func (tx *Tx) CommitSnapshot(ctx context.Context, n Commit) error {
	s := n.Snapshot
	if s.ID == "" {
		return fault.New(fault.Usage, "snapshot %q has no id", s.Name)
	}
	for _, d := range n.Disks {
		if _, err := tx.UpsertDisk(ctx, d); err != nil {
			return fmt.Errorf("commit snapshot %q: %w", s.Name, err)
		}
	}
	for _, l := range n.Layers {
		if err := tx.PutLayer(ctx, l); err != nil {
			return fmt.Errorf("commit snapshot %q: %w", s.Name, err)
		}
	}
	if _, err := tx.VM(ctx, s.VMID); err != nil {
		return fmt.Errorf("commit snapshot %q: %w", s.Name, err)
	}
	if err := tx.nameFree(ctx, s.VMID, s.Name); err != nil {
		return err
	}
	return tx.insertSnapshot(ctx, s)
}

func (tx *Tx) insertSnapshot(ctx context.Context, s Snapshot) error {
	labels, err := jsonText(s.Labels)
	if err != nil {
		return err
	}
	warnings, err := jsonText(s.Warnings)
	if err != nil {
		return err
	}
	if len(s.Config) > 0 && !json.Valid(s.Config) {
		return fault.New(fault.Usage, "the configuration in snapshot %q is not JSON", s.Name)
	}
	memory, err := jsonText(s.Memory)
	if err != nil {
		return err
	}
	group, err := jsonText(s.Group)
	if err != nil {
		return err
	}
	_, err = tx.exec(ctx, `INSERT INTO snapshots (`+snapshotColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		s.ID, s.VMID, s.VMName, s.Name, s.Description, labels, nanos(s.Created), s.Consistency,
		s.Quiesce.Requested, s.Quiesce.Reason, s.Quiesce.Frozen, s.Quiesce.Total, int64(s.Quiesce.Window),
		warnings, s.Operation, string(s.Config), s.Partial, memory, s.Automatic, group, s.Template, cmp.Or(s.State, PointValid), nanos(s.Expires))
	if err != nil {
		return err
	}
	for i, d := range s.Disks {
		_, err := tx.exec(ctx, `INSERT INTO snapshot_disks (snapshot, position, disk, device, layer, size, excluded)
			VALUES (?, ?, nullif(?, ''), ?, nullif(?, ''), ?, ?)`,
			s.ID, i, d.DiskID, d.Device, d.LayerID, int64(d.Size), d.Excluded)
		if err != nil {
			return err
		}
	}
	return nil
}

// nameFree fails with fault.Exists when a VM has a snapshot of a name.
func (tx *Tx) nameFree(ctx context.Context, vmID, name string) error {
	_, taken, err := queryOne(ctx, tx.reader, scanValue[string], "SELECT id FROM snapshots WHERE vm = ? AND name = ?", vmID, name)
	if err == nil && taken {
		err = fault.New(fault.Exists, "VM %q has a snapshot %q already", tx.vmName(ctx, vmID), name)
	}
	return err
}

// Snapshot returns a snapshot or fault.NotFound.
func (r reader) Snapshot(ctx context.Context, id string) (Snapshot, error) {
	s, ok, err := queryOne(ctx, r, scanSnapshot, selectSnapshot+" WHERE id = ?", id)
	if err == nil && !ok {
		err = notFound("no snapshot with the id %q", id)
	}
	return s, err
}

// SnapshotByName returns a VM's snapshot of a name or fault.NotFound.
func (r reader) SnapshotByName(ctx context.Context, vmID, name string) (Snapshot, error) {
	s, ok, err := queryOne(ctx, r, scanSnapshot, selectSnapshot+" WHERE vm = ? AND name = ?", vmID, name)
	if err == nil && !ok {
		err = notFound("no snapshot %q of VM %q", name, r.vmName(ctx, vmID))
	}
	return s, err
}

// Snapshots returns the snapshots of a VM, or of all VMs when vmID is empty, the
// newest cut first.
func (r reader) Snapshots(ctx context.Context, vmID string) ([]Snapshot, error) {
	if vmID == "" {
		return query(ctx, r, scanSnapshot, selectSnapshot+" ORDER BY created DESC, seq DESC")
	}
	return query(ctx, r, scanSnapshot, selectSnapshot+" WHERE vm = ? ORDER BY created DESC, seq DESC", vmID)
}

// Expiring returns the snapshots that are to be deleted by themselves, those whose
// time comes first before the others.
func (r reader) Expiring(ctx context.Context) ([]Snapshot, error) {
	return query(ctx, r, scanSnapshot, selectSnapshot+" WHERE expires > 0 ORDER BY expires, seq")
}

// CountSnapshots returns how many snapshots a VM has.
func (r reader) CountSnapshots(ctx context.Context, vmID string) (int, error) {
	n, _, err := queryOne(ctx, r, scanValue[int], "SELECT count(*) FROM snapshots WHERE vm = ?", vmID)
	return n, err
}

// RenameSnapshot gives a snapshot another name. It returns fault.NotFound when
// there is no such snapshot, and fault.Exists when its VM has another one of
// that name.
func (c *Catalog) RenameSnapshot(ctx context.Context, id, name string) error {
	return c.Update(ctx, func(tx *Tx) error { return tx.RenameSnapshot(ctx, id, name) })
}

// RenameSnapshot gives a snapshot another name; see Catalog.RenameSnapshot.
func (tx *Tx) RenameSnapshot(ctx context.Context, id, name string) error {
	s, err := tx.Snapshot(ctx, id)
	if err != nil || s.Name == name {
		return err
	}
	if err := tx.nameFree(ctx, s.VMID, name); err != nil {
		return err
	}
	_, err = tx.exec(ctx, "UPDATE snapshots SET name = ? WHERE id = ?", name, id)
	return err
}

// DeleteSnapshot forgets a snapshot. Its layers stay. It returns fault.NotFound
// when there is no such snapshot, and fault.Denied when it is a template.
func (c *Catalog) DeleteSnapshot(ctx context.Context, id string) error {
	return c.Update(ctx, func(tx *Tx) error { return tx.DeleteSnapshot(ctx, id) })
}

// DeleteSnapshot forgets a snapshot; see Catalog.DeleteSnapshot.
func (tx *Tx) DeleteSnapshot(ctx context.Context, id string) error {
	s, err := tx.Snapshot(ctx, id)
	if err == nil && s.Template {
		err = fault.New(fault.Denied, "snapshot %s/%s is a template", s.VMName, s.Name).
			WithHint("vmsnap snapshot template %s/%s --off makes it a snapshot like others", s.VMName, s.Name)
	}
	if err != nil {
		return err
	}
	n, err := tx.exec(ctx, "DELETE FROM snapshots WHERE id = ?", id)
	if err == nil && n == 0 {
		err = notFound("no snapshot with the id %q", id)
	}
	return err
}

// SetSnapshotState says whether what a snapshot holds can be restored. It
// returns fault.NotFound when there is no such snapshot.
func (tx *Tx) SetSnapshotState(ctx context.Context, id string, state PointState) error {
	n, err := tx.exec(ctx, "UPDATE snapshots SET state = ? WHERE id = ?", state, id)
	if err == nil && n == 0 {
		err = notFound("no snapshot with the id %q", id)
	}
	return err
}

// DropPoint takes a layer from the snapshots that cannot be restored any more,
// so that it can be forgotten. Those that can keep it.
func (tx *Tx) DropPoint(ctx context.Context, layerID string) error {
	_, err := tx.exec(ctx, `UPDATE snapshot_disks SET layer = NULL WHERE layer = ?
		AND snapshot IN (SELECT id FROM snapshots WHERE state <> 'valid')`, layerID)
	return err
}

// LastFreezeWindow returns the freeze window of the newest snapshot of a VM that
// froze the guest, if there is one.
func (r reader) LastFreezeWindow(ctx context.Context, vmID string) (time.Duration, bool, error) {
	return queryOne(ctx, r, scanValue[time.Duration],
		"SELECT freeze_window FROM snapshots WHERE vm = ? AND freeze_window > 0 ORDER BY created DESC, seq DESC LIMIT 1", vmID)
}

// LastSaveRate returns how fast the newest memory of a VM was saved, in bytes a
// second, or 0 if none was.
func (r reader) LastSaveRate(ctx context.Context, vmID string) (uint64, error) {
	text, found, err := queryOne(ctx, r, scanValue[string],
		"SELECT memory FROM snapshots WHERE vm = ? AND memory <> 'null' ORDER BY created DESC, seq DESC LIMIT 1", vmID)
	if err != nil || !found {
		return 0, err
	}
	var m SavedMemory
	if err := json.Unmarshal([]byte(text), &m); err != nil || m.Duration <= 0 {
		return 0, err
	}
	return uint64(float64(m.StreamSize) / m.Duration.Seconds()), nil
}
