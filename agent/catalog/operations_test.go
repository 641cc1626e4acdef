package catalog

import (
	"encoding/json"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
)

func record(id, vm string) op.Record {
	return op.Record{
		ID: id, Kind: op.KindSnapshot, VMID: vm, VMName: "web", State: op.Running,
		Request: json.RawMessage(`{"Name":"one","Size":18446744073709551615}`), UID: 4294967295,
		Steps: []op.Step{
			{Name: "preflight", Started: epoch, Ended: epoch.Add(3 * time.Millisecond)},
			{Name: "freeze", Started: epoch.Add(time.Second), Error: "no answer"},
		},
		Progress: op.Progress{Done: 1<<64 - 1, Total: 1<<64 - 1, Unit: "bytes", Rate: 1.5, ETA: time.Minute},
		Warnings: []op.Warning{{Code: "no-guest-agent", Disk: "disk0", Message: "…"}},
		Failure:  &op.Failure{Kind: fault.NotQuiesced, Message: "not frozen", Hint: "install it"},
		Partial:  true, Snapshot: "5a5a5a5a",
		Created: epoch, Started: epoch.Add(time.Millisecond), Revision: 1<<64 - 1,
	}
}

func TestOperationsKeepEverything(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	full, empty := record("00000001", "vm"), op.Record{ID: "00000002", Created: epoch}
	for _, rec := range []op.Record{full, empty} {
		check(t, c.CreateOperation(ctx, rec))
		got, err := c.Operation(ctx, rec.ID)
		check(t, err)
		same(t, "created", got, rec)
	}
	empty.ID, full.ID = full.ID, empty.ID
	for _, rec := range []op.Record{full, empty} {
		check(t, c.UpdateOperation(ctx, rec))
		got, err := c.Operation(ctx, rec.ID)
		check(t, err)
		same(t, "updated", got, rec)
	}
	wantKind(t, "id taken", c.CreateOperation(ctx, full), fault.Exists)
	wantKind(t, "update of an unknown one", c.UpdateOperation(ctx, op.Record{ID: "x"}), fault.NotFound)
	_, err := c.Operation(ctx, "x")
	wantKind(t, "unknown operation", err, fault.NotFound)
}

func TestOperationsFilter(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	for i := range 6 {
		rec := op.Record{ID: fmt.Sprint(i), VMID: fmt.Sprint("vm", i%2), State: op.Running, Created: epoch}
		if i >= 3 {
			rec.State, rec.Ended = op.Failed, epoch
		}
		check(t, c.CreateOperation(ctx, rec))
	}
	for _, tc := range []struct {
		filter op.Filter
		want   []string
	}{
		{op.Filter{}, []string{"5", "4", "3", "2", "1", "0"}},
		{op.Filter{Limit: 2}, []string{"5", "4"}},
		{op.Filter{Active: true}, []string{"2", "1", "0"}},
		{op.Filter{VMID: "vm1"}, []string{"5", "3", "1"}},
		{op.Filter{VMID: "vm0", Active: true, Limit: 1}, []string{"2"}},
		{op.Filter{VMID: "vm7"}, nil},
	} {
		recs, err := c.Operations(ctx, tc.filter)
		check(t, err)
		var got []string
		for _, r := range recs {
			got = append(got, r.ID)
		}
		same(t, fmt.Sprintf("%+v", tc.filter), got, tc.want)
	}
}

func TestRequestIDs(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	now := epoch
	c.now = func() time.Time { return now }
	create := func(id string, uid uint32, key string) error {
		rec := op.Record{ID: id, UID: uid, RequestID: key, Created: now}
		if err := c.CreateOperation(ctx, rec); err != nil {
			return err
		}
		rec.State, rec.Ended = op.Succeeded, now
		return c.UpdateOperation(ctx, rec)
	}
	find := func(uid uint32, key string) string {
		t.Helper()
		rec, ok, err := c.OperationByRequest(ctx, uid, key)
		check(t, err)
		if ok != (rec.ID != "") {
			t.Errorf("found %v, operation %q", ok, rec.ID)
		}
		return rec.ID
	}
	check(t, create("a", 1, "key"))
	check(t, create("b", 2, "key"))
	check(t, create("c", 1, "other"))
	check(t, create("d", 1, ""))
	check(t, create("e", 1, ""))
	wantKind(t, "taken", create("f", 1, "key"), fault.Exists)
	_, err := c.Operation(ctx, "f")
	wantKind(t, "the operation whose request id was taken", err, fault.NotFound)
	same(t, "found", []string{find(1, "key"), find(2, "key"), find(1, "other"), find(3, "key"), find(1, "")},
		[]string{"a", "b", "c", "", ""})

	now = epoch.Add(op.RequestRetention)
	check(t, c.Purge(ctx))
	same(t, "at thirty days", find(1, "key"), "a")
	now = now.Add(time.Nanosecond)
	same(t, "after thirty days", find(1, "key"), "")
	check(t, create("g", 1, "key"))
	same(t, "used again", find(1, "key"), "g")
	check(t, c.Purge(ctx))
	same(t, "used again, after a purge", find(1, "key"), "g")
	left, err := query(ctx, c.reader, scanValue[int], "SELECT count(*) FROM requests")
	check(t, err)
	same(t, "rows after a purge", left, []int{1})
	if _, err := c.Operation(ctx, "a"); err != nil {
		t.Errorf("an operation went with its request id: %v", err)
	}
}

func TestOperationsArePurged(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	now := epoch
	c.now = func() time.Time { return now }
	create := func(id, request string, ended time.Time) {
		t.Helper()
		rec := record(id, "vm")
		rec.RequestID = request
		check(t, c.CreateOperation(ctx, rec))
		if !ended.IsZero() {
			rec.State, rec.Ended = op.Succeeded, ended
			check(t, c.UpdateOperation(ctx, rec))
		}
	}
	left := func() (ids []string) {
		t.Helper()
		all, err := c.Operations(ctx, op.Filter{})
		check(t, err)
		for _, rec := range all {
			ids = append(ids, rec.ID)
		}
		return ids
	}
	create("running", "", time.Time{})
	create("old", "", epoch)
	create("older", "", epoch.Add(-time.Nanosecond))
	now = epoch.Add(op.OperationRetention)
	create("asked", "key", epoch.Add(-time.Hour))
	check(t, c.purge(ctx, op.OperationsKept, 1))
	same(t, "by age", left(), []string{"asked", "old", "running"})
	for _, id := range []string{"a", "b", "c"} {
		create(id, "", now)
	}
	check(t, c.purge(ctx, 2, 0))
	same(t, "by number", left(), []string{"c", "b", "asked", "running"})
	now = now.Add(op.RequestRetention + 1)
	check(t, c.purge(ctx, 2, 0))
	same(t, "without its request id", left(), []string{"c", "b", "running"})
}

func TestJournal(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	c.now = func() time.Time { return epoch }
	check(t, c.CreateOperation(ctx, record("a", "vm")))
	check(t, c.CreateOperation(ctx, record("b", "vm")))
	var want []op.Entry
	for i := range 3 {
		data := json.RawMessage(fmt.Sprintf(`{"n":%d}`, i))
		e, err := c.AppendJournal(ctx, "a", "overlay", data)
		check(t, err)
		if i > 0 && e.Seq <= want[i-1].Seq {
			t.Errorf("entry %d after %d", e.Seq, want[i-1].Seq)
		}
		want = append(want, op.Entry{Seq: e.Seq, Operation: "a", Kind: "overlay", Data: data, Time: epoch})
		_, err = c.AppendJournal(ctx, "b", "freeze", data)
		check(t, err)
	}
	got, err := c.Journal(ctx, "a")
	check(t, err)
	same(t, "journal", got, want)

	ended := record("a", "vm")
	ended.State, ended.Ended = op.Cancelled, epoch
	check(t, c.UpdateOperation(ctx, ended))
	got, err = c.Journal(ctx, "a")
	check(t, err)
	same(t, "journal of an ended operation", len(got), 0)
	_, err = c.AppendJournal(ctx, "a", "overlay", nil)
	wantKind(t, "entry after the end", err, fault.Failed)
	_, err = c.AppendJournal(ctx, "x", "overlay", nil)
	wantKind(t, "entry of an unknown operation", err, fault.NotFound)
	got, err = c.Journal(ctx, "b")
	check(t, err)
	same(t, "journal of the other operation", len(got), 3)
}

func TestManyWritersAndReaders(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	vm, disk := seed(t, c, "web")
	const workers, each = 20, 5
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			id := fmt.Sprintf("%08x", w)
			if err := c.CreateOperation(ctx, record(id, vm.ID)); err != nil {
				t.Error(err)
			}
			for i := range each {
				if _, err := c.AppendJournal(ctx, id, "n", json.RawMessage(fmt.Sprint(i))); err != nil {
					t.Error(err)
				}
				name := fmt.Sprintf("%s-%d", id, i)
				if err := c.CommitSnapshot(ctx, Commit{Snapshot: snapshot(vm, disk, name, name, "web-1")}); err != nil {
					t.Error(err)
				}
				all, err := c.Snapshots(ctx, vm.ID)
				if err != nil {
					t.Error(err)
				}
				for _, s := range all {
					if len(s.Disks) != 2 {
						t.Errorf("snapshot %s was seen with %d disks", s.ID, len(s.Disks))
					}
				}
			}
		})
	}
	wg.Wait()
	all, err := c.Snapshots(ctx, vm.ID)
	check(t, err)
	same(t, "snapshots", len(all), workers*each)
	for w := range workers {
		entries, err := c.Journal(ctx, fmt.Sprintf("%08x", w))
		check(t, err)
		for i, e := range entries {
			same(t, "entry", string(e.Data), fmt.Sprint(i))
		}
		same(t, "entries", len(entries), each)
	}
}
