package catalog

import (
	"fmt"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/agent/event"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
)

// TestClockJumps has the clock jump while an operation runs, for good or for a
// while. Its request id goes on standing for it, and nothing is forgotten that
// happened just before.
func TestClockJumps(t *testing.T) {
	const year = 365 * 24 * time.Hour
	for _, jump := range []time.Duration{time.Hour, 10 * year, -time.Hour, -10 * year} {
		for _, back := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s,back=%t", jump, back), func(t *testing.T) {
				ctx, c := t.Context(), openTest(t, t.TempDir())
				now := epoch
				c.now = func() time.Time { return now }
				end := func(rec op.Record) {
					t.Helper()
					rec.State, rec.Ended = op.Succeeded, now
					check(t, c.UpdateOperation(ctx, rec))
				}
				before := op.Record{ID: "before", UID: 1, Created: now}
				check(t, c.CreateOperation(ctx, before))
				end(before)
				running := op.Record{ID: "running", UID: 1, RequestID: "key", Created: now}
				check(t, c.CreateOperation(ctx, running))
				_, err := c.AppendJournal(ctx, "running", "prepare", nil)
				check(t, err)

				now = now.Add(jump)
				check(t, c.Purge(ctx))
				check(t, c.PruneEvents(ctx, 100_000, 1000, now.Add(-90*24*time.Hour)))
				if rec, ok, err := c.OperationByRequest(ctx, 1, "key"); err != nil || !ok || rec.ID != "running" {
					t.Errorf("the request id stands for %q, %v", rec.ID, err)
				}
				again := op.Record{ID: "again", UID: 1, RequestID: "key", Created: now}
				wantKind(t, "the same request again", c.CreateOperation(ctx, again), fault.Exists)
				_, err = c.AppendJournal(ctx, "running", "cut", nil)
				check(t, err)
				entries, err := c.Journal(ctx, "running")
				check(t, err)
				same(t, "journal", []string{entries[0].Kind, entries[1].Kind}, []string{"prepare", "cut"})
				check(t, c.CreateOperation(ctx, op.Record{ID: "after", UID: 1, Created: now}))
				if back {
					now = epoch.Add(time.Minute)
				}
				end(running)
				check(t, c.Purge(ctx))

				all, err := c.Operations(ctx, op.Filter{})
				check(t, err)
				var ids []string
				for _, rec := range all {
					ids = append(ids, rec.ID)
				}
				same(t, "operations, the newest first", ids, []string{"after", "running", "before"})
				told, err := c.Events(ctx, event.Filter{})
				check(t, err)
				same(t, "events", len(told), 5) // three have begun, two have ended
			})
		}
	}
}
