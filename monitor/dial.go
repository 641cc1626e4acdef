package monitor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/digitalocean/go-qemu/qmp"
	"golang.org/x/sys/unix"
)

// An Option changes how Dial sets up a session.
type Option func(*options)

type options struct {
	greeting   time.Duration
	replyLimit int
}

// WithGreetingDeadline bounds connecting, greeting and negotiation together.
// The default is DefaultGreetingDeadline.
func WithGreetingDeadline(d time.Duration) Option {
	return func(o *options) { o.greeting = d }
}

// WithReplyLimit bounds one message of QEMU, in bytes. The default is
// DefaultReplyLimit.
func WithReplyLimit(n int) Option {
	return func(o *options) { o.replyLimit = n }
}

// Dial connects to the monitor at a Unix socket, awaits the greeting and
// negotiates capabilities (none are enabled), all within the context and the
// greeting deadline.
//
// The path may be longer than a socket address holds. In a path below
// /proc/PID/root, symbolic links are resolved as that process would, and lead
// nowhere outside its root.
//
// It returns ErrBusy if no greeting comes, ErrGone if nothing listens,
// ErrUnresponsive if QEMU greets and then does not answer.
func Dial(ctx context.Context, path string, opts ...Option) (*Session, error) {
	o := options{greeting: DefaultGreetingDeadline, replyLimit: DefaultReplyLimit}
	for _, opt := range opts {
		opt(&o)
	}
	ctx, cancel := context.WithTimeout(ctx, o.greeting)
	defer cancel()

	conn, err := connect(ctx, path)
	if err != nil {
		return nil, &OpError{Op: "connect " + path, Err: err}
	}
	dec := newDecoder(conn, o.replyLimit)
	version, err := awaitGreeting(ctx, conn, dec)
	if err != nil {
		_ = conn.Close()
		return nil, &OpError{Op: "greeting " + path, Err: err}
	}
	s := newSession(conn, dec, version)
	if err := s.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		_ = s.Close()
		return nil, err
	}
	return s, nil
}

// procRoot matches paths that lead through another process's root.
var procRoot = regexp.MustCompile(`^(/proc/[0-9]+/root)/(.+)$`)

// connect opens the socket file and connects through its descriptor: that
// leaves no limit on the length of the path, and what was resolved is what is
// connected to.
func connect(ctx context.Context, path string) (*net.UnixConn, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	file, err := openSocket(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, caused(ErrGone, err)
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()

	address := &net.UnixAddr{Net: "unix", Name: fmt.Sprintf("/proc/self/fd/%d", file.Fd())}
	for {
		conn, err := net.DialUnix("unix", nil, address) // never blocks
		switch {
		case err == nil:
			return conn, nil
		case errors.Is(err, unix.ECONNREFUSED):
			return nil, caused(ErrGone, unix.ECONNREFUSED)
		case !errors.Is(err, unix.EAGAIN):
			return nil, err
		}
		// Others who wait, or gave up waiting, fill the backlog, which QEMU
		// leaves short. No event tells when there is room (unix(7)).
		select {
		case <-ctx.Done():
			return nil, noGreeting(ctx)
		case <-time.After(backlogPause):
		}
	}
}

// noGreeting is the error of a context that ended before the greeting.
func noGreeting(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return caused(ErrBusy, context.DeadlineExceeded)
	}
	return context.Cause(ctx)
}

// openSocket returns an O_PATH handle of the socket file.
func openSocket(path string) (*os.File, error) {
	file, err := openPath(path)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		return nil, errors.Join(&fs.PathError{Op: "stat", Path: path, Err: err}, file.Close())
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return nil, errors.Join(&fs.PathError{Op: "connect", Path: path, Err: unix.ENOTSOCK}, file.Close())
	}
	return file, nil
}

func openPath(path string) (*os.File, error) {
	const flags = unix.O_PATH | unix.O_CLOEXEC
	m := procRoot.FindStringSubmatch(path)
	if m == nil {
		return os.OpenFile(path, flags, 0)
	}
	name := strings.TrimLeft(m[2], "/")
	root, err := unix.Open(m[1], flags|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: m[1], Err: err}
	}
	defer func() { _ = unix.Close(root) }()
	fd, err := unix.Openat2(root, name, &unix.OpenHow{Flags: flags, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
	if errors.Is(err, unix.ENOSYS) {
		return openBeneath(m[1], name)
	}
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
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

// awaitGreeting reads the first message of a connection.
func awaitGreeting(ctx context.Context, conn *net.UnixConn, dec *decoder) (qmp.Version, error) {
	var version qmp.Version
	release := interruptible(ctx, conn.SetReadDeadline)
	m, err := dec.nextMessage()
	release()
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return version, noGreeting(ctx)
	case err != nil:
		return version, readCause(err)
	case m.QMP == nil:
		return version, &ProtocolError{Reason: "no greeting"}
	}
	if err := json.Unmarshal(m.QMP.Version, &version); err != nil {
		return version, &ProtocolError{Reason: "greeting: " + err.Error(), Excerpt: excerpt(m.QMP.Version)}
	}
	return version, nil
}

// interruptible makes the end of the context interrupt a read or write, whose
// deadline set changes. The function that it returns ends that, and clears the
// deadline.
func interruptible(ctx context.Context, set func(time.Time) error) (release func()) {
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		_ = set(time.Unix(1, 0)) // fails only on a closed connection
	})
	return func() {
		if !stop() {
			<-done
		}
		_ = set(time.Time{})
	}
}
