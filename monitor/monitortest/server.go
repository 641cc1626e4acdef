package monitortest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"
)

// awaitDeadline bounds Await and AwaitClient: long enough for a loaded machine,
// short enough to name what is missing before the test binary's own deadline.
const awaitDeadline = 20 * time.Second

// A Version is what a server greets with.
type Version struct {
	Major, Minor, Micro int
	Package             string
}

// Versions that are supported: the oldest and the newest.
var (
	QEMU72  = Version{7, 2, 22, "Debian 1:7.2+dfsg-7+deb12u18+b3"}
	QEMU100 = Version{10, 0, 2, "Debian 1:10.0.2+ds-2+deb13u1~bpo12+1"}
)

// MarshalJSON gives the version as query-version returns it.
func (v Version) MarshalJSON() ([]byte, error) {
	return json.Marshal(map[string]any{
		"qemu":    map[string]int{"major": v.Major, "minor": v.Minor, "micro": v.Micro},
		"package": v.Package,
	})
}

// An Option changes a server from its start.
type Option func(*Server)

// WithVersion greets as another QEMU. The default is QEMU100.
func WithVersion(v Version) Option { return func(s *Server) { s.version = v } }

// WithoutGreeting accepts clients and says nothing, like a stopped QEMU.
func WithoutGreeting() Option { return func(s *Server) { s.greeting = []byte{} } }

// WithGreeting greets with these bytes.
func WithGreeting(raw []byte) Option { return func(s *Server) { s.greeting = slices.Clone(raw) } }

// WithSplitWrites sends each byte by itself.
func WithSplitWrites() Option { return func(s *Server) { s.split = true } }

// A Server plays QEMU's side of one monitor socket.
type Server struct {
	t        testing.TB
	dir      string
	listener *net.UnixListener
	version  Version
	greeting []byte // nil for the version's own
	split    bool

	closing chan struct{}
	running sync.WaitGroup

	mu       sync.Mutex
	handlers map[string]Handler
	requests []Request
	awaited  map[string]int // requests returned by Await, by command
	clients  int            // accepted so far
	current  *client
	changed  chan struct{} // closed and replaced when anything above changes
}

// NewServer starts a server that ends with the test.
func NewServer(t testing.TB, opts ...Option) *Server {
	t.Helper()
	// A test's own directory can be too long for a socket address.
	dir, err := os.MkdirTemp("", "qmp")
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "qmp.sock"), Net: "unix"})
	if err != nil {
		t.Fatal(errors.Join(err, os.RemoveAll(dir)))
	}
	s := &Server{
		t: t, dir: dir, listener: listener, version: QEMU100,
		closing:  make(chan struct{}),
		handlers: make(map[string]Handler),
		awaited:  make(map[string]int),
		changed:  make(chan struct{}),
	}
	for _, opt := range opts {
		opt(s)
	}
	s.Handle("query-version", func(Request) Reply { return Return(s.version) })
	s.Handle("qmp_capabilities", func(Request) Reply { return Return(nil) })
	s.running.Go(s.accept)
	t.Cleanup(s.Close)
	return s
}

// Path returns the socket's path.
func (s *Server) Path() string { return s.listener.Addr().String() }

// Handle answers a command from now on.
func (s *Server) Handle(command string, h Handler) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.handlers[command] = h
}

// HandleReturn answers a command with the same value each time.
func (s *Server) HandleReturn(command string, value any) {
	s.Handle(command, func(Request) Reply { return Return(value) })
}

// Requests returns all commands received so far, qmp_capabilities included.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.requests)
}

// Commands returns the names of all commands received so far.
func (s *Server) Commands() []string {
	var names []string
	for _, r := range s.Requests() {
		names = append(names, r.Command)
	}
	return names
}

// Await returns the first command of this name that Await did not return yet,
// waiting for it if need be. It fails the test if none comes.
func (s *Server) Await(command string) Request {
	s.t.Helper()
	var found Request
	s.await("command "+command, func() bool {
		n := 0
		for _, r := range s.requests {
			if r.Command != command {
				continue
			}
			if n == s.awaited[command] {
				s.awaited[command]++
				found = r
				return true
			}
			n++
		}
		return false
	})
	return found
}

// AwaitClient waits until n clients have been accepted since the start.
func (s *Server) AwaitClient(n int) {
	s.t.Helper()
	s.await(fmt.Sprintf("client %d", n), func() bool { return s.clients >= n })
}

// await waits for a condition, which it evaluates under the lock.
func (s *Server) await(what string, met func() bool) {
	s.t.Helper()
	deadline := time.NewTimer(awaitDeadline)
	defer deadline.Stop()
	for {
		s.mu.Lock()
		ok, changed := met(), s.changed
		s.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-deadline.C:
			s.t.Fatalf("monitortest: %s did not come within %v; commands so far: %v", what, awaitDeadline, s.Commands())
		}
	}
}

// update changes the server's state and wakes those who await a change.
func (s *Server) update(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
	close(s.changed)
	s.changed = make(chan struct{})
}

// Emit sends an event to the client. Like QEMU it drops it if there is none,
// or none that has negotiated.
func (s *Server) Emit(name string, data any) {
	s.mu.Lock()
	c := s.current
	s.mu.Unlock()
	if c != nil && c.negotiated.Load() {
		c.write(eventLine(Event{name, data}))
	}
}

// Flood sends n events whose data is {"n": 0}, {"n": 1}, ….
func (s *Server) Flood(name string, n int) {
	for i := range n {
		s.Emit(name, map[string]int{"n": i})
	}
}

// Write sends bytes to the client as they are.
func (s *Server) Write(raw []byte) {
	s.mu.Lock()
	c := s.current
	s.mu.Unlock()
	if c != nil {
		c.write(raw)
	}
}

// HangUp closes the connection of the client that is served.
func (s *Server) HangUp() {
	s.mu.Lock()
	c := s.current
	s.mu.Unlock()
	if c != nil {
		c.leave()
	}
}

// Close ends the server and waits for all that it runs. The test's end calls
// it; it may be called more than once.
func (s *Server) Close() {
	s.mu.Lock()
	select {
	case <-s.closing:
	default:
		close(s.closing)
	}
	c := s.current
	s.mu.Unlock()
	if err := s.listener.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		s.t.Errorf("monitortest: %v", err)
	}
	if c != nil {
		c.leave()
	}
	s.running.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.requests {
		for _, f := range r.Files {
			_ = f.Close() // the test may have closed it
		}
	}
	if err := os.RemoveAll(s.dir); err != nil {
		s.t.Errorf("monitortest: %v", err)
	}
}

// accept serves one client after the other.
func (s *Server) accept() {
	for {
		conn, err := s.listener.AcceptUnix()
		if err != nil {
			return // closed
		}
		ctx, cancel := context.WithCancel(context.Background())
		c := &client{server: s, conn: conn, gone: ctx.Done(), cancel: cancel}
		s.update(func() {
			s.clients++
			s.current = c
		})
		select {
		case <-s.closing:
			c.leave()
		default:
		}
		c.serve()
		c.leave()
		s.update(func() { s.current = nil })
	}
}

func eventLine(e Event) []byte {
	now := time.Now()
	return line(struct {
		Timestamp map[string]int64 `json:"timestamp"`
		Event     string           `json:"event"`
		Data      any              `json:"data,omitempty"`
	}{
		map[string]int64{"seconds": now.Unix(), "microseconds": int64(now.Nanosecond() / 1000)},
		e.Name, e.Data,
	})
}
