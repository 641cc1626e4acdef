package catalog

import (
	"context"
	"strings"

	"github.com/vmsnap/vmsnap/agent/fault"
)

const layerColumns = "id, disk, parent, path, format, virtual_size, dev, ino, is_foreign, immutable, covered, operation, created, device"

// selectLayer selects layerColumns, "" for no parent.
const selectLayer = `SELECT l.id, l.disk, ifnull(l.parent, ''), l.path, l.format, l.virtual_size, l.dev, l.ino,
	l.is_foreign, l.immutable, l.covered, l.operation, l.created, l.device FROM layers l`

func scanLayer(row scanner) (Layer, error) {
	var l Layer
	err := row.Scan(&l.ID, &l.DiskID, &l.Parent, &l.Path, &l.Format, bitsColumn{&l.VirtualSize}, bitsColumn{&l.Dev},
		bitsColumn{&l.Ino}, &l.Foreign, &l.Immutable, &l.Covered, &l.Operation, timeColumn{&l.Created}, &l.Device)
	return l, err
}

// PutLayer records a layer, in place of that of the same ID if there is one. Its
// parent may be recorded later in the same transaction. It returns
// fault.NotFound for a disk that is not known.
func (c *Catalog) PutLayer(ctx context.Context, l Layer) error {
	return c.Update(ctx, func(tx *Tx) error { return tx.PutLayer(ctx, l) })
}

// PutLayer records a layer; see Catalog.PutLayer.
func (tx *Tx) PutLayer(ctx context.Context, l Layer) error {
	if l.ID == "" {
		return fault.New(fault.Usage, "layer %s has no id", l.Path)
	}
	_, ok, err := queryOne(ctx, tx.reader, scanValue[string], "SELECT id FROM disks WHERE id = ?", l.DiskID)
	if err != nil {
		return err
	}
	if !ok {
		return notFound("layer %s: no disk with the id %q", l.ID, l.DiskID)
	}
	_, err = tx.exec(ctx, `
		INSERT INTO layers (`+layerColumns+`) VALUES (?, ?, nullif(?, ''), ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
		ON CONFLICT (id) DO UPDATE SET disk = excluded.disk, parent = excluded.parent, path = excluded.path,
			format = excluded.format, virtual_size = excluded.virtual_size, dev = excluded.dev, ino = excluded.ino,
			is_foreign = excluded.is_foreign, immutable = excluded.immutable, covered = excluded.covered,
			operation = excluded.operation, created = excluded.created, device = excluded.device`,
		l.ID, l.DiskID, l.Parent, l.Path, l.Format, int64(l.VirtualSize), int64(l.Dev), int64(l.Ino),
		l.Foreign, l.Immutable, l.Covered, l.Operation, nanos(l.Created), l.Device)
	return err
}

// Layer returns a layer or fault.NotFound.
func (r reader) Layer(ctx context.Context, id string) (Layer, error) {
	l, ok, err := queryOne(ctx, r, scanLayer, selectLayer+" WHERE l.id = ?", id)
	if err == nil && !ok {
		err = notFound("no layer with the id %q", id)
	}
	return l, err
}

// CoveredLayers returns the layers of a disk that another one lies on, or that
// are kept for a snapshot.
func (r reader) CoveredLayers(ctx context.Context, diskID string) ([]Layer, error) {
	return query(ctx, r, scanLayer, selectLayer+" WHERE l.disk = ? AND l.covered <> 0 ORDER BY l.created, l.id", diskID)
}

// Layers returns all layers of a VM's disks, the oldest first.
func (r reader) Layers(ctx context.Context, vmID string) ([]Layer, error) {
	return query(ctx, r, scanLayer, selectLayer+" JOIN disks d ON d.id = l.disk WHERE d.vm = ? ORDER BY l.created, l.id", vmID)
}

// Dependants returns the layers of other VMs that lie on a VM's layers.
func (r reader) Dependants(ctx context.Context, vmID string) ([]Layer, error) {
	return query(ctx, r, scanLayer, selectLayer+` WHERE l.parent IN (SELECT p.id FROM layers p JOIN disks q ON q.id = p.disk WHERE q.vm = ?1)
		AND l.disk NOT IN (SELECT id FROM disks WHERE vm = ?1) ORDER BY l.created, l.id`, vmID)
}

// LayerByInode returns the layer that is a file, or fault.NotFound. A base that
// several disks share is a layer of each: one that is not foreign goes before
// those that are, then the one made last. Inode numbers are used again: whether
// it is still the file that was recorded is for the caller to see.
func (r reader) LayerByInode(ctx context.Context, dev, ino uint64) (Layer, error) {
	l, ok, err := queryOne(ctx, r, scanLayer,
		selectLayer+" WHERE l.ino = ? AND l.dev = ? ORDER BY l.is_foreign, l.created DESC, l.id LIMIT 1", int64(ino), int64(dev))
	if err == nil && !ok {
		err = notFound("no layer with the inode %d on device %d", ino, dev)
	}
	return l, err
}

// LayersOfFile returns all layers that are a file: a base that several disks
// share is a layer of each.
func (r reader) LayersOfFile(ctx context.Context, dev, ino uint64) ([]Layer, error) {
	return query(ctx, r, scanLayer, selectLayer+" WHERE l.ino = ? AND l.dev = ? ORDER BY l.created, l.id", int64(ino), int64(dev))
}

// OwnerOfFile returns the id of the VM that has a file as a layer which is not
// foreign, or fault.NotFound.
func (r reader) OwnerOfFile(ctx context.Context, dev, ino uint64) (string, error) {
	vm, ok, err := queryOne(ctx, r, scanValue[string],
		"SELECT d.vm FROM layers l JOIN disks d ON d.id = l.disk WHERE l.ino = ? AND l.dev = ? AND NOT l.is_foreign ORDER BY l.created DESC LIMIT 1",
		int64(ino), int64(dev))
	if err == nil && !ok {
		err = notFound("no VM has the file with the inode %d on device %d", ino, dev)
	}
	return vm, err
}

// Children returns the layers that lie directly on a layer, the oldest first.
func (r reader) Children(ctx context.Context, id string) ([]Layer, error) {
	return query(ctx, r, scanLayer, selectLayer+" WHERE l.parent = ? ORDER BY l.created, l.id", id)
}

// DeleteLayer forgets a layer. It returns fault.NotFound when there is none, and
// fault.HasDependants, naming them, while other layers lie on it, snapshots can
// be restored from it, or a disk writes to it.
func (c *Catalog) DeleteLayer(ctx context.Context, id string) error {
	return c.Update(ctx, func(tx *Tx) error { return tx.DeleteLayer(ctx, id) })
}

// DeleteLayer forgets a layer; see Catalog.DeleteLayer.
func (tx *Tx) DeleteLayer(ctx context.Context, id string) error {
	dependants, err := query(ctx, tx.reader, scanValue[string], `
		SELECT 'layer ' || id FROM layers WHERE parent = ?1
		UNION ALL
		SELECT 'snapshot ' || s.vm_name || '/' || s.name FROM snapshot_disks d JOIN snapshots s ON s.id = d.snapshot WHERE d.layer = ?1
		UNION ALL
		SELECT 'clone ' || path FROM clones WHERE layer = ?1
		UNION ALL
		SELECT 'disk ' || v.name || '/' || d.device FROM disks d JOIN vms v ON v.id = d.vm WHERE d.active_layer = ?1`, id)
	if err != nil {
		return err
	}
	if len(dependants) > 0 {
		return fault.New(fault.HasDependants, "layer %s is needed by %s", id, strings.Join(dependants, ", "))
	}
	n, err := tx.exec(ctx, "DELETE FROM layers WHERE id = ?", id)
	if err == nil && n == 0 {
		err = notFound("no layer with the id %q", id)
	}
	return err
}
