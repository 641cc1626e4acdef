package monitor

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// request is a command as QMP has it.
type request struct {
	Execute   string          `json:"execute"`
	Arguments any             `json:"arguments,omitempty"`
	ID        json.RawMessage `json:"id"`
}

// roundTrip sends a command and awaits its reply, which has a return value.
func (s *Session) roundTrip(ctx context.Context, command string, args any, file *os.File) (*message, error) {
	lim := limitOf(command)
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, lim.after)
		defer cancel()
	}
	id, reply, err := s.expect()
	if err != nil {
		return nil, &OpError{Op: command, Err: err}
	}
	line, err := json.Marshal(request{Execute: command, Arguments: args, ID: json.RawMessage(id)})
	if err == nil {
		err = s.send(ctx, append(line, '\n'), file)
	}
	if err != nil {
		s.abandon(id)
		return nil, &OpError{Op: command, Err: err}
	}
	m, err := s.await(ctx, reply)
	if err != nil {
		s.abandon(id)
		return nil, unanswered(command, lim, err)
	}
	switch {
	case m.Error != nil:
		return nil, &CommandError{Command: command, Class: m.Error.Class, Desc: m.Error.Desc}
	case len(m.Return) == 0:
		return nil, incomprehensible(command, errors.New("reply is neither a return nor an error"))
	}
	return m, nil
}

// await waits for a reply. One that has come wins over any reason to give up.
func (s *Session) await(ctx context.Context, reply <-chan *message) (*message, error) {
	var err error
	select {
	case m := <-reply:
		return m, nil
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-s.done:
		err = s.Err()
	}
	select {
	case m := <-reply:
		return m, nil
	default:
		return nil, err
	}
}

// unanswered is the error of a command that was sent in full.
func unanswered(command string, lim limit, cause error) error {
	switch {
	case !lim.query:
		cause = caused(ErrOutcomeUnknown, cause)
	case errors.Is(cause, context.DeadlineExceeded):
		cause = caused(ErrUnresponsive, cause)
	}
	return &OpError{Op: command, Err: cause}
}

// incomprehensible is the error of a command whose reply makes no sense here.
// One with effects may well have had them.
func incomprehensible(command string, cause error) error {
	if !limitOf(command).query {
		cause = caused(ErrOutcomeUnknown, cause)
	}
	return &OpError{Op: command, Err: cause}
}

// send writes one command, in its turn. An error means that QEMU cannot have
// seen all of it. If QEMU took a part, the session ends, since whatever came
// next would be taken for the rest.
func (s *Session) send(ctx context.Context, line []byte, file *os.File) error {
	select {
	case s.writing <- struct{}{}:
		defer func() { <-s.writing }()
	case <-ctx.Done():
		return unsent(ctx, os.ErrDeadlineExceeded)
	case <-s.done:
		return s.Err()
	}
	if ctx.Err() != nil {
		return unsent(ctx, os.ErrDeadlineExceeded)
	}
	if err := s.conn.SetWriteDeadline(time.Now().Add(s.writeWithin)); err != nil {
		return s.Err() // fails on a closed connection only
	}
	release := interruptible(ctx, s.conn.SetWriteDeadline)
	n, err := write(s.conn, line, file)
	release()
	// The newline ends nothing: QEMU acts on the closing brace.
	if n >= len(line)-1 {
		return nil
	}
	if ended := s.Err(); ended != nil {
		return ended
	}
	err = unsent(ctx, err)
	if n > 0 {
		s.end(err)
	}
	return err
}

// unsent says why a command could not be written.
func unsent(ctx context.Context, err error) error {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded) && errors.Is(ctx.Err(), context.Canceled):
		return context.Cause(ctx)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return caused(ErrUnresponsive, context.DeadlineExceeded)
	case errors.Is(err, unix.EPIPE), errors.Is(err, unix.ECONNRESET):
		return caused(ErrGone, err)
	}
	return err
}

// write writes the line, with the file's descriptor on its first byte, and
// returns how much of it was taken.
func write(conn *net.UnixConn, line []byte, file *os.File) (int, error) {
	if file == nil {
		return conn.Write(line)
	}
	raw, err := file.SyscallConn()
	if err != nil {
		return 0, err
	}
	var n int
	var werr error
	// Inside Control the descriptor cannot be closed and its number reused.
	err = raw.Control(func(fd uintptr) {
		n, _, werr = conn.WriteMsgUnix(line, unix.UnixRights(int(fd)), nil)
	})
	if err := errors.Join(err, werr); err != nil {
		return n, err
	}
	// A message may be taken in part; the rest needs no descriptor.
	rest, err := conn.Write(line[n:])
	return n + rest, err
}

// Run implements qmp.Monitor: it executes a command given as JSON and returns
// the reply as JSON. The id is ours on the wire, and the caller's in the reply.
func (s *Session) Run(command []byte) ([]byte, error) {
	var c struct {
		Execute   string          `json:"execute"`
		Arguments json.RawMessage `json:"arguments"`
		ID        json.RawMessage `json:"id"`
	}
	if err := json.Unmarshal(command, &c); err != nil {
		return nil, &OpError{Op: "run", Err: err}
	}
	if c.Execute == "" {
		return nil, &OpError{Op: "run", Err: errors.New("no command to execute")}
	}
	var args any
	if len(c.Arguments) > 0 {
		args = c.Arguments
	}
	m, err := s.roundTrip(context.Background(), c.Execute, args, nil)
	if err != nil {
		return nil, err
	}
	return json.Marshal(struct {
		Return json.RawMessage `json:"return"`
		ID     json.RawMessage `json:"id,omitempty"`
	}{m.Return, c.ID})
}

// Connect implements qmp.Monitor. Dial has connected already; it returns why
// the session ended, if it has.
func (s *Session) Connect() error { return s.Err() }

// Disconnect implements qmp.Monitor. It is Close.
func (s *Session) Disconnect() error { return s.Close() }
