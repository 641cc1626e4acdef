package monitor

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/digitalocean/go-qemu/qmp"
	"golang.org/x/sys/unix"
)

var _ qmp.Monitor = (*Session)(nil)

// A Session is one negotiated QMP connection. Make it with Dial; end it with
// Close.
type Session struct {
	conn    *net.UnixConn
	version qmp.Version
	writing chan struct{} // full while somebody writes

	writeWithin time.Duration

	idPrefix string // this session's word, in quotes to the left

	mu      sync.Mutex
	err     error // why the session ended; nil while it lives
	serial  uint64
	pending map[string]chan *message // by id as it stands in JSON; buffer of one

	subMu sync.Mutex
	subs  map[*Subscription]struct{} // nil after the end

	done   chan struct{} // closed when err is set
	reader chan struct{} // closed when the reader has returned
}

func newSession(conn *net.UnixConn, dec *decoder, version qmp.Version) *Session {
	var word [6]byte
	_, _ = rand.Read(word[:]) // never fails
	s := &Session{
		conn:        conn,
		version:     version,
		writing:     make(chan struct{}, 1),
		writeWithin: writeDeadline,
		idPrefix:    `"` + hex.EncodeToString(word[:]) + ".",
		pending:     make(map[string]chan *message),
		subs:        make(map[*Subscription]struct{}),
		done:        make(chan struct{}),
		reader:      make(chan struct{}),
	}
	go s.read(dec)
	return s
}

// Version returns QEMU's version as greeted.
func (s *Session) Version() qmp.Version { return s.version }

// AtLeast reports whether QEMU is of this version or a newer one.
func (s *Session) AtLeast(major, minor int) bool {
	q := s.version.QEMU
	return q.Major > major || q.Major == major && q.Minor >= minor
}

// Done returns a channel that is closed when the session has ended.
func (s *Session) Done() <-chan struct{} { return s.done }

// Err returns why the session ended, and nil while it has not: an error that
// wraps ErrGone, ErrClosed, ErrTooLarge or ErrUnresponsive (QEMU took part of
// a command and no more), or a *ProtocolError.
func (s *Session) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Close ends the session and everything that waits on it. It returns when the
// session has let go of all it held. It may be called more than once.
func (s *Session) Close() error {
	s.end(ErrClosed)
	<-s.reader
	return nil
}

// end ends the session for a reason, unless it has ended.
func (s *Session) end(reason error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return
	}
	s.err = reason
	_ = s.conn.Close() // nothing of it is waited for
	close(s.done)
}

// read hands on what QEMU sends until the session ends.
func (s *Session) read(dec *decoder) {
	defer close(s.reader)
	defer s.endSubscriptions()
	for {
		m, err := dec.nextMessage()
		if err != nil {
			s.end(readCause(err))
			return
		}
		switch {
		case m.Event != "":
			s.publish(m)
		case len(m.ID) > 0:
			s.deliver(m)
		}
		// Anything else is an error that names no command, such as QEMU's
		// answer to what a former client left unfinished.
	}
}

// readCause says what a failed read means for the session.
func readCause(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, unix.ECONNRESET) {
		return caused(ErrGone, err)
	}
	return err
}

// deliver hands a reply to the command that awaits it. A reply that none
// awaits came too late, or is a former client's.
func (s *Session) deliver(m *message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c, ok := s.pending[string(m.ID)]; ok {
		delete(s.pending, string(m.ID))
		c <- m
	}
}

// expect makes an id and the channel on which its reply will come.
func (s *Session) expect() (string, chan *message, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return "", nil, s.err
	}
	s.serial++
	id := s.idPrefix + strconv.FormatUint(s.serial, 10) + `"`
	c := make(chan *message, 1)
	s.pending[id] = c
	return id, c, nil
}

func (s *Session) abandon(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.pending, id)
}

// Execute runs a command and decodes what it returns into result, unless that
// is nil. Args are marshalled to the command's arguments object; nil means
// none. A context without a deadline gets the command's own.
func (s *Session) Execute(ctx context.Context, command string, args, result any) error {
	return s.ExecuteWithFile(ctx, command, args, result, nil)
}

// ExecuteWithFile is Execute with a file descriptor passed along (SCM_RIGHTS),
// which getfd and add-fd take. The file stays the caller's; QEMU has its own
// descriptor of the same open file.
func (s *Session) ExecuteWithFile(ctx context.Context, command string, args, result any, file *os.File) error {
	m, err := s.roundTrip(ctx, command, args, file)
	if err != nil {
		return err
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(m.Return, result); err != nil {
		return incomprehensible(command, err)
	}
	return nil
}
