package catalog

import (
	"context"
	"database/sql"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vmsnap/vmsnap/agent/event"
	"github.com/vmsnap/vmsnap/agent/op"
)

const eventColumns = `time, kind, severity, vm, vm_name, operation, snapshot, schedule, uid, disk, code, result, message`

func scanEvent(row scanner) (event.Event, error) {
	var e event.Event
	var severity int
	var uid sql.Null[uint32]
	err := row.Scan(bitsColumn{&e.Seq}, timeColumn{&e.Time}, &e.Kind, &severity, &e.VMID, &e.VMName, &e.Operation, &e.Snapshot,
		&e.Schedule, &uid, &e.Disk, &e.Code, &e.Result, &e.Message)
	if err != nil {
		return e, err
	}
	if severity < 0 || severity >= len(event.Severities) {
		return e, fmt.Errorf("event %d has the severity %d", e.Seq, severity)
	}
	e.Severity = event.Severities[severity]
	if uid.Valid {
		e.UID = &uid.V
	}
	return e, nil
}

// AddEvents records events; they get the next numbers. An event without a time
// happened now.
func (c *Catalog) AddEvents(ctx context.Context, events ...event.Event) error {
	return c.Update(ctx, func(tx *Tx) error {
		for _, e := range events {
			if err := tx.AddEvent(ctx, e); err != nil {
				return err
			}
		}
		return nil
	})
}

// AddEvent records an event together with what else the transaction does. An
// event of a VM that it does not name gets the VM's name.
func (tx *Tx) AddEvent(ctx context.Context, e event.Event) error {
	if e.Time.IsZero() {
		e.Time = tx.now()
	}
	if e.VMID != "" && e.VMName == "" {
		e.VMName = tx.vmName(ctx, e.VMID)
	}
	severity := slices.Index(event.Severities, e.Severity)
	if severity < 0 {
		return fmt.Errorf("event %s has the severity %q", e.Kind, e.Severity)
	}
	_, err := tx.exec(ctx, `INSERT INTO events (`+eventColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		nanos(e.Time), e.Kind, severity, e.VMID, e.VMName, e.Operation, e.Snapshot, e.Schedule, e.UID, e.Disk, e.Code, e.Result, e.Message)
	tx.told = tx.told || err == nil
	return err
}

// Events returns the events that the filter lets through.
func (r reader) Events(ctx context.Context, f event.Filter) ([]event.Event, error) {
	text := strings.Builder{}
	text.WriteString("SELECT seq, " + eventColumns + " FROM events WHERE seq > ?")
	args := []any{int64(f.Since)}
	and := func(condition string, values ...any) {
		text.WriteString(" AND " + condition)
		args = append(args, values...)
	}
	if f.VMID != "" {
		and("vm = ? AND vm <> ''", f.VMID)
	}
	if f.VMName != "" {
		and("vm_name = ?", f.VMName)
	}
	if f.Operation != "" {
		and("operation = ? AND operation <> ''", f.Operation)
	}
	if f.Schedule != "" {
		and("schedule = ?", f.Schedule)
	}
	if least := slices.Index(event.Severities, f.Severity); least > 0 {
		and("severity >= ?", least)
	}
	if !f.After.IsZero() {
		and("time >= ?", nanos(f.After))
	}
	if len(f.Kinds) > 0 {
		kinds := make([]any, len(f.Kinds))
		for i, k := range f.Kinds {
			kinds[i] = k
		}
		and("kind IN (?"+strings.Repeat(", ?", len(kinds)-1)+")", kinds...)
	}
	text.WriteString(" ORDER BY seq")
	if f.Newest {
		text.WriteString(" DESC")
	}
	return queryKept(ctx, r, scanEvent, f.Visible, f.Limit, text.String(), args...)
}

// EventBounds returns which events are kept.
func (r reader) EventBounds(ctx context.Context) (event.Bounds, error) {
	b, _, err := queryOne(ctx, r, func(row scanner) (b event.Bounds, err error) {
		err = row.Scan(bitsColumn{&b.First}, bitsColumn{&b.Last})
		return b, err
	}, `SELECT ifnull((SELECT min(seq) FROM events), last + 1), last
		FROM (SELECT ifnull((SELECT seq FROM sqlite_sequence WHERE name = 'events'), 0) AS last)`)
	return b, err
}

// PruneEvents forgets the oldest events: all but the last so many, and those
// before a time up to the first that is not. The last ones are spared, however
// old they seem: the clock may have jumped.
func (c *Catalog) PruneEvents(ctx context.Context, keep, spared int, before time.Time) error {
	return c.Update(ctx, func(tx *Tx) error {
		b, err := tx.EventBounds(ctx)
		if err != nil {
			return err
		}
		_, err = tx.exec(ctx, `DELETE FROM events WHERE seq <= ?1
			OR seq <= ?4 AND seq < ifnull((SELECT min(seq) FROM events WHERE time >= ?2), ?3)`,
			int64(b.Last)-int64(keep), nanos(before), int64(b.Last)+1, int64(b.Last)-int64(spared))
		return err
	})
}

// SinkPosition returns the number of the last event that a sink has passed on,
// if it has been there before.
func (r reader) SinkPosition(ctx context.Context, sink string) (uint64, bool, error) {
	n, ok, err := queryOne(ctx, r, scanValue[int64], "SELECT seq FROM event_sinks WHERE name = ?", sink)
	return uint64(n), ok, err
}

// SetSinkPosition records the last event that a sink has passed on.
func (c *Catalog) SetSinkPosition(ctx context.Context, sink string, seq uint64) error {
	return c.Update(ctx, func(tx *Tx) error {
		_, err := tx.exec(ctx, `INSERT INTO event_sinks (name, seq) VALUES (?, ?)
			ON CONFLICT (name) DO UPDATE SET seq = excluded.seq`, sink, int64(seq))
		return err
	})
}

// EventsAdded returns a channel that is closed when events have been added
// since the call. Whoever looks for events gets it first.
func (c *Catalog) EventsAdded() <-chan struct{} { return c.added.wait() }

// bell wakes those that wait for it.
type bell struct {
	mu   sync.Mutex
	next chan struct{}
}

func (b *bell) wait() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.next == nil {
		b.next = make(chan struct{})
	}
	return b.next
}

func (b *bell) ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.next != nil {
		close(b.next)
		b.next = nil
	}
}

// tellBegun records that an operation was accepted.
func (tx *Tx) tellBegun(ctx context.Context, rec op.Record) error {
	e := eventOf(rec, event.OperationBegan, event.Info)
	e.Message = fmt.Sprintf("%s began", rec.Kind)
	return tx.AddEvent(ctx, e)
}

// tellChanges records the warnings that an operation's record has beyond those
// that were recorded before, and its end.
func (tx *Tx) tellChanges(ctx context.Context, rec op.Record, warnings int, ended bool) error {
	for i := warnings; i < len(rec.Warnings); i++ {
		w := rec.Warnings[i]
		e := eventOf(rec, event.OperationWarning, event.Warning)
		e.Disk, e.Code, e.Message = w.Disk, w.Code, w.Message
		if err := tx.AddEvent(ctx, e); err != nil {
			return err
		}
	}
	if ended || !rec.State.Final() {
		return nil
	}
	e := eventOf(rec, event.OperationEnded, event.Info)
	e.Result = string(rec.State)
	e.Message = fmt.Sprintf("%s %s", rec.Kind, rec.State)
	if rec.Partial {
		e.Severity, e.Message = event.Warning, e.Message+" in part"
	}
	if f := rec.Failure; f != nil {
		e.Code, e.Message = string(f.Kind), e.Message+": "+f.Message
	}
	if rec.State == op.Failed {
		e.Severity = event.Error
	}
	return tx.AddEvent(ctx, e)
}

func eventOf(rec op.Record, kind event.Kind, severity event.Severity) event.Event {
	uid := rec.UID
	return event.Event{
		Kind: kind, Severity: severity, VMID: rec.VMID, VMName: rec.VMName, Operation: rec.ID, Snapshot: rec.Snapshot, UID: &uid,
	}
}
