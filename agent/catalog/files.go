package catalog

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// lockName is the file within the state directory that is locked while the
// catalog is open. It holds the process id of whoever has it open.
const lockName = "catalog.lock"

// prepareDir makes the state directory, 0700. One that others may enter is made
// private when it is plainly ours, and refused when it holds other things.
func prepareDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("create state directory: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	if info.Mode().Perm()&0o077 == 0 {
		return nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	ours := slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return e.Name() == fileName })
	if len(entries) > 0 && !ours {
		return fault.New(fault.Denied, "state directory %s has the mode %#o and holds other files: it must be private",
			dir, info.Mode().Perm()).WithHint("give vmsnapd a directory of its own, or: chmod 0700 %s", dir)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return fmt.Errorf("make the state directory private: %w", err)
	}
	return nil
}

// createFile makes the database's file, 0600, before SQLite does with the mode
// that the umask leaves. SQLite gives its log the mode of the database.
func createFile(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(f.Chmod(0o600), f.Close())
}

// syncDir makes the names in a directory durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// dirLock is a lock on the state directory. It ends with the process.
type dirLock struct{ f *os.File }

// lockDir locks the state directory or fails with fault.Busy.
func lockDir(dir string) (*dirLock, error) {
	path := filepath.Join(dir, lockName)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the catalog: %w", err)
	}
	if err := flock(f); err != nil {
		holder := holderOf(f)
		_ = f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock the catalog %s: %w", path, err)
		}
		return nil, fault.New(fault.Busy, "the catalog in %s is in use by %s", dir, holder).
			WithHint("only one vmsnapd may run on a state directory")
	}
	// The id is for the message above only: that it cannot be written, on a
	// full disk say, is no reason not to start.
	if err := f.Truncate(0); err == nil {
		_, _ = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	return &dirLock{f}, nil
}

// inheritedFor is how long the lock of a process that has ended is waited for. One
// that is killed while it starts another leaves the lock to that one, until its exec
// closes what it inherited: that takes milliseconds.
const inheritedFor = 5 * time.Second

// flock takes the lock, and waits for a holder that has ended.
func flock(f *os.File) error {
	fd := int(f.Fd())
	err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
	if !errors.Is(err, unix.EWOULDBLOCK) || !ended(f) {
		return err
	}
	taken := make(chan error, 1)
	go func() { taken <- unix.Flock(fd, unix.LOCK_EX) }()
	select {
	case err := <-taken:
		return err
	case <-time.After(inheritedFor):
		// What waits goes on waiting, and lets go at once of what it gets, since
		// the caller closes the file.
		return err
	}
}

// ended tells whether the process that took the lock is gone.
func ended(f *os.File) bool {
	pid, err := strconv.Atoi(holderID(f))
	return err == nil && errors.Is(unix.Kill(pid, 0), unix.ESRCH)
}

// holderOf tells who holds the lock.
func holderOf(f *os.File) string {
	pid := holderID(f)
	if _, err := strconv.Atoi(pid); err != nil {
		return "another process"
	}
	return "process " + pid
}

func holderID(f *os.File) string {
	b := make([]byte, 32)
	n, err := f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return ""
	}
	return strings.TrimSpace(string(b[:n]))
}

func (l *dirLock) release() error { return l.f.Close() }
