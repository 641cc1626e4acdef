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
	inode, err := openSocket(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = inode.Close() }()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", "/proc/self/fd/"+strconv.Itoa(int(inode.Fd())))
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

func openSocket(path string) (*os.File, error) {
	inode, err := openInode(path)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	err = unix.Fstat(int(inode.Fd()), &st)
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		err = unix.ENOTSOCK
	}
	if err != nil {
		return nil, errors.Join(&os.PathError{Op: "open", Path: path, Err: err}, inode.Close())
	}
	return inode, nil
}

func openInode(path string) (*os.File, error) {
	const flags = unix.O_PATH | unix.O_CLOEXEC
	parts := processRoot.FindStringSubmatch(path)
	if parts == nil {
		return os.OpenFile(path, flags, 0)
	}
	root, err := unix.Open(parts[1], flags|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: parts[1], Err: err}
	}
	defer func() { _ = unix.Close(root) }()
	fd, err := unix.Openat2(root, parts[2], &unix.OpenHow{Flags: flags, Resolve: unix.RESOLVE_IN_ROOT})
	if errors.Is(err, unix.ENOSYS) {
		return openBeneath(parts[1], parts[2])
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// openBeneath does without openat2, which services may not call when systemd
// keeps them from making setuid files. A link that leads outside, or counts
// from the root, fails here.
func openBeneath(root, name string) (*os.File, error) {
	dir, err := os.OpenRoot(root)
	if err != nil {
		return nil, err
	}
	defer func() { _ = dir.Close() }()
	return dir.OpenFile(name, unix.O_PATH, 0)
}
