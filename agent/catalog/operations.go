package catalog

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
)

var _ op.Store = (*Catalog)(nil)

const operationColumns = `id, kind, vm, vm_name, state, request, request_id, uid, steps, progress, warnings, failure,
	partial, snapshot, created, started, ended, revision, paused`

const selectOperation = "SELECT " + operationColumns + " FROM operations"

func scanOperation(row scanner) (op.Record, error) {
	var r op.Record
	err := row.Scan(&r.ID, &r.Kind, &r.VMID, &r.VMName, &r.State, rawColumn{&r.Request}, &r.RequestID, &r.UID,
		stepsColumn{&r.Steps}, progressColumn{&r.Progress}, jsonColumn{&r.Warnings}, failureColumn{&r.Failure},
		&r.Partial, &r.Snapshot, timeColumn{&r.Created}, timeColumn{&r.Started}, timeColumn{&r.Ended}, bitsColumn{&r.Revision}, &r.Paused)
	return r, err
}

// operationValues returns the values of operationColumns.
func operationValues(r op.Record) ([]any, error) {
	var texts [4]string
	for i, v := range []any{storedSteps(r.Steps), storedProgress(r.Progress), r.Warnings, storedFailure(r.Failure)} {
		text, err := jsonText(v)
		if err != nil {
			return nil, fmt.Errorf("operation %s: %w", r.ID, err)
		}
		texts[i] = text
	}
	return []any{
		r.ID, r.Kind, r.VMID, r.VMName, r.State, string(r.Request), r.RequestID, r.UID,
		texts[0], texts[1], texts[2], texts[3],
		r.Partial, r.Snapshot, nanos(r.Created), nanos(r.Started), nanos(r.Ended), int64(r.Revision), r.Paused,
	}, nil
}

// CreateOperation records a new operation together with its request id, if it
// has one. It returns fault.Exists when either is taken; a request id is free
// again after op.RequestRetention.
func (c *Catalog) CreateOperation(ctx context.Context, rec op.Record) error {
	return c.Update(ctx, func(tx *Tx) error { return tx.createOperation(ctx, rec) })
}

func (tx *Tx) createOperation(ctx context.Context, rec op.Record) error {
	if _, taken, err := queryOne(ctx, tx.reader, scanValue[string], "SELECT id FROM operations WHERE id = ?", rec.ID); err != nil {
		return err
	} else if taken {
		return fault.New(fault.Exists, "there is an operation %s already", rec.ID)
	}
	values, err := operationValues(rec)
	if err != nil {
		return err
	}
	_, err = tx.exec(ctx, `INSERT INTO operations (`+operationColumns+`)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`, values...)
	if err != nil {
		return err
	}
	if err := tx.tellBegun(ctx, rec); err != nil || rec.RequestID == "" {
		return err
	}
	now := tx.now()
	n, err := tx.exec(ctx, `
		INSERT INTO requests (uid, request_id, operation, created) VALUES (?, ?, ?, ?)
		ON CONFLICT (uid, request_id) DO UPDATE SET operation = excluded.operation, created = excluded.created
			WHERE created < ? AND operation NOT IN (SELECT id FROM operations WHERE ended = 0)`,
		rec.UID, rec.RequestID, rec.ID, nanos(now), nanos(now.Add(-op.RequestRetention)))
	if err == nil && n == 0 {
		err = fault.New(fault.Exists, "request id %q of user %d is taken", rec.RequestID, rec.UID)
	}
	return err
}

// UpdateOperation replaces the record of an operation, records its new warnings
// and its end as events, and drops its journal when the record is final. Its request id stays what it was. It returns
// fault.NotFound when there is no such operation.
func (c *Catalog) UpdateOperation(ctx context.Context, rec op.Record) error {
	return c.Update(ctx, func(tx *Tx) error { return tx.updateOperation(ctx, rec) })
}

func (tx *Tx) updateOperation(ctx context.Context, rec op.Record) error {
	values, err := operationValues(rec)
	if err != nil {
		return err
	}
	type known struct {
		warnings int
		ended    bool
	}
	before, there, err := queryOne(ctx, tx.reader, func(row scanner) (k known, err error) {
		err = row.Scan(&k.warnings, &k.ended)
		return k, err
	}, "SELECT ifnull(json_array_length(warnings), 0), ended <> 0 FROM operations WHERE id = ?", rec.ID)
	if err != nil {
		return err
	}
	if !there {
		return noOperation(rec.ID)
	}
	_, err = tx.exec(ctx, `
		UPDATE operations SET kind = ?2, vm = ?3, vm_name = ?4, state = ?5, request = ?6, request_id = ?7, uid = ?8,
			steps = ?9, progress = ?10, warnings = ?11, failure = ?12, partial = ?13, snapshot = ?14,
			created = ?15, started = ?16, ended = ?17, revision = ?18, paused = ?19
		WHERE id = ?1`, values...)
	if err != nil {
		return err
	}
	if err := tx.tellChanges(ctx, rec, before.warnings, before.ended); err != nil {
		return err
	}
	if rec.State.Final() {
		_, err = tx.exec(ctx, "DELETE FROM journal WHERE operation = ?", rec.ID)
	}
	return err
}

func noOperation(id string) error {
	return fault.New(fault.NotFound, "no operation with the id %q", id).WithHint("vmsnap operation list shows the operations")
}

// Operation returns an operation or fault.NotFound.
func (r reader) Operation(ctx context.Context, id string) (op.Record, error) {
	rec, ok, err := queryOne(ctx, r, scanOperation, selectOperation+" WHERE id = ?", id)
	if err == nil && !ok {
		err = noOperation(id)
	}
	return rec, err
}

// Operations returns the operations that the filter lets through, newest first.
func (r reader) Operations(ctx context.Context, f op.Filter) ([]op.Record, error) {
	text, args := selectOperation+" WHERE true", []any{}
	if f.Active {
		text += " AND ended = 0"
	}
	if f.VMID != "" {
		text += " AND vm = ?"
		args = append(args, f.VMID)
	}
	return queryKept(ctx, r, scanOperation, f.Visible, f.Limit, text+" ORDER BY seq DESC", args...)
}

// OperationByRequest returns the operation that a user started under a request
// id within op.RequestRetention, if there is one. That of one that has not ended
// stands whatever the clock says.
func (r reader) OperationByRequest(ctx context.Context, uid uint32, requestID string) (op.Record, bool, error) {
	return queryOne(ctx, r, scanOperation, selectOperation+` WHERE id =
		(SELECT operation FROM requests WHERE uid = ? AND request_id = ?
			AND (created >= ? OR operation IN (SELECT id FROM operations WHERE ended = 0)))`,
		uid, requestID, nanos(r.now().Add(-op.RequestRetention)))
}

// Purge forgets the request ids that are older than op.RequestRetention, and the
// operations that have ended and that op.OperationRetention, op.OperationsSpared
// and op.OperationsKept do not keep.
func (c *Catalog) Purge(ctx context.Context) error {
	return c.purge(ctx, op.OperationsKept, op.OperationsSpared)
}

func (c *Catalog) purge(ctx context.Context, kept, spared int) error {
	return c.Update(ctx, func(tx *Tx) error {
		_, err := tx.exec(ctx, `DELETE FROM requests WHERE created < ?
			AND operation NOT IN (SELECT id FROM operations WHERE ended = 0)`, nanos(tx.now().Add(-op.RequestRetention)))
		if err != nil {
			return err
		}
		_, err = tx.exec(ctx, `DELETE FROM operations WHERE ended <> 0 AND id NOT IN (SELECT operation FROM requests)
			AND (ended < ? AND seq <= (SELECT seq FROM operations ORDER BY seq DESC LIMIT 1 OFFSET ?)
				OR seq <= (SELECT seq FROM operations ORDER BY seq DESC LIMIT 1 OFFSET ?))`,
			nanos(tx.now().Add(-op.OperationRetention)), spared, kept)
		return err
	})
}

func scanEntry(row scanner) (op.Entry, error) {
	var e op.Entry
	err := row.Scan(&e.Seq, &e.Operation, &e.Kind, rawColumn{&e.Data}, timeColumn{&e.Time})
	return e, err
}

// AppendJournal adds an entry to the journal of an operation and returns it with
// its number and time. It returns fault.NotFound when there is no such
// operation, and fault.Failed when it has ended.
func (c *Catalog) AppendJournal(ctx context.Context, operation, kind string, data json.RawMessage) (e op.Entry, err error) {
	err = c.Update(ctx, func(tx *Tx) error {
		e, err = tx.appendJournal(ctx, operation, kind, data)
		return err
	})
	return e, err
}

func (tx *Tx) appendJournal(ctx context.Context, operation, kind string, data json.RawMessage) (op.Entry, error) {
	ended, ok, err := queryOne(ctx, tx.reader, scanValue[int64], "SELECT ended FROM operations WHERE id = ?", operation)
	switch {
	case err != nil:
		return op.Entry{}, err
	case !ok:
		return op.Entry{}, noOperation(operation)
	case ended != 0:
		return op.Entry{}, fault.New(fault.Failed, "operation %s has ended", operation)
	}
	e, _, err := queryOne(ctx, tx.reader, scanEntry, `
		INSERT INTO journal (operation, kind, data, time) VALUES (?, ?, ?, ?) RETURNING seq, operation, kind, data, time`,
		operation, kind, string(data), nanos(tx.now()))
	return e, err
}

// Journal returns the journal of an operation, oldest entry first.
func (r reader) Journal(ctx context.Context, operation string) ([]op.Entry, error) {
	return query(ctx, r, scanEntry, "SELECT seq, operation, kind, data, time FROM journal WHERE operation = ? ORDER BY seq", operation)
}
