package blockdev

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// QEMU announces what it does with an image, and what it lets others do, by
// open-file-description locks on single bytes of the file (block/file-posix.c:
// RAW_LOCK_PERM_BASE, RAW_LOCK_SHARED_BASE; the bits are BLK_PERM_*).
const (
	lockPermBase   = 100
	lockSharedBase = 200
	permWrite      = 1
)

// ErrLocked means that a process has the image open in a way that excludes
// what was asked for.
var ErrLocked = errors.New("image is in use by another process")

// Lock holds QEMU's image locks on a file until Close.
type Lock struct{ f *os.File }

// LockNoWriters keeps every QEMU from writing to a layer, as needed while it is
// worked on offline. It fails with ErrLocked when one writes to it already.
// Readers are let be.
func LockNoWriters(path string) (*Lock, error) {
	l, err := DenyNewWriters(path)
	if err != nil {
		return nil, err
	}
	written, err := l.Written()
	if err == nil && written {
		err = fmt.Errorf("%s: %w", path, ErrLocked)
	}
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// DenyNewWriters keeps every QEMU from opening a layer for writing from now on.
// One that writes to it already goes on, until it gives that permission up.
func DenyNewWriters(path string) (*Lock, error) {
	f, err := openImage(path)
	if err != nil {
		return nil, err
	}
	notShared := unix.Flock_t{Type: unix.F_RDLCK, Start: lockSharedBase + permWrite, Len: 1}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &notShared); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	}
	return &Lock{f}, nil
}

// Written reports whether a QEMU has the layer open for writing.
func (l *Lock) Written() (bool, error) {
	probe := unix.Flock_t{Type: unix.F_WRLCK, Start: lockPermBase + permWrite, Len: 1}
	if err := unix.FcntlFlock(l.f.Fd(), unix.F_OFD_GETLK, &probe); err != nil {
		return false, fmt.Errorf("query the locks of %s: %w", l.f.Name(), err)
	}
	return probe.Type != unix.F_UNLCK, nil
}

// Close releases the locks.
func (l *Lock) Close() error { return l.f.Close() }
