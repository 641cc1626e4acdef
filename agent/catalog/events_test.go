package catalog

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/agent/event"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
)

func events(t *testing.T, c *Catalog, f event.Filter) []event.Event {
	t.Helper()
	all, err := c.Events(t.Context(), f)
	check(t, err)
	return all
}

func numbers(all []event.Event) (seqs []uint64) {
	for _, e := range all {
		seqs = append(seqs, e.Seq)
	}
	return seqs
}

func TestEventsKeepEverything(t *testing.T) {
	ctx, dir := t.Context(), t.TempDir()
	c, err := Open(ctx, dir, hclog.NewNullLogger())
	check(t, err)
	uid := uint32(4294967295)
	full := event.Event{
		Time: epoch, Kind: event.OperationWarning, Severity: event.Error, VMID: "v", VMName: "web", Operation: "o", Snapshot: "s",
		Schedule: "nightly", UID: &uid, Disk: "root", Code: "no-guest-agent", Result: "failed", Message: "…",
	}
	check(t, c.AddEvents(ctx, full, event.Event{Kind: event.AgentStarted, Severity: event.Info}))
	if err := c.AddEvents(ctx, event.Event{Kind: event.AgentStarted}); err == nil {
		t.Error("an event without a severity is taken")
	}
	check(t, c.Close())
	c = openTest(t, dir)
	got := events(t, c, event.Filter{})
	if len(got) != 2 || got[1].Time.IsZero() {
		t.Fatalf("%+v", got)
	}
	full.Seq, got[1].Time = 1, time.Time{}
	same(t, "events", got, []event.Event{full, {Seq: 2, Kind: event.AgentStarted, Severity: event.Info}})
}

func TestEventsFilter(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	for i := range 6 {
		check(t, c.AddEvents(ctx, event.Event{
			Time: epoch.Add(time.Duration(i) * time.Hour), Kind: event.Kinds[i%2], Severity: event.Severities[i%3],
			VMID: fmt.Sprint("vm", i/3), Operation: fmt.Sprint("op", i/2),
		}))
	}
	for name, x := range map[string]struct {
		f    event.Filter
		want []uint64
	}{
		"all":       {event.Filter{}, []uint64{1, 2, 3, 4, 5, 6}},
		"newest":    {event.Filter{Newest: true, Limit: 2}, []uint64{6, 5}},
		"since":     {event.Filter{Since: 4}, []uint64{5, 6}},
		"limit":     {event.Filter{Since: 1, Limit: 2}, []uint64{2, 3}},
		"VM":        {event.Filter{VMID: "vm1"}, []uint64{4, 5, 6}},
		"operation": {event.Filter{Operation: "op1"}, []uint64{3, 4}},
		"severity":  {event.Filter{Severity: event.Warning}, []uint64{2, 3, 5, 6}},
		"info":      {event.Filter{Severity: event.Info, Limit: 1}, []uint64{1}},
		"kinds":     {event.Filter{Kinds: event.Kinds[1:3]}, []uint64{2, 4, 6}},
		"time":      {event.Filter{After: epoch.Add(4 * time.Hour)}, []uint64{5, 6}},
		"together":  {event.Filter{VMID: "vm1", Severity: event.Error}, []uint64{6}},
		"schedule":  {event.Filter{Schedule: "x"}, nil},
	} {
		t.Run(name, func(t *testing.T) { same(t, "numbers", numbers(events(t, c, x.f)), x.want) })
	}
}

// TestEventsOfOperations has the beginning, each warning once, and the end once.
func TestEventsOfOperations(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	rec := op.Record{ID: "0000beef", Kind: op.KindSnapshot, VMID: "v", VMName: "web", State: op.Queued, UID: 7, Created: epoch}
	check(t, c.CreateOperation(ctx, rec))
	rec.State, rec.Warnings = op.Running, []op.Warning{{Code: "one", Disk: "root", Message: "first"}}
	check(t, c.UpdateOperation(ctx, rec))
	check(t, c.UpdateOperation(ctx, rec))
	rec.State, rec.Ended, rec.Snapshot = op.Failed, epoch, "5a"
	rec.Warnings = append(rec.Warnings, op.Warning{Code: "two", Message: "second"})
	rec.Failure = &op.Failure{Kind: fault.NoSpace, Message: "full"}
	check(t, c.UpdateOperation(ctx, rec))
	check(t, c.UpdateOperation(ctx, rec)) // as when the first answer was lost
	wantKind(t, "update of an unknown one", c.UpdateOperation(ctx, op.Record{ID: "x", State: op.Failed}), fault.NotFound)
	uid := uint32(7)
	want := []event.Event{
		{Seq: 1, Kind: event.OperationBegan, Severity: event.Info, Message: "snapshot began"},
		{Seq: 2, Kind: event.OperationWarning, Severity: event.Warning, Code: "one", Disk: "root", Message: "first"},
		{Seq: 3, Kind: event.OperationWarning, Severity: event.Warning, Code: "two", Message: "second", Snapshot: "5a"},
		{Seq: 4, Kind: event.OperationEnded, Severity: event.Error, Code: "no-space", Result: "failed", Message: "snapshot failed: full", Snapshot: "5a"},
	}
	got := events(t, c, event.Filter{})
	for i := range got {
		got[i].Time = time.Time{}
	}
	for i := range want {
		want[i].VMID, want[i].VMName, want[i].Operation, want[i].UID = "v", "web", "0000beef", &uid
	}
	same(t, "events", got, want)
}

func TestPruneEvents(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	bounds := func() event.Bounds {
		t.Helper()
		b, err := c.EventBounds(ctx)
		check(t, err)
		return b
	}
	same(t, "empty", bounds(), event.Bounds{First: 1})
	at := func(hours ...int) {
		for _, h := range hours {
			check(t, c.AddEvents(ctx, event.Event{Time: epoch.Add(time.Duration(h) * time.Hour), Kind: event.VMStarted, Severity: event.Info}))
		}
	}
	at(0, 1, 9, 2, 3) // the third had a clock that was ahead
	check(t, c.PruneEvents(ctx, 100, 0, epoch))
	same(t, "young enough", bounds(), event.Bounds{First: 1, Last: 5})
	check(t, c.PruneEvents(ctx, 100, 0, epoch.Add(3*time.Hour)))
	same(t, "up to the first that is young", bounds(), event.Bounds{First: 3, Last: 5})
	check(t, c.PruneEvents(ctx, 2, 0, epoch))
	same(t, "by count", bounds(), event.Bounds{First: 4, Last: 5})
	check(t, c.PruneEvents(ctx, 2, 0, epoch.Add(100*time.Hour)))
	same(t, "all", bounds(), event.Bounds{First: 6, Last: 5})
	at(4)
	same(t, "no number comes again", bounds(), event.Bounds{First: 6, Last: 6})
}

func TestSinkPositions(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	if _, known, err := c.SinkPosition(ctx, "webhook"); known || err != nil {
		t.Error(known, err)
	}
	check(t, c.SetSinkPosition(ctx, "webhook", 3))
	check(t, c.SetSinkPosition(ctx, "webhook", 1<<40))
	if n, known, err := c.SinkPosition(ctx, "webhook"); n != 1<<40 || !known || err != nil {
		t.Error(n, known, err)
	}
}

// TestEventsAdded has a reader that waits, and misses none of what several
// writers add.
func TestEventsAdded(t *testing.T) {
	const writers, each = 4, 25
	c := openTest(t, t.TempDir())
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var group sync.WaitGroup
	for range writers {
		group.Go(func() {
			for range each {
				if err := c.AddEvents(ctx, event.Event{Kind: event.VMStarted, Severity: event.Info}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	var last uint64
	for last < writers*each {
		added := c.EventsAdded()
		all, err := c.Events(ctx, event.Filter{Since: last})
		check(t, err)
		for _, e := range all {
			if e.Seq != last+1 {
				t.Fatalf("%d comes after %d", e.Seq, last)
			}
			last = e.Seq
		}
		if len(all) > 0 {
			continue
		}
		select {
		case <-added:
		case <-ctx.Done():
			t.Fatalf("nothing came after %d", last)
		}
	}
	group.Wait()
}

// TestNoEventOfWhatFailed rolls an event back with what it is about.
func TestNoEventOfWhatFailed(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	added := c.EventsAdded()
	err := c.Update(ctx, func(tx *Tx) error {
		check(t, tx.AddEvent(ctx, event.Event{Kind: event.VMForgotten, Severity: event.Info}))
		return tx.DeleteVM(ctx, "x")
	})
	wantKind(t, "update", err, fault.NotFound)
	if all := events(t, c, event.Filter{}); len(all) > 0 {
		t.Errorf("%+v", all)
	}
	select {
	case <-added:
		t.Error("it was told all the same")
	default:
	}
}
