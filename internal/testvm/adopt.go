package testvm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Adopt is Launch for a guest whose QEMU another program starts. start is given
// the command line that Launch would have used; the QEMU that it has started,
// and whose process id it returns, must have the same sockets, disks, kernel and
// initramfs. Such a guest can be killed, but not restarted.
func Adopt(ctx context.Context, c Config, start func(ctx context.Context, args []string) (pid int, err error)) (*Guest, error) {
	g, err := adopt(ctx, c, start)
	if err != nil {
		return nil, fmt.Errorf("adopt guest: %w", err)
	}
	return g, nil
}

func adopt(ctx context.Context, c Config, start func(context.Context, []string) (int, error)) (*Guest, error) {
	g, err := prepare(ctx, c)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, bootDeadline)
	defer cancel()
	pid, err := start(ctx, g.Args())
	if err != nil {
		return nil, err
	}
	p, err := adoptProcess(pid)
	if err != nil {
		return nil, err
	}
	return g, g.boot(ctx, p)
}

// errAdopted stands for how a process ended that is another's to collect.
var errAdopted = errors.New("nobody told us how")

// adoptProcess watches a process that is not a child of this one.
func adoptProcess(pid int) (*process, error) {
	found, err := os.FindProcess(pid) // which holds on to it, so that no other is taken for it
	if err != nil {
		return nil, err
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	p := &process{
		pid: pid, ended: make(chan struct{}),
		signal: func(s syscall.Signal) error { return found.Signal(s) },
	}
	go func() {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		for {
			if _, err := unix.Poll(poll, -1); err != unix.EINTR {
				break
			}
		}
		_ = unix.Close(fd)
		p.err = errAdopted
		close(p.ended)
	}()
	return p, nil
}
