package qga

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"regexp"
	"strconv"

	"golang.org/x/sys/unix"
)

// processRoot matches the part of a path that leads into the root directory of
// another process.
var processRoot = regexp.MustCompile(`^(/proc/[0-9]+/root)/+(.+)$`)

// Dial connects to the guest agent's socket at path, and does not talk yet: a
// socket that another client holds is connected to just as well, and then never
// answers. The path may be longer than a socket address can hold. One under
// /proc/PID/root is resolved inside that root, so that links planted there
// cannot lead to the host's own sockets.
func Dial(ctx context.Context, path string, lim Limits) (*Client, error) {
	ctx, cancel := bounded(ctx, dial)
	defer cancel()
	conn, err := connect(ctx, path)
	if err != nil {
		return nil, &OpError{Command: dial + " " + path, Err: err}
	}
	return New(conn, lim), nil
}

// connect opens the socket's inode first and connects through the descriptor:
// its name in /proc is always short, and cannot be exchanged meanwhile.
func connect(ctx context.Context, path string) (net.Conn, error) {
	fd, err := openSocket(path)
	if err != nil {
		return nil, err
	}
	inode := os.NewFile(uintptr(fd), path)
	defer func() { _ = inode.Close() }()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", "/proc/self/fd/"+strconv.Itoa(fd))
	switch {
	case errors.Is(err, unix.EAGAIN):
		return nil, ErrBusy
	case errors.Is(err, unix.ECONNREFUSED):
		return nil, fmt.Errorf("%w: nobody listens: %w", ErrGone, unix.ECONNREFUSED)
	case err != nil:
		return nil, transportError(ctx, err)
	}
	return conn, nil
}

func openSocket(path string) (int, error) {
	fd, err := openInode(path)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	var st unix.Stat_t
	err = unix.Fstat(fd, &st)
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		err = unix.ENOTSOCK
	}
	if err != nil {
		return -1, errors.Join(&os.PathError{Op: "open", Path: path, Err: err}, unix.Close(fd))
	}
	return fd, nil
}

func openInode(path string) (int, error) {
	const flags = unix.O_PATH | unix.O_CLOEXEC
	parts := processRoot.FindStringSubmatch(path)
	if parts == nil {
		return unix.Open(path, flags, 0)
	}
	root, err := unix.Open(parts[1], flags|unix.O_DIRECTORY, 0)
	if err != nil {
		return -1, err
	}
	defer func() { _ = unix.Close(root) }()
	return unix.Openat2(root, parts[2], &unix.OpenHow{Flags: flags, Resolve: unix.RESOLVE_IN_ROOT})
}
