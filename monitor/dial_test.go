package monitor_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/monitor"
	"github.com/vmsnap/vmsnap/monitor/monitortest"
	"golang.org/x/sys/unix"
)

// Deadlines that are meant to pass.
const (
	soon  = 50 * time.Millisecond
	later = time.Second // with something done before, on a loaded machine
)

// dial connects to the server, for the length of the test.
func dial(t testing.TB, path string, opts ...monitor.Option) *monitor.Session {
	t.Helper()
	s, err := monitor.Dial(t.Context(), path, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func TestDialNegotiates(t *testing.T) {
	for _, v := range []monitortest.Version{monitortest.QEMU72, monitortest.QEMU100} {
		t.Run(fmt.Sprint(v.Major), func(t *testing.T) {
			checkLeaks(t)
			srv := monitortest.NewServer(t, monitortest.WithVersion(v))
			s := dial(t, srv.Path())
			got := s.Version()
			if got.QEMU.Major != v.Major || got.QEMU.Minor != v.Minor || got.QEMU.Micro != v.Micro || got.Package != v.Package {
				t.Errorf("version %+v, want %+v", got, v)
			}
			if !s.AtLeast(v.Major, v.Minor) || !s.AtLeast(v.Major-1, 99) || s.AtLeast(v.Major, v.Minor+1) || s.AtLeast(v.Major+1, 0) {
				t.Errorf("AtLeast disagrees with %v", got)
			}
			asked, err := s.QueryVersion(t.Context())
			if err != nil || asked != got {
				t.Errorf("query-version: %v, %v", asked, err)
			}
			if c := srv.Commands(); len(c) != 2 || c[0] != "qmp_capabilities" || c[1] != "query-version" {
				t.Errorf("commands: %v", c)
			}
		})
	}
}

func TestDialFails(t *testing.T) {
	within := func(d time.Duration) []monitor.Option { return []monitor.Option{monitor.WithGreetingDeadline(d)} }
	cut := monitortest.WithGreeting([]byte(`{"QMP": {"version"`))
	tests := map[string]struct {
		opts   []monitortest.Option
		script func(*monitortest.Server)
		dial   []monitor.Option
		is     []error
		not    []error
		as     any
	}{
		"no greeting": {
			opts: []monitortest.Option{monitortest.WithoutGreeting()},
			dial: within(soon),
			is:   []error{monitor.ErrBusy, context.DeadlineExceeded},
			not:  []error{monitor.ErrGone, monitor.ErrUnresponsive},
		},
		"half a greeting": {
			opts: []monitortest.Option{cut},
			dial: within(soon),
			is:   []error{monitor.ErrBusy, context.DeadlineExceeded},
		},
		"half a greeting, then gone": {
			opts:   []monitortest.Option{cut},
			script: func(srv *monitortest.Server) { go func() { srv.AwaitClient(1); srv.HangUp() }() },
			is:     []error{monitor.ErrGone},
			not:    []error{monitor.ErrBusy},
		},
		"garbage": {
			opts: []monitortest.Option{monitortest.WithGreeting([]byte("SSH-2.0-OpenSSH_9.2p1\r\n"))},
			as:   new(*monitor.ProtocolError),
		},
		"another protocol's object": {
			opts: []monitortest.Option{monitortest.WithGreeting([]byte(`{"return": {}}`))},
			as:   new(*monitor.ProtocolError),
		},
		"a version that is none": {
			opts: []monitortest.Option{monitortest.WithGreeting([]byte(`{"QMP": {"version": 7}}`))},
			as:   new(*monitor.ProtocolError),
		},
		"endless greeting": {
			opts: []monitortest.Option{monitortest.WithGreeting([]byte(`{"QMP": "` + strings.Repeat("x", 100<<10)))},
			dial: []monitor.Option{monitor.WithReplyLimit(64 << 10)},
			is:   []error{monitor.ErrTooLarge},
		},
		"negotiation hangs": {
			script: func(srv *monitortest.Server) { srv.Handle("qmp_capabilities", monitortest.Hang) },
			dial:   within(later),
			is:     []error{monitor.ErrUnresponsive, context.DeadlineExceeded},
			not:    []error{monitor.ErrBusy, monitor.ErrOutcomeUnknown},
		},
		"negotiation is refused": {
			script: func(srv *monitortest.Server) {
				srv.Handle("qmp_capabilities", func(monitortest.Request) monitortest.Reply {
					return monitortest.Fail("CommandNotFound", "no")
				})
			},
			as: new(*monitor.CommandError),
		},
		"gone in negotiation": {
			script: func(srv *monitortest.Server) {
				srv.Handle("qmp_capabilities", func(monitortest.Request) monitortest.Reply { return monitortest.HangUp() })
			},
			is: []error{monitor.ErrGone},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			checkLeaks(t)
			srv := monitortest.NewServer(t, tt.opts...)
			if tt.script != nil {
				tt.script(srv)
			}
			opts := append(within(20*time.Second), tt.dial...)
			s, err := monitor.Dial(t.Context(), srv.Path(), opts...)
			if err == nil {
				_ = s.Close()
				t.Fatal("connected")
			}
			wantError(t, err, tt.is, tt.not)
			if tt.as != nil && !errors.As(err, tt.as) {
				t.Errorf("error %v (%T), want %T", err, err, tt.as)
			}
		})
	}
}

// wantError checks what errors.Is finds in an error.
func wantError(t *testing.T, err error, is, not []error) {
	t.Helper()
	for _, want := range is {
		if !errors.Is(err, want) {
			t.Errorf("error %q is not %q", err, want)
		}
	}
	for _, bad := range not {
		if errors.Is(err, bad) {
			t.Errorf("error %q is %q", err, bad)
		}
	}
}

func TestDialCancelled(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t, monitortest.WithoutGreeting())
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		srv.AwaitClient(1)
		cancel()
	}()
	_, err := monitor.Dial(ctx, srv.Path())
	wantError(t, err, []error{context.Canceled}, []error{monitor.ErrBusy})
	_, err = monitor.Dial(ctx, srv.Path())
	wantError(t, err, []error{context.Canceled}, []error{monitor.ErrBusy})
}

func TestDialWithAFullBacklog(t *testing.T) {
	checkLeaks(t)
	path := filepath.Join(t.TempDir(), "qmp")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 0); err != nil { // room for one
		t.Fatal(err)
	}
	for range 2 { // waits for the greeting, waits for room
		_, err := monitor.Dial(t.Context(), path, monitor.WithGreetingDeadline(soon))
		wantError(t, err, []error{monitor.ErrBusy, context.DeadlineExceeded}, nil)
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(soon, cancel)
	_, err = monitor.Dial(ctx, path)
	wantError(t, err, []error{context.Canceled}, []error{monitor.ErrBusy})
}

func TestSecondClientIsBusyUntilTheFirstLeaves(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	first := dial(t, srv.Path())
	_, err := monitor.Dial(t.Context(), srv.Path(), monitor.WithGreetingDeadline(soon))
	wantError(t, err, []error{monitor.ErrBusy}, nil)
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := dial(t, srv.Path()).QueryVersion(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestDialWhereNobodyListens(t *testing.T) {
	checkLeaks(t)
	dir := t.TempDir()
	stale := filepath.Join(dir, "stale.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	_ = l.Close()
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]struct{ is, not []error }{
		stale:                      {[]error{monitor.ErrGone, unix.ECONNREFUSED}, nil},
		filepath.Join(dir, "none"): {[]error{monitor.ErrGone, fs.ErrNotExist}, nil},
		plain:                      {[]error{unix.ENOTSOCK}, []error{monitor.ErrGone}},
		dir:                        {[]error{unix.ENOTSOCK}, []error{monitor.ErrGone}},
	} {
		_, err := monitor.Dial(t.Context(), path)
		wantError(t, err, want.is, want.not)
		if err != nil && !strings.Contains(err.Error(), path) {
			t.Errorf("error %q does not name %s", err, path)
		}
	}
}

func TestDialByALongPath(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 120), strings.Repeat("e", 120))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	long := filepath.Join(dir, "qmp.sock")
	if err := os.Symlink(srv.Path(), long); err != nil {
		t.Fatal(err)
	}
	dial(t, long)
}

// TestDialBelowAnotherRoot connects to the sockets of a thread that lives in a
// root of its own, where symbolic links mean something else than here.
func TestDialBelowAnotherRoot(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	outside := monitortest.NewServer(t)
	root := t.TempDir()
	inside := filepath.Join(root, "srv")
	if err := os.Mkdir(inside, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(srv.Path(), filepath.Join(inside, "qmp.sock")); err != nil {
		t.Fatal(err)
	}
	for link, to := range map[string]string{"run": "/srv", "escape.sock": outside.Path()} {
		if err := os.Symlink(to, filepath.Join(root, link)); err != nil {
			t.Fatal(err)
		}
	}
	below := fmt.Sprintf("/proc/%d/root/", chrooted(t, root))

	dial(t, below+"srv/qmp.sock")
	_, err := monitor.Dial(t.Context(), below+"escape.sock")
	wantError(t, err, []error{monitor.ErrGone, fs.ErrNotExist}, nil)
	if c := outside.Commands(); len(c) > 0 {
		t.Errorf("the socket outside got %v", c)
	}
	srv.HangUp()
	dial(t, below+"run/qmp.sock")
}

// chrooted returns the id of a thread with this root, which ends with the test.
func chrooted(t *testing.T, root string) int {
	t.Helper()
	tid, end := make(chan int), make(chan struct{})
	failed := make(chan error, 1)
	t.Cleanup(func() { close(end) })
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			failed <- fmt.Errorf("unshare: %w", err)
			return
		}
		if err := unix.Chroot(root); err != nil {
			failed <- fmt.Errorf("chroot: %w", err)
			return
		}
		tid <- unix.Gettid()
		<-end
	}()
	select {
	case id := <-tid:
		return id
	case err := <-failed:
		t.Fatal(err)
		return 0
	}
}
