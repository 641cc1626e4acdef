package monitor

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"github.com/digitalocean/go-qemu/qmp"
	"golang.org/x/sys/unix"
)

// errHandedOver is why a session ended whose connection lives on.
var errHandedOver = errors.New("the connection was handed over")

// File returns a duplicate of the connection, for another process that goes on
// with it by Adopt when this one cannot. As long as the session lives nobody
// may read from the duplicate, write to it or change its flags. QEMU serves no
// other client before all duplicates are closed or one is shut down.
//
// It fails with the reason of the session's end if it has ended.
func (s *Session) File() (*os.File, error) {
	raw, err := s.conn.SyscallConn()
	if err != nil {
		return nil, &OpError{Op: "duplicate connection", Err: err}
	}
	var fd int
	var dupErr error
	// Not UnixConn.File: handing its result to a process would make the
	// connection blocking, for the session too.
	err = raw.Control(func(conn uintptr) {
		fd, dupErr = unix.FcntlInt(conn, unix.F_DUPFD_CLOEXEC, 0)
	})
	if ended := s.Err(); err != nil && ended != nil {
		err = ended
	}
	if err := errors.Join(err, dupErr); err != nil {
		return nil, &OpError{Op: "duplicate connection", Err: err}
	}
	return os.NewFile(uintptr(fd), "qmp"), nil
}

// HandOver ends the session with ErrGone and leaves the connection to whoever
// has it by File. When it returns nothing reads from it here any more.
func (s *Session) HandOver() {
	s.end(caused(ErrGone, errHandedOver))
	<-s.reader
}

// Adopt makes a session of a connection that another process has used, by a
// duplicate of it from File, which stays the caller's. It gets in step whatever
// the other process has left half read or half written; half a command is
// dropped. Whoever still reads from the connection may take replies away from
// the session, which then times out.
//
// It returns ErrUnresponsive if there is no answer within the context and the
// greeting deadline, ErrGone if the connection has ended.
func Adopt(ctx context.Context, file *os.File, opts ...Option) (*Session, error) {
	o := options{greeting: DefaultGreetingDeadline, replyLimit: DefaultReplyLimit}
	for _, opt := range opts {
		opt(&o)
	}
	ctx, cancel := context.WithTimeout(ctx, o.greeting)
	defer cancel()
	s, err := adopt(ctx, file, o.replyLimit)
	if err != nil {
		return nil, &OpError{Op: "adopt connection", Err: err}
	}
	return s, nil
}

func adopt(ctx context.Context, file *os.File, limit int) (*Session, error) {
	anyConn, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	conn, ok := anyConn.(*net.UnixConn)
	if !ok {
		return nil, errors.Join(&ProtocolError{Reason: "not a Unix socket"}, anyConn.Close())
	}
	release := interruptible(ctx, conn.SetDeadline)
	r := bufio.NewReader(conn)
	version, err := getInStep(conn, r, limit)
	release()
	if err != nil {
		_ = conn.Close()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil, caused(ErrUnresponsive, context.Cause(ctx))
		}
		return nil, err
	}
	return newSession(conn, newDecoder(r, limit), version), nil
}

// getInStep asks a question and reads up to its answer.
func getInStep(w io.Writer, r *bufio.Reader, limit int) (version qmp.Version, err error) {
	var word [12]byte
	_, _ = rand.Read(word[:]) // never fails
	id := `"` + hex.EncodeToString(word[:]) + `"`
	// 0xFF makes QEMU's parser forget what it has of a command (QEMU,
	// docs/interop/qmp-spec, "Forcing the JSON parser into known-good state").
	if _, err := fmt.Fprintf(w, "\xff{\"execute\":\"query-version\",\"id\":%s}\n", id); err != nil {
		if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
			err = caused(ErrGone, err)
		}
		return version, err
	}
	m, err := findReply(r, id, limit)
	switch {
	case err != nil:
		return version, readCause(err)
	case m.Error != nil:
		return version, &CommandError{Command: "query-version", Class: m.Error.Class, Desc: m.Error.Desc}
	}
	if err := json.Unmarshal(m.Return, &version); err != nil {
		return version, &ProtocolError{Reason: "version: " + err.Error(), Excerpt: excerpt(m.Return)}
	}
	return version, nil
}

// findReply reads as far as the reply with this id in a stream that may begin
// in the middle of a message. QEMU ends every message with a newline and has
// none inside, or, under -qmp-pretty, indents every line but the first and the
// last of a message.
func findReply(r *bufio.Reader, id string, limit int) (*message, error) {
	var candidate []byte
	for {
		line, err := readLine(r, limit)
		if err != nil {
			return nil, err
		}
		switch {
		case line[0] == '{':
			candidate = line
		case candidate == nil:
			continue
		case len(candidate)+len(line) > limit:
			return nil, ErrTooLarge
		default:
			candidate = append(candidate, line...)
		}
		if line[0] != '{' && line[0] != '}' {
			continue // cannot be the last
		}
		m := new(message)
		if json.Unmarshal(candidate, m) == nil && string(m.ID) == id {
			return m, nil
		}
	}
}

// readLine reads a line with its end.
func readLine(r *bufio.Reader, limit int) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		switch {
		case len(line)+len(part) > limit:
			return nil, ErrTooLarge
		case err == nil && line == nil:
			return bytes.Clone(part), nil
		case err == nil:
			return append(line, part...), nil
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, err
		}
		line = append(line, part...)
	}
}
