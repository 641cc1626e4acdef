package memdump

import (
	"context"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// mayHang tells of a QEMU that freezes the guest for good when a background
// save ends before its time.
func mayHang(v Version) bool { return !v.AtLeast(8, 1) }

// checkTarget refuses a file that a background save could harm the guest with:
// anything that is no regular file can hold QEMU up, and with it the guest's
// writes. Before 8.1 the save must not fail at all, so QEMU must be able to
// write the file, and all the space must be there.
func checkTarget(ctx context.Context, c Config) error {
	if err := c.unsafeTarget(ctx); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrUnsafeTarget, c.Target.Name(), err)
	}
	return nil
}

func (c Config) unsafeTarget(ctx context.Context) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(c.Target.Fd()), &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return errors.New("it is no regular file")
	}
	flags, err := unix.FcntlInt(c.Target.Fd(), unix.F_GETFL, 0)
	switch {
	case err != nil:
		return err
	case flags&unix.O_ACCMODE == unix.O_RDONLY:
		return errors.New("it is open for reading only")
	case flags&(unix.O_APPEND|unix.O_DIRECT) != 0:
		return errors.New("it is open for appending or direct I/O")
	case !mayHang(c.Facts.Version):
		return nil
	}
	offset, err := c.Target.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	ram, err := ramSize(ctx, c.Session)
	if err != nil {
		return err
	}
	need := uint64(offset) + Facts{RAM: ram}.Reserve()
	const sector = 512 // the unit of st_blocks, whatever the file system's
	if have := uint64(st.Blocks) * sector; have < need {
		return fmt.Errorf("%d bytes are reserved, %d may be needed", have, need)
	}
	if c.PID == 0 {
		return nil
	}
	limit, err := sizeLimit(c.PID)
	if err == nil && limit < need {
		err = fmt.Errorf("QEMU may write files of %d bytes only, %d may be needed", limit, need)
	}
	return err
}
