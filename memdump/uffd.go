package memdump

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Requests of userfaultfd (include/uapi/linux/userfaultfd.h, ioctl_userfaultfd(2)).
const (
	uffdioUnregister   = 0x8010aa01 // _IOR(0xAA, 1, struct uffdio_range)
	uffdioWake         = 0x8010aa02 // _IOR(0xAA, 2, struct uffdio_range)
	uffdioWriteProtect = 0xc018aa06 // _IOWR(0xAA, 6, struct uffdio_writeprotect)
)

// uffdRange is struct uffdio_range.
type uffdRange struct{ start, length uint64 }

// uffdWriteProtect is struct uffdio_writeprotect. Mode 0 lifts the protection
// and wakes who waits for that.
type uffdWriteProtect struct {
	uffdRange
	mode uint64
}

// userfaultfds returns the numbers of a process's userfaultfd descriptors.
func userfaultfds(pid int) ([]int, error) {
	dir := procPath(pid, "fd")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var found []int
	for _, e := range entries {
		target, err := os.Readlink(dir + "/" + e.Name())
		if errors.Is(err, os.ErrNotExist) { // closed meanwhile
			continue
		}
		if err != nil {
			return nil, err
		}
		if target != "anon_inode:[userfaultfd]" {
			continue
		}
		n, err := strconv.Atoi(e.Name())
		if err != nil {
			return nil, err
		}
		found = append(found, n)
	}
	return found, nil
}

// liftProtection ends the write tracking of a process's memory from outside: by
// its own descriptors, which work on its memory whoever holds a duplicate
// (pidfd_getfd(2), Linux 5.6). A save that were under way all the same would
// fail at the next page, since that is not tracked any more.
func liftProtection(pidfd, pid int) error {
	descriptors, err := userfaultfds(pid)
	if err != nil {
		return err
	}
	all, err := mappings(pid)
	if err != nil {
		return err
	}
	var refused []error
	for _, n := range descriptors {
		fd, err := unix.PidfdGetfd(pidfd, n, 0)
		if err != nil {
			return fmt.Errorf("duplicate the process's descriptor %d (CAP_SYS_PTRACE is needed): %w", n, err)
		}
		for _, m := range all {
			if !m.has(flagTracked) {
				continue
			}
			if err := liftFrom(fd, m); err != nil {
				refused = append(refused, fmt.Errorf("%x-%x: %w", m.start, m.end, err))
			}
		}
		if err := unix.Close(fd); err != nil {
			return err
		}
	}
	// A descriptor refuses what another one protects, so only this tells.
	if all, err = mappings(pid); err != nil {
		return err
	}
	if left := protectedBytes(all); left > 0 {
		still := fmt.Errorf("%d bytes are still protected from writes", left)
		return errors.Join(append([]error{still}, refused...)...)
	}
	return nil
}

// liftFrom lifts the protection of one mapping.
func liftFrom(fd int, m mapping) error {
	r := uffdRange{m.start, m.size()}
	if err := uffdIoctl(fd, uffdioWriteProtect, unsafe.Pointer(&uffdWriteProtect{uffdRange: r})); err != nil {
		return fmt.Errorf("lift the write protection: %w", err)
	}
	if err := uffdIoctl(fd, uffdioUnregister, unsafe.Pointer(&r)); err != nil {
		return fmt.Errorf("unregister: %w", err)
	}
	// Whoever ran into the protection just before it went.
	if err := uffdIoctl(fd, uffdioWake, unsafe.Pointer(&r)); err != nil {
		return fmt.Errorf("wake: %w", err)
	}
	return nil
}

func uffdIoctl(fd int, request uintptr, arg unsafe.Pointer) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
	if errno != 0 {
		return errno
	}
	return nil
}
