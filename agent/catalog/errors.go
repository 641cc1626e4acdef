package catalog

import (
	"errors"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// storeError gives an error of the database the kind that a caller can act on.
// Other errors, and those that have a kind, stay as they are.
func storeError(path string, err error) error {
	var e *sqlite.Error
	var known *fault.Error
	if !errors.As(err, &e) || errors.As(err, &known) {
		return err
	}
	code := e.Code() & 0xff // the primary code
	if e.Code() == sqlite3.SQLITE_IOERR_SHMSIZE {
		code = sqlite3.SQLITE_FULL // the shared memory beside the database could not grow
	}
	switch code {
	case sqlite3.SQLITE_FULL:
		return fault.New(fault.NoSpace, "catalog %s: no space is left: %w", path, err).
			WithHint("make space on the file system that holds %s", path)
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
		return damaged(path, err)
	case sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN:
		return fault.New(fault.Denied, "catalog %s cannot be written: %w", path, err)
	case sqlite3.SQLITE_BUSY:
		return fault.New(fault.Busy, "catalog %s is locked by another program: %w", path, err).
			WithHint("see who has it open: fuser %s", path)
	default:
		return fault.New(fault.Failed, "catalog %s: %w", path, err)
	}
}

// damaged returns the error for a database that cannot be trusted.
func damaged(path string, found error) error {
	return fault.New(fault.Failed, "catalog %s is damaged: %w", path, found).
		WithHint("restore it from a backup; the manifests in .vmsnap beside the layers tell what it held")
}
