package catalog

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
)

// epoch is a time that keeps its value through the catalog.
var epoch = time.Date(2026, 3, 1, 12, 0, 0, 123456789, time.UTC)

func openTest(t *testing.T, dir string) *Catalog {
	t.Helper()
	c, err := Open(t.Context(), dir, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return c
}

// wantKind fails the test unless err has a kind.
func wantKind(t *testing.T, what string, err error, kind fault.Kind) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: no error, want %s", what, kind)
	} else if got := fault.Of(err); got != kind {
		t.Errorf("%s: %s (%v), want %s", what, got, err, kind)
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func same(t *testing.T, what string, got, want any) {
	t.Helper()
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("%s: -want +got\n%s", what, d)
	}
}

// seed records a VM with one disk, a foreign base and an active layer.
func seed(t *testing.T, c *Catalog, name string) (VM, Disk) {
	t.Helper()
	ctx := t.Context()
	vm, err := c.UpsertVM(ctx, VM{Name: name, Identity: "name:" + name, FirstSeen: epoch, LastSeen: epoch})
	check(t, err)
	disk, err := c.UpsertDisk(ctx, Disk{VMID: vm.ID, Device: "disk0", LaunchPath: "/vm/" + name + ".qcow2", LaunchFormat: "qcow2"})
	check(t, err)
	disk.ActiveLayer = name + "-1"
	check(t, c.Update(ctx, func(tx *Tx) error {
		if _, err := tx.UpsertDisk(ctx, disk); err != nil {
			return err
		}
		// The child first: references hold at the end of the transaction.
		if err := tx.PutLayer(ctx, layer(disk, name+"-1", name+"-0")); err != nil {
			return err
		}
		base := layer(disk, name+"-0", "")
		base.Foreign = true
		return tx.PutLayer(ctx, base)
	}))
	return vm, disk
}

func layer(d Disk, id, parent string) Layer {
	var n uint64
	for _, b := range []byte(id) {
		n = n*131 + uint64(b)
	}
	return Layer{
		ID: id, DiskID: d.ID, Parent: parent, Path: "/vm/" + id + ".qcow2", Format: "qcow2", VirtualSize: 10 << 30,
		Dev: 1<<63 | 7, Ino: n, Operation: "0badcafe", Created: epoch,
	}
}

func snapshot(vm VM, d Disk, id, name, layerID string) Snapshot {
	return Snapshot{
		ID: id, VMID: vm.ID, VMName: vm.Name, Name: name, Description: "before the upgrade",
		Labels: map[string]string{"ticket": "4711"}, Created: epoch, Consistency: Filesystem,
		Quiesce:   Quiesce{Requested: "require", Reason: "", Frozen: 2, Total: 3, Window: 47 * time.Millisecond},
		Warnings:  []op.Warning{{Code: "disk-excluded", Disk: "disk1", Message: "disk1 is left out"}},
		Operation: "0badcafe",
		Disks: []SnapshotDisk{
			{DiskID: d.ID, Device: d.Device, LayerID: layerID, Size: 10 << 30},
			{Device: "disk1", Size: 1 << 20, Excluded: true},
		},
		Config:  []byte(`{"machine":"pc-q35-7.2"}`),
		Partial: true, State: PointValid,
	}
}

func TestVMs(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	in := VM{
		Name: "web", UUID: "4c3c", Identity: "uuid:4c3c", Unit: "vm-web.service",
		FirstSeen: epoch, LastSeen: epoch, Stopped: "shutdown", Command: []string{"qemu-system-x86_64", "-name", "web"},
	}
	first, err := c.UpsertVM(ctx, in)
	check(t, err)
	if len(first.ID) != 8 {
		t.Errorf("id %q, want eight digits", first.ID)
	}
	in.ID = first.ID
	same(t, "inserted", first, in)

	again := in
	again.ID, again.Name, again.FirstSeen, again.LastSeen, again.Stopped = "", "web2", epoch.Add(time.Hour), epoch.Add(2*time.Hour), ""
	second, err := c.UpsertVM(ctx, again)
	check(t, err)
	again.ID, again.FirstSeen = first.ID, epoch
	same(t, "updated by identity", second, again)

	again.Identity = "name:web2"
	moved, err := c.UpsertVM(ctx, again)
	check(t, err)
	same(t, "updated by id", moved, again)

	other, err := c.UpsertVM(ctx, VM{ID: "deadbeef", Name: "db", Identity: "name:db"})
	check(t, err)
	if other.ID != "deadbeef" {
		t.Errorf("id %q, want the one that was given", other.ID)
	}
	_, err = c.UpsertVM(ctx, VM{ID: "deadbeef", Name: "db", Identity: "name:web2"})
	wantKind(t, "identity of another VM", err, fault.Exists)
	_, err = c.UpsertVM(ctx, VM{Name: "db"})
	wantKind(t, "no identity", err, fault.Usage)

	all, err := c.VMs(ctx)
	check(t, err)
	same(t, "all, by name", all, []VM{other, moved})
	_, err = c.VM(ctx, "00000000")
	wantKind(t, "unknown VM", err, fault.NotFound)
	wantKind(t, "delete an unknown VM", c.DeleteVM(ctx, "00000000"), fault.NotFound)
}

func TestDeleteVMTakesItsRecords(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	vm, disk := seed(t, c, "web")
	kept, _ := seed(t, c, "db")
	check(t, c.CommitSnapshot(ctx, Commit{Snapshot: snapshot(vm, disk, "s1", "one", "web-0")}))
	check(t, c.CreateOperation(ctx, op.Record{ID: "0badcafe", VMID: vm.ID, State: op.Queued, Created: epoch}))
	check(t, c.DeleteVM(ctx, vm.ID))

	_, err := c.VM(ctx, vm.ID)
	wantKind(t, "VM", err, fault.NotFound)
	_, err = c.Layer(ctx, "web-1")
	wantKind(t, "layer", err, fault.NotFound)
	_, err = c.Snapshot(ctx, "s1")
	wantKind(t, "snapshot", err, fault.NotFound)
	disks, err := c.Disks(ctx, vm.ID)
	check(t, err)
	same(t, "disks", len(disks), 0)
	if _, err := c.Operation(ctx, "0badcafe"); err != nil {
		t.Errorf("the operation went with its VM: %v", err)
	}
	layers, err := c.Layers(ctx, kept.ID)
	check(t, err)
	same(t, "layers of the other VM", len(layers), 2)
}

func TestDisks(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	vm, disk := seed(t, c, "web")

	changed := disk
	changed.ID, changed.SettleNeeded, changed.LaunchPath = "", true, "/vm/other"
	got, err := c.UpsertDisk(ctx, changed)
	check(t, err)
	changed.ID = disk.ID
	same(t, "updated by device", got, changed)

	changed.Device = "virtio0"
	_, err = c.UpsertDisk(ctx, changed)
	check(t, err)
	disks, err := c.Disks(ctx, vm.ID)
	check(t, err)
	same(t, "updated by id", disks, []Disk{changed})

	_, err = c.UpsertDisk(ctx, Disk{ID: "other", VMID: vm.ID, Device: "virtio0"})
	wantKind(t, "device of another disk", err, fault.Exists)
	_, err = c.UpsertDisk(ctx, Disk{VMID: "00000000", Device: "virtio0"})
	wantKind(t, "unknown VM", err, fault.NotFound)
	_, err = c.UpsertDisk(ctx, Disk{VMID: vm.ID, Device: "virtio9", ActiveLayer: "nowhere"})
	wantKind(t, "unknown layer", err, fault.Failed)

	changed.Removed = true
	_, err = c.UpsertDisk(ctx, changed)
	check(t, err)
	fresh, err := c.UpsertDisk(ctx, Disk{VMID: vm.ID, Device: "virtio0"})
	check(t, err)
	disks, err = c.Disks(ctx, vm.ID)
	check(t, err)
	same(t, "device used again", disks, []Disk{fresh, changed})
}

func TestLayers(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	vm, disk := seed(t, c, "web")
	side := layer(disk, "web-2", "web-0")
	side.Created, side.Immutable, side.Covered = epoch.Add(time.Second), true, true
	check(t, c.PutLayer(ctx, side))

	got, err := c.Layer(ctx, "web-2")
	check(t, err)
	same(t, "layer", got, side)
	children, err := c.Children(ctx, "web-0")
	check(t, err)
	same(t, "children", children, []Layer{layer(disk, "web-1", "web-0"), side})
	all, err := c.Layers(ctx, vm.ID)
	check(t, err)
	same(t, "all layers", len(all), 3)

	side.Covered, side.Path = false, "/elsewhere"
	check(t, c.PutLayer(ctx, side))
	got, err = c.LayerByInode(ctx, side.Dev, side.Ino)
	check(t, err)
	same(t, "replaced, by inode", got, side)
	_, err = c.LayerByInode(ctx, side.Dev, 1)
	wantKind(t, "unknown inode", err, fault.NotFound)

	wantKind(t, "no id", c.PutLayer(ctx, Layer{DiskID: disk.ID}), fault.Usage)
	wantKind(t, "unknown disk", c.PutLayer(ctx, Layer{ID: "x", DiskID: "x"}), fault.NotFound)
	wantKind(t, "unknown parent", c.PutLayer(ctx, layer(disk, "x", "y")), fault.Failed)
}

func TestLayerByInodePrefersOwnLayers(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	_, web := seed(t, c, "web")
	_, db := seed(t, c, "db")
	foreign, own := layer(web, "shared-web", ""), layer(db, "shared-db", "")
	foreign.Foreign, foreign.Created = true, epoch.Add(time.Hour)
	own.Ino = foreign.Ino
	check(t, c.PutLayer(ctx, foreign))
	check(t, c.PutLayer(ctx, own))
	got, err := c.LayerByInode(ctx, own.Dev, own.Ino)
	check(t, err)
	same(t, "layer", got.ID, own.ID)
}

func TestCoveredLayers(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	_, disk := seed(t, c, "web")
	lowest := layer(disk, "lowest", "") // it lies on nothing
	lowest.Covered = true
	check(t, c.PutLayer(ctx, lowest))
	got, err := c.CoveredLayers(ctx, disk.ID)
	check(t, err)
	same(t, "covered", got, []Layer{lowest})
}

func TestDependantsAreThoseOfOtherVMs(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	web, _ := seed(t, c, "web")
	clone, disk := seed(t, c, "clone")
	linked := layer(disk, "linked", "web-1")
	check(t, c.PutLayer(ctx, linked))
	got, err := c.Dependants(ctx, web.ID)
	check(t, err)
	same(t, "on the layers of web", got, []Layer{linked})
	got, err = c.Dependants(ctx, clone.ID)
	check(t, err)
	same(t, "on the layers of its clone", got, []Layer(nil))
}

func TestDeleteLayerNamesItsDependants(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	vm, disk := seed(t, c, "web")
	check(t, c.CommitSnapshot(ctx, Commit{Snapshot: snapshot(vm, disk, "s1", "one", "web-0")}))
	for id, want := range map[string]string{
		"web-0": "layer web-0 is needed by layer web-1, snapshot web/one",
		"web-1": "layer web-1 is needed by disk web/disk0",
	} {
		err := c.DeleteLayer(ctx, id)
		wantKind(t, id, err, fault.HasDependants)
		same(t, "message", fmt.Sprint(err), want)
	}
	wantKind(t, "unknown layer", c.DeleteLayer(ctx, "x"), fault.NotFound)

	// A merge: the child moves to the base's place, in one transaction.
	check(t, c.DeleteSnapshot(ctx, "s1"))
	check(t, c.Update(ctx, func(tx *Tx) error {
		if err := tx.PutLayer(ctx, layer(disk, "web-1", "")); err != nil {
			return err
		}
		return tx.DeleteLayer(ctx, "web-0")
	}))
	all, err := c.Layers(ctx, vm.ID)
	check(t, err)
	same(t, "layers", all, []Layer{layer(disk, "web-1", "")})
}

func TestUpdateIsAllOrNothing(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	broken := fmt.Errorf("no more")
	for name, f := range map[string]func(tx *Tx) error{
		"error": func(*Tx) error { return broken },
		"panic": func(*Tx) error { panic(broken) },
	} {
		func() {
			defer func() { _ = recover() }()
			err := c.Update(ctx, func(tx *Tx) error {
				if _, err := tx.UpsertVM(ctx, VM{Name: "web", Identity: "name:web"}); err != nil {
					return err
				}
				return f(tx)
			})
			if err != broken {
				t.Errorf("%s: %v, want the function's own error", name, err)
			}
		}()
		all, err := c.VMs(ctx)
		check(t, err)
		same(t, name, len(all), 0)
	}
	if _, err := c.UpsertVM(ctx, VM{Name: "web", Identity: "name:web"}); err != nil {
		t.Errorf("a write after a panic: %v", err)
	}
}

func TestUpdateWaitsNoLongerThanItsContext(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	check(t, c.Update(ctx, func(*Tx) error {
		waiting, cancel := context.WithCancelCause(ctx)
		cancel(fault.New(fault.Cancelled, "enough"))
		wantKind(t, "a second writer", c.DeleteVM(waiting, "x"), fault.Cancelled)
		// Readers do not wait for the writer at all.
		_, err := c.VMs(ctx)
		return err
	}))
}

func TestCloseWaitsForTheWriter(t *testing.T) {
	ctx, dir := t.Context(), t.TempDir()
	c, err := Open(ctx, dir, hclog.NewNullLogger())
	check(t, err)
	writing, written, closed := make(chan struct{}), make(chan error, 1), make(chan error, 1)
	var vm VM
	go func() {
		written <- c.Update(ctx, func(tx *Tx) (err error) {
			close(writing)
			vm, err = tx.UpsertVM(ctx, VM{Name: "web", Identity: "name:web"})
			return err
		})
	}()
	<-writing
	go func() { closed <- c.Close() }()
	check(t, <-closed)
	check(t, <-written)
	if err := c.DeleteVM(ctx, vm.ID); err == nil {
		t.Error("a write after Close succeeded")
	}
	_, err = openTest(t, dir).VM(ctx, vm.ID)
	check(t, err)
}
