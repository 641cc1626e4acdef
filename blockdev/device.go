package blockdev

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// DeviceID returns what a block device is known by, as long as possible: what
// its driver calls it, and the start of a partition. A device that tells nothing
// of the kind has its number, which is another at the next boot; the id says at
// which it was given. The id is empty for a path that leads to no block device.
func DeviceID(path string) (string, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	info := infoOf(fi)
	if !info.Device {
		return "", nil
	}
	number := fmt.Sprintf("%d:%d", unix.Major(info.Ino), unix.Minor(info.Ino))
	sys, err := filepath.EvalSymlinks("/sys/dev/block/" + number)
	if err != nil {
		return "", fmt.Errorf("block device %s: %w", path, err)
	}
	return deviceID(sys, number)
}

// deviceID reads the id of a device from its directory in sysfs.
func deviceID(sys, number string) (string, error) {
	if _, err := os.Stat(sys + "/partition"); err == nil {
		start, err := attribute(sys, "start")
		if err != nil {
			return "", err
		}
		number, err := attribute(filepath.Dir(sys), "dev")
		if err != nil {
			return "", err
		}
		disk, err := deviceID(filepath.Dir(sys), number)
		return disk + " from " + start, err
	}
	for _, a := range []string{"dm/uuid", "loop/backing_file", "md/uuid", "wwid", "device/wwid", "serial"} {
		value, err := attribute(sys, a)
		if err != nil {
			return "", err
		}
		if a == "loop/backing_file" && value != "" {
			offset, err := attribute(sys, "loop/offset")
			if err != nil {
				return "", err
			}
			value += " from " + offset
		}
		if value != "" {
			return filepath.Dir(a+"/") + " " + value, nil
		}
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	return "number " + number + " at boot " + strings.TrimSpace(string(boot)), nil
}

// attribute reads a line from sysfs, empty when there is none.
func attribute(sys, name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(sys, name))
	switch {
	case err == nil:
		return strings.TrimSpace(string(b)), nil
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV), errors.Is(err, unix.EINVAL):
		return "", nil // some drivers have the attribute and no value
	default:
		return "", err
	}
}

// SetReadOnly makes a block device read-only, or takes that back (BLKROSET): no
// QEMU opens it for writing then, and nobody writes to it. It lasts until the
// device goes, at the latest until the host is started again.
func SetReadOnly(path string, on bool) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	if is, err := readOnly(f); err == nil && is == on {
		return nil
	}
	value := 0
	if on {
		value = 1
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.BLKROSET, value); err != nil {
		return fmt.Errorf("%s: read-only flag: %w", path, err)
	}
	return nil
}

// ReadOnly reports whether a block device is read-only.
func ReadOnly(path string) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer func() { _ = f.Close() }()
	return readOnly(f)
}

func readOnly(f *os.File) (bool, error) {
	value, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKROGET)
	if err != nil {
		return false, fmt.Errorf("%s: read-only flag: %w", f.Name(), err)
	}
	return value != 0, nil
}

// SyncDevice makes what was written to a block device durable.
func SyncDevice(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// openDevice opens a block device for writing, which must have the given size in
// bytes.
func openDevice(path string, size uint64) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	end, err := f.Seek(0, io.SeekEnd)
	if err == nil && uint64(end) != size {
		err = fmt.Errorf("%s has %d bytes, and not the %d that its layers have", path, end, size)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
