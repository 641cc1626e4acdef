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
	permBits       = 5
)

// ErrLocked means that a process has the image open in a way that excludes
// what was asked for.
var ErrLocked = errors.New("image is in use by another process")

// Lock holds QEMU's image locks on a file until Close.
type Lock struct{ f *os.File }

// LockExclusive locks a layer against every other user, as needed before it is
// changed offline. It fails with ErrLocked while any QEMU has it open.
func LockExclusive(path string) (*Lock, error) {
	return lockImage(path, func(fd int) error {
		for _, base := range []int64{lockPermBase, lockSharedBase} {
			if err := setLock(fd, unix.F_WRLCK, base, permBits); err != nil {
				return err
			}
		}
		return nil
	}, os.O_RDWR)
}

// LockNoWriters locks a layer against writers and lets readers be, as needed
// for layers below the one that is changed.
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
	return lockImage(path, func(fd int) error { return setLock(fd, unix.F_RDLCK, lockSharedBase+permWrite, 1) }, os.O_RDONLY)
}

// Written reports whether a QEMU has a layer open for writing.
func (l *Lock) Written() (bool, error) {
	probe := unix.Flock_t{Type: unix.F_WRLCK, Start: lockPermBase + permWrite, Len: 1}
	if err := unix.FcntlFlock(l.f.Fd(), unix.F_OFD_GETLK, &probe); err != nil {
		return false, fmt.Errorf("query the locks of %s: %w", l.f.Name(), err)
	}
	return probe.Type != unix.F_UNLCK, nil
}

func setLock(fd int, kind int16, start, length int64) error {
	return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: kind, Start: start, Len: length})
}

func lockImage(path string, take func(fd int) error, mode int) (*Lock, error) {
	f, err := os.OpenFile(path, mode, 0)
	if err != nil {
		return nil, err
	}
	if err := take(int(f.Fd())); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			return nil, fmt.Errorf("%s: %w", path, ErrLocked)
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return &Lock{f}, nil
}

// Close releases the locks.
func (l *Lock) Close() error { return l.f.Close() }
