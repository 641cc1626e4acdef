package memdump

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// reserveSpace reserves space for a stream of so many bytes. The file's size
// stays as it is, and so tells how much has been written.
func reserveSpace(file *os.File, name string, reserve uint64) error {
	if reserve == 0 {
		return nil
	}
	if reserve > maxStream {
		return fmt.Errorf("memory file %s: cannot reserve %d bytes", name, reserve)
	}
	var err error
	for {
		err = unix.Fallocate(int(file.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, HeaderSize+int64(reserve))
		if !errors.Is(err, unix.EINTR) { // Go's own signals interrupt a long one
			break
		}
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("memory file %s: %w", name, ErrNoReserve)
	default:
		return spaceError(file, name, HeaderSize+reserve, fmt.Errorf("reserve space for memory file %s: %w", name, err))
	}
}

// spaceError turns an error that means a lack of space into a SpaceError.
func spaceError(file *os.File, name string, needed uint64, err error) error {
	for _, errno := range []unix.Errno{unix.ENOSPC, unix.EDQUOT, unix.EFBIG} {
		if !errors.Is(err, errno) {
			continue
		}
		e := &SpaceError{Name: name, Needed: needed, Err: errno}
		var st unix.Statfs_t
		if unix.Fstatfs(int(file.Fd()), &st) == nil {
			e.Free = st.Bavail * uint64(st.Bsize)
		}
		return e
	}
	return err
}

// giveBack gives back what is reserved beyond size, which is the file's.
// Some file systems do so when a file is truncated to the size it has, others
// when a hole is punched; each ignores the other.
func giveBack(file *os.File, size int64) error {
	if err := file.Truncate(size); err != nil {
		return fmt.Errorf("give back reserved space: %w", err)
	}
	const mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	err := unix.Fallocate(int(file.Fd()), mode, size, maxStream-size)
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EFBIG) {
		return fmt.Errorf("give back reserved space: %w", err)
	}
	return nil
}
