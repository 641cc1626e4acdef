package memdump

import (
	"errors"
	"fmt"
)

// What can be wrong with a memory file. Errors that wrap these name the file.
var (
	// ErrIncomplete is a file whose save has not finished, or never did.
	ErrIncomplete = errors.New("the save that wrote this memory has not finished; if none is running, delete the file")
	// ErrNotMemory is a file that vmsnap did not write.
	ErrNotMemory = errors.New("not a memory file")
	// ErrUnknownVersion is a file that a newer vmsnap wrote.
	ErrUnknownVersion = errors.New("unknown format of memory file; use the vmsnap that wrote it, or a newer one")
	// ErrAltered is a file that does not hold what was written. It cannot be
	// restored; disks of the same snapshot can.
	ErrAltered = errors.New("the memory was altered since it was saved; restore the disks without it")
	// ErrTruncated is a file that has lost its end.
	ErrTruncated = errors.New("the memory file has lost its end; restore the disks without it")
	// ErrNoReserve is a file system that cannot reserve space (EOPNOTSUPP).
	ErrNoReserve = errors.New("the file system cannot reserve space")
	// ErrFileBusy is a File that is being followed or finished already.
	ErrFileBusy = errors.New("the memory file is being followed or finished")
)

// SpaceError says that a memory file does not fit on its file system. Err is
// ENOSPC, EDQUOT or EFBIG.
type SpaceError struct {
	Name   string
	Needed uint64 // bytes
	Free   uint64 // bytes that the file system has, quotas aside
	Err    error
}

func (e *SpaceError) Error() string {
	return fmt.Sprintf("memory file %s: %d bytes are needed, %d are free: %v", e.Name, e.Needed, e.Free, e.Err)
}

func (e *SpaceError) Unwrap() error { return e.Err }
