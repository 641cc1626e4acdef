package catalog

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"time"
)

// Size is how large a catalog is.
type Size struct {
	Database uint64 // bytes of its file
	Log      uint64 // bytes of SQLite's write-ahead log
	Journal  int    // entries in the journals of operations that have not ended
}

// Size returns how large the catalog is.
func (c *Catalog) Size(ctx context.Context) (Size, error) {
	var s Size
	var err error
	if s.Database, err = sizeOf(c.path); err != nil {
		return s, err
	}
	if s.Log, err = sizeOf(c.path + "-wal"); err != nil {
		return s, err
	}
	s.Journal, _, err = queryOne(ctx, c.reader, scanValue[int], "SELECT count(*) FROM journal")
	return s, err
}

// sizeOf returns the size of a file, 0 when it is not there.
func sizeOf(path string) (uint64, error) {
	fi, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	return uint64(fi.Size()), nil
}

// LastSnapshots returns the cut of the newest valid snapshot of each VM that has
// one, by id.
func (r reader) LastSnapshots(ctx context.Context) (map[string]time.Time, error) {
	type row struct {
		vm  string
		cut time.Time
	}
	rows, err := query(ctx, r, func(s scanner) (x row, err error) {
		err = s.Scan(&x.vm, timeColumn{&x.cut})
		return x, err
	}, `SELECT id, cut FROM (SELECT id, (SELECT created FROM snapshots
		WHERE vm = vms.id AND state = 'valid' ORDER BY created DESC LIMIT 1) AS cut FROM vms) WHERE cut IS NOT NULL`)
	last := make(map[string]time.Time, len(rows))
	for _, x := range rows {
		last[x.vm] = x.cut
	}
	return last, err
}
