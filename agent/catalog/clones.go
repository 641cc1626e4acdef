package catalog

import (
	"context"
	"time"
)

// Clone is an image that lies on a layer and is no layer of a disk of its VM: it
// reads from that layer for as long as it lies on it.
type Clone struct {
	Path      string // where it was made
	LayerID   string // that it lies on
	VMName    string // of the VM that it was made for; empty for a disk alone
	Dev, Ino  uint64 // which file it is
	Operation string // that made it
	Created   time.Time
}

const selectClone = "SELECT c.path, c.layer, c.vm_name, c.dev, c.ino, c.operation, c.created FROM clones c"

func scanClone(row scanner) (Clone, error) {
	var c Clone
	err := row.Scan(&c.Path, &c.LayerID, &c.VMName, bitsColumn{&c.Dev}, bitsColumn{&c.Ino}, &c.Operation, timeColumn{&c.Created})
	return c, err
}

// PutClone records a clone, in place of one that was made at the same path. Its
// layer cannot be deleted until the clone is forgotten.
func (tx *Tx) PutClone(ctx context.Context, c Clone) error {
	if _, err := tx.Layer(ctx, c.LayerID); err != nil {
		return err
	}
	_, err := tx.exec(ctx, `INSERT INTO clones (path, layer, vm_name, dev, ino, operation, created) VALUES (?, ?, ?, ?, ?, ?, ?)
		ON CONFLICT (path) DO UPDATE SET layer = excluded.layer, vm_name = excluded.vm_name, dev = excluded.dev,
			ino = excluded.ino, operation = excluded.operation, created = excluded.created`,
		c.Path, c.LayerID, c.VMName, int64(c.Dev), int64(c.Ino), c.Operation, nanos(c.Created))
	return err
}

// Clones returns the clones of all layers of a VM, the oldest first.
func (r reader) Clones(ctx context.Context, vmID string) ([]Clone, error) {
	return query(ctx, r, scanClone, selectClone+` JOIN layers l ON l.id = c.layer JOIN disks d ON d.id = l.disk
		WHERE d.vm = ? ORDER BY c.created, c.path`, vmID)
}

// ClonesOf returns the clones that lie on a layer, the oldest first.
func (r reader) ClonesOf(ctx context.Context, layerID string) ([]Clone, error) {
	return query(ctx, r, scanClone, selectClone+" WHERE c.layer = ? ORDER BY c.created, c.path", layerID)
}

// Clone returns the clone that was made at a path, or fault.NotFound.
func (r reader) Clone(ctx context.Context, path string) (Clone, error) {
	c, ok, err := queryOne(ctx, r, scanClone, selectClone+" WHERE c.path = ?", path)
	if err == nil && !ok {
		err = notFound("no clone is known at %s", path)
	}
	return c, err
}

// CloneByInode returns the clone that is a file, or fault.NotFound.
func (r reader) CloneByInode(ctx context.Context, dev, ino uint64) (Clone, error) {
	c, ok, err := queryOne(ctx, r, scanClone, selectClone+" WHERE c.ino = ? AND c.dev = ? ORDER BY c.created DESC LIMIT 1", int64(ino), int64(dev))
	if err == nil && !ok {
		err = notFound("no clone with the inode %d on device %d", ino, dev)
	}
	return c, err
}

// DeleteClone forgets a clone. One that is not known is no error.
func (tx *Tx) DeleteClone(ctx context.Context, path string) error {
	_, err := tx.exec(ctx, "DELETE FROM clones WHERE path = ?", path)
	return err
}

// SetTemplate says whether a snapshot is a template. It returns fault.NotFound
// when there is no such snapshot.
func (c *Catalog) SetTemplate(ctx context.Context, id string, template bool) error {
	return c.Update(ctx, func(tx *Tx) error {
		n, err := tx.exec(ctx, "UPDATE snapshots SET template = ? WHERE id = ?", template, id)
		if err == nil && n == 0 {
			err = notFound("no snapshot with the id %q", id)
		}
		return err
	})
}
