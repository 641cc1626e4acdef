package rpc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Peer is the process at the other end of a connection, as the kernel
// recorded it when it connected.
type Peer struct {
	UID, GID uint32
	PID      int32
	Groups   []uint32 // supplementary groups
}

type peerKey struct{}

// peerFrom returns the peer of the connection that a call came on.
func peerFrom(ctx context.Context) (Peer, bool) {
	p, ok := ctx.Value(peerKey{}).(Peer)
	return p, ok
}

// identify asks the kernel who is at the other end of a connection.
func identify(conn net.Conn) (Peer, error) {
	uc, ok := conn.(*net.UnixConn)
	if !ok {
		return Peer{}, fmt.Errorf("a %T has no peer credentials", conn)
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return Peer{}, fmt.Errorf("peer credentials: %w", err)
	}
	var peer Peer
	var credErr error
	err = raw.Control(func(fd uintptr) {
		peer, credErr = credentials(int(fd))
	})
	if err := errors.Join(err, credErr); err != nil {
		return Peer{}, fmt.Errorf("peer credentials: %w", err)
	}
	return peer, nil
}

func credentials(fd int) (Peer, error) {
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return Peer{}, fmt.Errorf("SO_PEERCRED: %w", err)
	}
	groups, err := peerGroups(fd)
	if err != nil {
		return Peer{}, fmt.Errorf("SO_PEERGROUPS: %w", err)
	}
	return Peer{UID: cred.Uid, GID: cred.Gid, PID: cred.Pid, Groups: groups}, nil
}

// peerGroups reads SO_PEERGROUPS, which the kernel recorded together with
// SO_PEERCRED. /proc/PID/status would be a race: the process may have gone and
// its pid be another's. The kernel answers ERANGE with the size that it needs.
func peerGroups(fd int) ([]uint32, error) {
	groups := make([]uint32, 64)
	for {
		size := uint32(len(groups)) * uint32(unsafe.Sizeof(groups[0]))
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
		runtime.KeepAlive(groups)
		count := int(size / uint32(unsafe.Sizeof(groups[0])))
		switch {
		case errno == 0:
			return groups[:count], nil
		case errno == unix.ERANGE && count > len(groups):
			groups = make([]uint32, count)
		default:
			return nil, errno
		}
	}
}
