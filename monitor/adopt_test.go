package monitor_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
	"github.com/vmsnap/vmsnap/monitor/monitortest"
)

// stranger uses a monitor without a session, and leaves it as a process does
// that is killed at the worst moment.
type stranger struct {
	t    *testing.T
	conn *net.UnixConn
}

// meet connects and negotiates.
func meet(t *testing.T, path string) *stranger {
	t.Helper()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	s := &stranger{t, conn}
	s.readUntil("QMP")
	s.write(`{"execute":"qmp_capabilities"}` + "\n")
	s.readUntil("return")
	return s
}

func (s *stranger) write(text string) {
	s.t.Helper()
	if _, err := io.WriteString(s.conn, text); err != nil {
		s.t.Fatal(err)
	}
}

// readUntil reads byte by byte until it has read the word.
func (s *stranger) readUntil(word string) {
	s.t.Helper()
	var seen []byte
	for b := make([]byte, 1); !strings.HasSuffix(string(seen), word); {
		if _, err := s.conn.Read(b); err != nil {
			s.t.Fatalf("%v after %q", err, seen)
		}
		seen = append(seen, b[0])
	}
}

// die closes the connection and returns a duplicate that lives on.
func (s *stranger) die() *os.File {
	s.t.Helper()
	f, err := s.conn.File()
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = f.Close() })
	if err := s.conn.Close(); err != nil {
		s.t.Fatal(err)
	}
	return f
}

func adopt(t *testing.T, f *os.File) *monitor.Session {
	t.Helper()
	s, err := monitor.Adopt(t.Context(), f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// What a process may leave on the connection when it dies.
var left = map[string]func(s *stranger){
	"nothing":      func(*stranger) {},
	"unread reply": func(s *stranger) { s.write(`{"execute":"query-commands","id":1}` + "\n") },
	"half a reply": func(s *stranger) {
		s.write(`{"execute":"query-commands","id":1}` + "\n")
		s.readUntil(`"name": "que`)
	},
	"a reply without its newline": func(s *stranger) {
		s.write(`{"execute":"query-commands","id":"last"}` + "\n")
		s.readUntil(`last`)
		s.readUntil(`}`)
	},
	"half a command":           func(s *stranger) { s.write(`{"execute":"stop","arguments":{"a`) },
	"a command without an end": func(s *stranger) { s.write(`{"execute":"stop"`) },
	"both halves": func(s *stranger) {
		s.write(`{"execute":"query-commands","id":1}` + "\n" + `{"execute":"st`)
		s.readUntil(`"name": "qu`)
	},
}

func TestAdopt(t *testing.T) {
	for _, split := range []bool{false, true} {
		for name, leave := range left {
			t.Run(name, func(t *testing.T) {
				checkLeaks(t)
				var opts []monitortest.Option
				if split {
					opts = append(opts, monitortest.WithSplitWrites())
				}
				srv := monitortest.NewServer(t, opts...)
				srv.Handle("query-echo", echo)
				srv.Handle("query-commands", func(r monitortest.Request) monitortest.Reply {
					return monitortest.Raw([]byte(`{"return": [{"name": "query-x"}, {"name": "query-y"}], "id": ` + string(r.ID) + "}\r\n"))
				})
				other := meet(t, srv.Path())
				leave(other)
				s := adopt(t, other.die())
				if v := s.Version().QEMU; v.Major != 10 {
					t.Errorf("version %+v", v)
				}
				for n := range 3 {
					wantEcho(t, s, n)
				}
				for _, c := range srv.Commands() {
					if c == "stop" {
						t.Error("half a command was executed")
					}
				}
			})
		}
	}
}

func TestAdoptFails(t *testing.T) {
	hangUp := func(monitortest.Request) monitortest.Reply { return monitortest.HangUp() }
	tests := map[string]struct {
		answer  monitortest.Handler
		is, not error
	}{
		"hung":     {monitortest.Hang, monitor.ErrUnresponsive, monitor.ErrGone},
		"hangs up": {hangUp, monitor.ErrGone, monitor.ErrUnresponsive},
		"too large": {func(monitortest.Request) monitortest.Reply { return monitortest.Huge(100_000) },
			monitor.ErrTooLarge, monitor.ErrGone},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			checkLeaks(t)
			srv := monitortest.NewServer(t)
			srv.Handle("query-version", test.answer)
			_, err := monitor.Adopt(t.Context(), meet(t, srv.Path()).die(),
				monitor.WithGreetingDeadline(soon), monitor.WithReplyLimit(50_000))
			wantError(t, err, []error{test.is}, []error{test.not})
		})
	}
	t.Run("shut down", func(t *testing.T) {
		checkLeaks(t)
		f := meet(t, monitortest.NewServer(t).Path()).die()
		if err := unix.Shutdown(int(f.Fd()), unix.SHUT_RDWR); err != nil {
			t.Fatal(err)
		}
		_, err := monitor.Adopt(t.Context(), f)
		wantError(t, err, []error{monitor.ErrGone}, nil)
	})
	t.Run("no socket", func(t *testing.T) {
		checkLeaks(t)
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Close() }()
		if _, err := monitor.Adopt(t.Context(), f); err == nil {
			t.Error("a session of /dev/null")
		}
	})
}

// A process can be given the duplicate without the session noticing: its reads
// would block a thread, and know no deadline, were the connection to become
// blocking.
func TestFileLeavesTheConnectionAlone(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	srv.Handle("query-echo", echo)
	s := dial(t, srv.Path())
	f, err := s.File()
	if err != nil {
		t.Fatal(err)
	}
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err != nil || flags&unix.O_NONBLOCK == 0 {
		t.Errorf("flags %#x, error %v: the connection blocks", flags, err)
	}
	wantEcho(t, s, 1)
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	wantEcho(t, s, 2)
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	_, err = s.File()
	wantError(t, err, []error{monitor.ErrClosed}, nil)
}

func TestHandOver(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	srv.Handle("query-echo", echo)
	never := make(chan struct{})
	srv.Handle("stop", func(monitortest.Request) monitortest.Reply { return monitortest.Return(nil).After(never) })
	s := dial(t, srv.Path())
	f, err := s.File()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	stopped := make(chan error, 1)
	go func() { stopped <- s.Stop(t.Context()) }()
	srv.Await("stop")
	s.HandOver()
	wantError(t, <-stopped, []error{monitor.ErrGone, monitor.ErrOutcomeUnknown}, nil)
	wantError(t, s.Err(), []error{monitor.ErrGone}, []error{monitor.ErrClosed})
	wantEcho(t, adopt(t, f), 7)
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// A session whose connection another one shuts down is told so, even if it was
// stopped meanwhile.
func TestShutDownElsewhere(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	s := dial(t, srv.Path())
	f, err := s.File()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if err := unix.Shutdown(int(f.Fd()), unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, s)
	wantError(t, s.Err(), []error{monitor.ErrGone}, nil)
}

func TestQEMUAdopt(t *testing.T) {
	forEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		for _, form := range []string{"-qmp", "-qmp-pretty"} {
			for name, leave := range left {
				t.Run(strings.ReplaceAll(form+" "+name, " ", "_"), func(t *testing.T) {
					checkLeaks(t)
					socket := shortDir(t) + "/q"
					launch(t, q, form, "unix:"+socket+",server=on,wait=off")
					other := meet(t, socket)
					leave(other)
					s := adopt(t, other.die())
					ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
					defer cancel()
					if st, err := s.QueryStatus(ctx); err != nil || st.Status != monitor.RunStatePrelaunch {
						t.Errorf("%+v, %v", st, err)
					}
					if err := s.Cont(ctx); err != nil {
						t.Error(err)
					}
					if st, err := s.QueryStatus(ctx); err != nil || !st.Running {
						t.Errorf("%+v, %v", st, err)
					}
					var refused *monitor.CommandError
					if err := s.Execute(ctx, "no-such-command", nil, nil); !errors.As(err, &refused) {
						t.Errorf("refusal: %v", err)
					}
				})
			}
		}
	})
}

// shortDir is a directory whose path leaves room in a socket's address.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "qmp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}
