package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// port is a virtio-serial port. The kernel lets one process open a port once.
type port struct {
	fd int
	// changed is sent a signal when a host connects or leaves; nil until a
	// read has to wait for one.
	changed chan os.Signal
}

// portDevices returns the devices of the ports by their names.
func portDevices() (map[string]string, error) {
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return nil, err
	}
	devices := map[string]string{}
	for _, file := range names {
		name, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		devices[strings.TrimSpace(string(name))] = "/dev/" + filepath.Base(filepath.Dir(file))
	}
	return devices, nil
}

func openPort(device string) (*port, error) {
	// Without O_NONBLOCK a write waits for a host, and for room.
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", device, err)
	}
	return &port{fd: fd}, nil
}

// notify asks the kernel for a SIGIO whenever a host connects or leaves.
func (p *port) notify() error {
	p.changed = make(chan os.Signal, 1)
	signal.Notify(p.changed, unix.SIGIO)
	if _, err := unix.FcntlInt(uintptr(p.fd), unix.F_SETOWN, unix.Getpid()); err != nil {
		return fmt.Errorf("own port: %w", err)
	}
	if _, err := unix.FcntlInt(uintptr(p.fd), unix.F_SETFL, unix.O_ASYNC); err != nil {
		return fmt.Errorf("watch port: %w", err)
	}
	return nil
}

// Read waits for data. A host that leaves is not an end: the next may come.
func (p *port) Read(b []byte) (int, error) {
	if p.changed == nil {
		if err := p.notify(); err != nil {
			return 0, err
		}
	}
	for {
		n, err := unix.Read(p.fd, b)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return 0, err
		case n > 0:
			return n, nil
		default: // no host is connected
			<-p.changed
		}
	}
}

// Write writes all of b.
func (p *port) Write(b []byte) (int, error) {
	done := 0
	for done < len(b) {
		n, err := unix.Write(p.fd, b[done:])
		if err != nil && err != unix.EINTR {
			return done, err
		}
		done += max(n, 0)
	}
	return done, nil
}

func (p *port) close() error { return unix.Close(p.fd) }
