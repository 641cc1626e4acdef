package catalog

import (
	"context"

	"github.com/vmsnap/vmsnap/agent/fault"
)

const vmColumns = "id, name, uuid, identity, unit, first_seen, last_seen, stopped, command"

func scanVM(row scanner) (VM, error) {
	var v VM
	err := row.Scan(&v.ID, &v.Name, &v.UUID, &v.Identity, &v.Unit, timeColumn{&v.FirstSeen},
		timeColumn{&v.LastSeen}, &v.Stopped, jsonColumn{&v.Command})
	return v, err
}

// UpsertVM records a VM and returns it as it is recorded. With an ID it replaces
// the VM of that ID, which so may change its identity; without, that of the same
// identity. A VM that is not known is added and gets an ID if it has none. The
// time of FirstSeen that was recorded first stays.
func (c *Catalog) UpsertVM(ctx context.Context, v VM) (out VM, err error) {
	err = c.Update(ctx, func(tx *Tx) error {
		out, err = tx.UpsertVM(ctx, v)
		return err
	})
	return out, err
}

// UpsertVMs records VMs at once, all or none, and returns them as they are recorded;
// see UpsertVM.
func (c *Catalog) UpsertVMs(ctx context.Context, vms []VM) (out []VM, err error) {
	err = c.Update(ctx, func(tx *Tx) error {
		out = make([]VM, len(vms))
		for i, v := range vms {
			if out[i], err = tx.UpsertVM(ctx, v); err != nil {
				return err
			}
		}
		return nil
	})
	return out, err
}

// UpsertVM records a VM; see Catalog.UpsertVM.
func (tx *Tx) UpsertVM(ctx context.Context, v VM) (VM, error) {
	if v.Identity == "" {
		return VM{}, fault.New(fault.Usage, "VM %q has no identity", v.Name)
	}
	same, known, err := queryOne(ctx, tx.reader, scanVM, "SELECT "+vmColumns+" FROM vms WHERE identity = ?", v.Identity)
	switch {
	case err != nil:
		return VM{}, err
	case known && v.ID == "":
		v.ID = same.ID
	case known && v.ID != same.ID:
		return VM{}, fault.New(fault.Exists, "VM %q has the identity %s already", same.Name, v.Identity)
	case v.ID == "":
		if v.ID, err = tx.freeID(ctx, "vms"); err != nil {
			return VM{}, err
		}
	}
	command, err := jsonText(v.Command)
	if err != nil {
		return VM{}, err
	}
	_, err = tx.exec(ctx, `
		INSERT INTO vms (`+vmColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
		ON CONFLICT (id) DO UPDATE SET name = excluded.name, uuid = excluded.uuid, identity = excluded.identity,
			unit = excluded.unit, last_seen = excluded.last_seen, stopped = excluded.stopped, command = excluded.command`,
		v.ID, v.Name, v.UUID, v.Identity, v.Unit, nanos(v.FirstSeen), nanos(v.LastSeen), v.Stopped, command)
	if err != nil {
		return VM{}, err
	}
	return tx.VM(ctx, v.ID)
}

// VM returns a VM or fault.NotFound.
func (r reader) VM(ctx context.Context, id string) (VM, error) {
	v, ok, err := queryOne(ctx, r, scanVM, "SELECT "+vmColumns+" FROM vms WHERE id = ?", id)
	if err == nil && !ok {
		err = notFound("no VM with the id %q", id)
	}
	return v, err
}

// VMs returns all VMs by name.
func (r reader) VMs(ctx context.Context) ([]VM, error) {
	return query(ctx, r, scanVM, "SELECT "+vmColumns+" FROM vms ORDER BY name, id")
}

// vmName returns what to call a VM in a message.
func (r reader) vmName(ctx context.Context, id string) string {
	name, ok, err := queryOne(ctx, r, scanValue[string], "SELECT name FROM vms WHERE id = ?", id)
	if err != nil || !ok {
		return id
	}
	return name
}

// DeleteVM forgets a VM with its disks, layers and snapshots. Its operations
// stay. It returns fault.NotFound when there is no such VM.
func (c *Catalog) DeleteVM(ctx context.Context, id string) error {
	return c.Update(ctx, func(tx *Tx) error { return tx.DeleteVM(ctx, id) })
}

// DeleteVM forgets a VM; see Catalog.DeleteVM.
func (tx *Tx) DeleteVM(ctx context.Context, id string) error {
	n, err := tx.exec(ctx, "DELETE FROM vms WHERE id = ?", id)
	if err == nil && n == 0 {
		err = notFound("no VM with the id %q", id)
	}
	return err
}
