package catalog

import (
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"
)

// querier is what reads need: the pool of readers, or a transaction.
type querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// reader reads. The Catalog has one over its readers, a Tx one over itself.
type reader struct {
	q    querier
	path string
	now  func() time.Time
}

// scanner is one row of an answer.
type scanner interface{ Scan(into ...any) error }

// query returns all rows of an answer. One statement sees one state of the
// database, so each read is a single statement.
func query[T any](ctx context.Context, r reader, scan func(scanner) (T, error), text string, args ...any) ([]T, error) {
	return queryKept(ctx, r, scan, nil, 0, text, args...)
}

// queryKept returns the first rows of an answer that are to be kept, at most limit
// of them, or all when that is 0. A nil keep keeps every row.
func queryKept[T any](ctx context.Context, r reader, scan func(scanner) (T, error), keep func(T) bool, limit int, text string, args ...any) ([]T, error) {
	if keep == nil && limit > 0 {
		text, args = text+" LIMIT ?", append(args, limit)
	}
	rows, err := r.q.QueryContext(ctx, text, args...)
	if err != nil {
		return nil, storeError(r.path, err)
	}
	defer func() { _ = rows.Close() }()
	var all []T
	for rows.Next() {
		v, err := scan(rows)
		if err != nil {
			return nil, fmt.Errorf("catalog %s: %w", r.path, err)
		}
		if keep != nil && !keep(v) {
			continue
		}
		if all = append(all, v); len(all) == limit {
			break
		}
	}
	return all, storeError(r.path, rows.Err())
}

// queryOne returns the first row of an answer, if there is one.
func queryOne[T any](ctx context.Context, r reader, scan func(scanner) (T, error), text string, args ...any) (T, bool, error) {
	all, err := query(ctx, r, scan, text, args...)
	if err != nil || len(all) == 0 {
		var none T
		return none, false, err
	}
	return all[0], true, nil
}

// scanValue scans rows of a single column.
func scanValue[T any](row scanner) (v T, err error) {
	err = row.Scan(&v)
	return v, err
}

// freeID returns an id of eight hexadecimal digits that no row of a table has.
func (r reader) freeID(ctx context.Context, table string) (string, error) {
	for {
		var b [4]byte
		_, _ = rand.Read(b[:]) // never fails: it ends the program instead
		id := hex.EncodeToString(b[:])
		_, taken, err := queryOne(ctx, r, scanValue[string], "SELECT id FROM "+table+" WHERE id = ?", id)
		if err != nil {
			return "", err
		}
		if !taken {
			return id, nil
		}
	}
}

// nanos is how a time is kept.
func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

// instant is the time that was kept.
func instant(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n).UTC()
}

// timeColumn reads a time.
type timeColumn struct{ t *time.Time }

// Scan implements sql.Scanner.
func (c timeColumn) Scan(v any) error {
	n, ok := v.(int64)
	if !ok {
		return fmt.Errorf("a time is kept as %T", v)
	}
	*c.t = instant(n)
	return nil
}

// bitsColumn reads an unsigned number whose 64 bits are kept as a signed one.
type bitsColumn struct{ n *uint64 }

// Scan implements sql.Scanner.
func (c bitsColumn) Scan(v any) error {
	n, ok := v.(int64)
	if !ok {
		return fmt.Errorf("a number is kept as %T", v)
	}
	*c.n = uint64(n)
	return nil
}

// jsonColumn reads JSON into what it points at.
type jsonColumn struct{ into any }

// Scan implements sql.Scanner.
func (c jsonColumn) Scan(v any) error {
	s, ok := v.(string)
	if !ok {
		return fmt.Errorf("JSON is kept as %T", v)
	}
	return json.Unmarshal([]byte(s), c.into)
}

// rawColumn reads JSON as it is, or nothing.
type rawColumn struct{ raw *json.RawMessage }

// Scan implements sql.Scanner.
func (c rawColumn) Scan(v any) error {
	s, ok := v.(string)
	if !ok {
		return fmt.Errorf("JSON is kept as %T", v)
	}
	*c.raw = nil
	if s != "" {
		*c.raw = json.RawMessage(s)
	}
	return nil
}

// jsonText renders a value that always has a JSON form.
func jsonText(v any) (string, error) {
	b, err := json.Marshal(v)
	return string(b), err
}
