package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// uevents are the kernel's announcements of devices.
type uevents int

// kernelGroup is the multicast group that the kernel itself announces to.
const kernelGroup = 1

func subscribeUevents() (uevents, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return 0, fmt.Errorf("open uevent socket: %w", err)
	}
	err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: kernelGroup})
	if err != nil {
		return 0, fmt.Errorf("bind uevent socket: %w", err)
	}
	return uevents(fd), nil
}

// until calls done now and after each event until it returns true or fails.
func (u uevents) until(done func() (bool, error)) error {
	b := make([]byte, 8192)
	for {
		ok, err := done()
		if ok || err != nil {
			return err
		}
		// A lost event (ENOBUFS) is as good a reason to look as a received one.
		if _, err := unix.Read(int(u), b); err != nil && err != unix.ENOBUFS && err != unix.EINTR {
			return fmt.Errorf("read uevents: %w", err)
		}
	}
}

func (u uevents) close() error { return unix.Close(int(u)) }
