package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/systemd"
)

// openSocket returns the API's socket: the one that systemd passes, or else one
// of our own.
func openSocket(c *config, log hclog.Logger) (net.Listener, error) {
	l, err := systemd.Listener()
	if err != nil {
		return nil, err
	}
	if l == nil {
		return listen(*c)
	}
	if path := l.Addr().String(); path != c.Socket {
		log.Warn("the API is served on the socket that systemd passes, not on the one that is set", "socket", path, "set", c.Socket)
		c.Socket = path
	}
	if c.SocketGroup != "" {
		log.Warn("who may connect is up to the socket unit (SocketGroup=), not to socket-group")
	}
	return l, nil
}

// listen makes the API's socket. One that an earlier run left behind is
// replaced: the state directory's lock, which is held by now, says that no
// other daemon serves it.
func listen(c config) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(c.Socket), 0o755); err != nil {
		return nil, fmt.Errorf("API socket: %w", err)
	}
	if fi, err := os.Lstat(c.Socket); err == nil {
		if fi.Mode()&os.ModeSocket == 0 {
			return nil, fmt.Errorf("API socket: %s exists and is not a socket", c.Socket)
		}
		if err := os.Remove(c.Socket); err != nil {
			return nil, fmt.Errorf("API socket: %w", err)
		}
	}
	mask := syscall.Umask(0o177)
	l, err := net.Listen("unix", c.Socket)
	syscall.Umask(mask)
	if err != nil {
		return nil, fmt.Errorf("API socket: %w", err)
	}
	if c.SocketGroup == "" {
		return l, nil
	}
	if err := openTo(c.Socket, c.SocketGroup); err != nil {
		return nil, errors.Join(fmt.Errorf("API socket: %w", err), l.Close())
	}
	return l, nil
}

// openTo lets a group connect.
func openTo(socket, group string) error {
	g, err := user.LookupGroup(group)
	if err != nil {
		return err
	}
	gid, err := strconv.Atoi(g.Gid)
	if err != nil {
		return err
	}
	return errors.Join(os.Chown(socket, -1, gid), os.Chmod(socket, 0o660))
}
