package catalog

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"time"

	"github.com/hashicorp/go-hclog"
	_ "modernc.org/sqlite" // the database driver

	"github.com/vmsnap/vmsnap/agent/fault"
)

// The time limits of this package.
const (
	// lockTimeout is how long a write waits for a lock on the database that
	// another program holds, such as an operator's sqlite3.
	lockTimeout = 5 * time.Second
)

// maxReaders bounds the connections for reading, each of which has a cache.
const maxReaders = 4

// fileName is the database within the state directory.
const fileName = "catalog.db"

// Catalog is the open catalog.
type Catalog struct {
	reader
	path  string
	log   hclog.Logger
	lock  *dirLock
	write *sql.DB
	read  *sql.DB
	turn  chan struct{} // holds a token while somebody writes
	added bell          // rung when events were added
	now   func() time.Time
}

// Open opens the catalog in the state directory, and makes both if they are
// missing. The directory is made private to its owner.
//
// It fails with fault.Busy when another process has the catalog open, with
// fault.Unsupported when its format is newer than this program, and with
// fault.Denied when the directory is not fit for secrets.
func Open(ctx context.Context, dir string, logger hclog.Logger) (*Catalog, error) {
	steps, err := embeddedSteps()
	if err != nil {
		return nil, err
	}
	return open(ctx, dir, logger, steps)
}

func open(ctx context.Context, dir string, logger hclog.Logger, steps []step) (_ *Catalog, err error) {
	dir, err = filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open catalog: %w", err)
	}
	if err := prepareDir(dir); err != nil {
		return nil, err
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	c := &Catalog{
		path: filepath.Join(dir, fileName),
		log:  logger,
		lock: lock,
		turn: make(chan struct{}, 1),
		now:  time.Now,
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
		}
	}()
	if err := createFile(c.path); err != nil {
		return nil, fmt.Errorf("open catalog: %w", err)
	}
	if err := c.openWriter(ctx, steps); err != nil {
		return nil, err
	}
	if err := syncDir(dir); err != nil {
		return nil, fmt.Errorf("open catalog: %w", err)
	}
	return c, c.openReaders(ctx)
}

// openWriter opens the one connection that writes and brings the database to the
// newest format.
func (c *Catalog) openWriter(ctx context.Context, steps []step) error {
	db, err := sql.Open("sqlite", dsn(c.path, "synchronous(FULL)", "foreign_keys(ON)"))
	if err != nil {
		return fmt.Errorf("open catalog %s: %w", c.path, err)
	}
	db.SetMaxOpenConns(1)
	c.write = db
	if err := migrate(ctx, db, c.path, steps, c.log); err != nil {
		return storeError(c.path, err)
	}
	return nil
}

// openReaders opens the connections that read.
func (c *Catalog) openReaders(ctx context.Context) error {
	db, err := sql.Open("sqlite", dsn(c.path, "query_only(ON)"))
	if err != nil {
		return fmt.Errorf("open catalog %s: %w", c.path, err)
	}
	db.SetMaxOpenConns(maxReaders)
	c.read = db
	c.reader = reader{q: db, path: c.path, now: func() time.Time { return c.now() }}
	return storeError(c.path, db.PingContext(ctx))
}

// Close waits for the write under way and closes the catalog. What comes after
// it fails.
func (c *Catalog) Close() error {
	c.turn <- struct{}{}
	defer func() { <-c.turn }()
	var errs []error
	if c.read != nil {
		errs = append(errs, c.read.Close())
	}
	if c.write != nil {
		errs = append(errs, c.write.Close())
	}
	errs = append(errs, c.lock.release())
	return errors.Join(errs...)
}

// Tx is a transaction that writes: what its methods do becomes durable together
// or not at all, and they see what was done before. It is for one goroutine, and
// for the duration of the function that got it.
type Tx struct {
	reader
	tx   *sql.Tx
	told bool // events were added
}

// Update calls f with a transaction and commits it when f returns nil. f must
// use the Tx only: a call to the Catalog's own writing methods would wait for f.
func (c *Catalog) Update(ctx context.Context, f func(tx *Tx) error) error {
	select {
	case c.turn <- struct{}{}:
		defer func() { <-c.turn }()
	case <-ctx.Done():
		return fmt.Errorf("catalog: waiting to write: %w", context.Cause(ctx))
	}
	// Not aborted by the end of ctx: a commit that was aborted is one whose
	// outcome nobody knows.
	tx, err := c.write.BeginTx(context.WithoutCancel(ctx), nil)
	if err != nil {
		return storeError(c.path, err)
	}
	defer func() { _ = tx.Rollback() }() // after a commit it does nothing
	t := &Tx{reader: reader{q: tx, path: c.path, now: c.now}, tx: tx}
	if err := f(t); err != nil {
		return storeError(c.path, err)
	}
	err = tx.Commit()
	if err == nil && t.told {
		c.added.ring()
	}
	return storeError(c.path, err)
}

// exec runs a statement and returns how many rows it changed.
func (tx *Tx) exec(ctx context.Context, query string, args ...any) (int64, error) {
	res, err := tx.tx.ExecContext(ctx, query, args...)
	if err != nil {
		return 0, err
	}
	return res.RowsAffected()
}

// dsn names the database to the driver. The pragmas hold for each connection.
func dsn(path string, pragmas ...string) string {
	v := url.Values{"_txlock": {"immediate"}}
	v.Add("_pragma", fmt.Sprintf("busy_timeout(%d)", lockTimeout.Milliseconds()))
	for _, p := range pragmas {
		v.Add("_pragma", p)
	}
	u := url.URL{Scheme: "file", Path: path, RawQuery: v.Encode()}
	return u.String()
}

// notFound returns the error for something that the catalog does not hold.
func notFound(format string, args ...any) error {
	return fault.New(fault.NotFound, format, args...)
}
