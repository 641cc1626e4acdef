package catalog

import (
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/agent/fault"
)

func TestCommitSnapshot(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	vm, disk := seed(t, c, "web")
	s := snapshot(vm, disk, "s1", "one", "web-1")
	overlay := layer(disk, "web-2", "web-1")
	covered := layer(disk, "web-1", "web-0")
	covered.Covered = true
	disk.ActiveLayer = overlay.ID
	// The layers in an order that only the end of the transaction makes good.
	check(t, c.CommitSnapshot(ctx, Commit{Snapshot: s, Layers: []Layer{overlay, covered}, Disks: []Disk{disk}}))

	got, err := c.Snapshot(ctx, "s1")
	check(t, err)
	same(t, "by id", got, s)
	got, err = c.SnapshotByName(ctx, vm.ID, "one")
	check(t, err)
	same(t, "by name", got, s)
	disks, err := c.Disks(ctx, vm.ID)
	check(t, err)
	same(t, "disks", disks, []Disk{disk})
	l, err := c.Layer(ctx, covered.ID)
	check(t, err)
	same(t, "covered layer", l, covered)
}

func TestCommitSnapshotIsAllOrNothing(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	vm, disk := seed(t, c, "web")
	check(t, c.CommitSnapshot(ctx, Commit{Snapshot: snapshot(vm, disk, "s1", "one", "web-1")}))

	lost := snapshot(vm, disk, "s2", "two", "nowhere")
	unknown := snapshot(VM{ID: "00000000"}, disk, "s2", "two", "web-1")
	bad := snapshot(vm, disk, "s2", "two", "web-1")
	bad.Config = []byte("{")
	noID := snapshot(vm, disk, "", "two", "web-1")
	for name, tc := range map[string]struct {
		snapshot Snapshot
		kind     fault.Kind
	}{
		"name taken":    {snapshot(vm, disk, "s2", "one", "web-1"), fault.Exists},
		"id taken":      {snapshot(vm, disk, "s1", "two", "web-1"), fault.Failed},
		"layer unknown": {lost, fault.Failed},
		"VM unknown":    {unknown, fault.NotFound},
		"not JSON":      {bad, fault.Usage},
		"no id":         {noID, fault.Usage},
	} {
		overlay := layer(disk, "web-2", "web-1")
		moved := disk
		moved.ActiveLayer = overlay.ID
		err := c.CommitSnapshot(ctx, Commit{Snapshot: tc.snapshot, Layers: []Layer{overlay}, Disks: []Disk{moved}})
		wantKind(t, name, err, tc.kind)
		_, err = c.Layer(ctx, overlay.ID)
		wantKind(t, name+": its layer", err, fault.NotFound)
		disks, err := c.Disks(ctx, vm.ID)
		check(t, err)
		same(t, name+": its disk", disks, []Disk{disk})
		all, err := c.Snapshots(ctx, "")
		check(t, err)
		same(t, name+": snapshots", len(all), 1)
	}
}

func TestSnapshotsNewestFirst(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	web, webDisk := seed(t, c, "web")
	db, dbDisk := seed(t, c, "db")
	commit := func(vm VM, d Disk, id string, cut time.Time, window time.Duration) {
		s := snapshot(vm, d, id, id, vm.Name+"-1")
		s.Created, s.Quiesce.Window = cut, window
		check(t, c.CommitSnapshot(ctx, Commit{Snapshot: s}))
	}
	commit(web, webDisk, "late", epoch.Add(3*time.Second), 0)
	commit(web, webDisk, "early", epoch, 20*time.Millisecond)
	commit(web, webDisk, "middle", epoch.Add(time.Second), 30*time.Millisecond)
	commit(db, dbDisk, "other", epoch.Add(2*time.Second), 0)

	for vmID, want := range map[string][]string{
		"":     {"late", "other", "middle", "early"},
		web.ID: {"late", "middle", "early"},
		"x":    nil,
	} {
		all, err := c.Snapshots(ctx, vmID)
		check(t, err)
		var got []string
		for _, s := range all {
			got = append(got, s.ID)
		}
		same(t, "snapshots of "+vmID, got, want)
	}

	window, ok, err := c.LastFreezeWindow(ctx, web.ID)
	check(t, err)
	same(t, "last freeze window", []any{window, ok}, []any{30 * time.Millisecond, true})
	_, ok, err = c.LastFreezeWindow(ctx, db.ID)
	check(t, err)
	same(t, "freeze window of a VM never frozen", ok, false)
}

func TestRenameAndDeleteSnapshot(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	vm, disk := seed(t, c, "web")
	other, otherDisk := seed(t, c, "db")
	check(t, c.CommitSnapshot(ctx, Commit{Snapshot: snapshot(vm, disk, "s1", "one", "web-1")}))
	check(t, c.CommitSnapshot(ctx, Commit{Snapshot: snapshot(vm, disk, "s2", "two", "web-1")}))
	check(t, c.CommitSnapshot(ctx, Commit{Snapshot: snapshot(other, otherDisk, "s3", "three", "db-1")}))

	wantKind(t, "name taken", c.RenameSnapshot(ctx, "s1", "two"), fault.Exists)
	wantKind(t, "unknown snapshot", c.RenameSnapshot(ctx, "s9", "nine"), fault.NotFound)
	check(t, c.RenameSnapshot(ctx, "s1", "one"))
	check(t, c.RenameSnapshot(ctx, "s1", "three")) // that of another VM
	_, err := c.SnapshotByName(ctx, vm.ID, "one")
	wantKind(t, "old name", err, fault.NotFound)
	same(t, "message", err.Error(), `no snapshot "one" of VM "web"`)
	got, err := c.SnapshotByName(ctx, vm.ID, "three")
	check(t, err)
	same(t, "renamed", got, snapshot(vm, disk, "s1", "three", "web-1"))

	check(t, c.DeleteSnapshot(ctx, "s1"))
	wantKind(t, "delete again", c.DeleteSnapshot(ctx, "s1"), fault.NotFound)
	_, err = c.Layer(ctx, "web-1")
	check(t, err)
	check(t, c.RenameSnapshot(ctx, "s2", "three")) // free again
}

func TestLastSnapshots(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	vm, disk := seed(t, c, "web")
	seed(t, c, "idle")
	for i, state := range []PointState{PointValid, PointValid, PointDeleting} {
		s := snapshot(vm, disk, string(rune('a'+i)), string(rune('a'+i)), "web-1")
		s.Created, s.State = time.Unix(int64(100+i), 0).UTC(), state
		check(t, c.CommitSnapshot(ctx, Commit{Snapshot: s}))
	}
	last, err := c.LastSnapshots(ctx)
	check(t, err)
	same(t, "the newest that can be restored", last, map[string]time.Time{vm.ID: time.Unix(101, 0).UTC()})
	size, err := c.Size(ctx)
	check(t, err)
	if size.Database == 0 || size.Log == 0 || size.Journal != 0 {
		t.Errorf("size: %+v", size)
	}
}
