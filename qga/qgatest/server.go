package qgatest

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"
)

// Filesystem is one that the guest has mounted.
type Filesystem struct {
	Name       string `json:"name"`
	Mountpoint string `json:"mountpoint"`
	Type       string `json:"type"`
}

// Event is a command that the guest agent began to serve.
type Event struct {
	Command string
	At      time.Time
}

// Server is a guest with its agent, behind one socket.
type Server struct {
	listener *net.UnixListener
	path     string
	stopped  chan struct{}
	stop     sync.Once
	work     sync.WaitGroup

	mu          sync.Mutex
	changed     chan struct{} // closed and replaced at each change of what follows
	conn        net.Conn      // the client being served
	queue       []input
	events      []Event
	frozen      int // file systems; 0 when thawed
	filesystems []Filesystem
	once        map[string][]Behaviour
	always      map[string]Behaviour
}

// New starts a guest with two ext4 file systems, which ends with the test.
func New(t testing.TB) *Server {
	t.Helper()
	dir, err := os.MkdirTemp("", "qga") // short enough for a socket's address
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "qga.sock")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{
		listener: listener,
		path:     path,
		stopped:  make(chan struct{}),
		changed:  make(chan struct{}),
		once:     map[string][]Behaviour{},
		always:   map[string]Behaviour{},
		filesystems: []Filesystem{
			{Name: "vda", Mountpoint: "/", Type: "ext4"},
			{Name: "vdb", Mountpoint: "/data", Type: "ext4"},
		},
	}
	s.work.Go(s.accept)
	s.work.Go(s.serve)
	t.Cleanup(s.Stop)
	return s
}

// Path returns the path of the socket.
func (s *Server) Path() string { return s.path }

// Stop ends the guest and its QEMU: the connection breaks, and the socket is
// gone.
func (s *Server) Stop() {
	s.stop.Do(func() {
		close(s.stopped)
		_ = s.listener.Close()
		s.HangUp()
	})
	s.work.Wait()
}

// HangUp breaks the connection to the client that is being served, as QEMU does
// when its socket is reset. The guest goes on.
func (s *Server) HangUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn != nil {
		_ = s.conn.Close()
	}
}

// SetFilesystems replaces what the guest has mounted.
func (s *Server) SetFilesystems(list ...Filesystem) {
	s.update(func() { s.filesystems = list })
}

// SetFrozen makes the guest frozen or thawed without being asked by the client.
func (s *Server) SetFrozen(frozen bool) {
	s.update(func() {
		s.frozen = 0
		if frozen {
			s.frozen = len(s.filesystems)
		}
	})
}

// Once gives the next runs of a command these behaviours, one each.
func (s *Server) Once(command string, behaviours ...Behaviour) {
	s.update(func() { s.once[command] = append(s.once[command], behaviours...) })
}

// Always gives all runs of a command this behaviour, after those of Once.
func (s *Server) Always(command string, b Behaviour) {
	s.update(func() { s.always[command] = b })
}

// Frozen tells whether the guest is frozen.
func (s *Server) Frozen() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.frozen > 0
}

// Events returns the commands that were begun so far.
func (s *Server) Events() []Event {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.events)
}

// Count returns how many runs of a command were begun.
func (s *Server) Count(command string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.count(command)
}

func (s *Server) count(command string) int {
	n := 0
	for _, e := range s.events {
		if e.Command == command {
			n++
		}
	}
	return n
}

// Await waits until n runs of a command were begun.
func (s *Server) Await(ctx context.Context, command string, n int) error {
	return s.await(ctx, fmt.Sprintf("%d of %s", n, command), func() bool { return s.count(command) >= n })
}

// AwaitFrozen waits until the guest is frozen, or is not.
func (s *Server) AwaitFrozen(ctx context.Context, frozen bool) error {
	return s.await(ctx, fmt.Sprintf("frozen %t", frozen), func() bool { return s.frozen > 0 == frozen })
}

func (s *Server) await(ctx context.Context, what string, reached func() bool) error {
	for {
		s.mu.Lock()
		ok, changed := reached(), s.changed
		s.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", what, context.Cause(ctx))
		}
	}
}

func (s *Server) update(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
	close(s.changed)
	s.changed = make(chan struct{})
}
