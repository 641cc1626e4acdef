package qga

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"
)

// delimiter resets the guest agent's parser when sent, and comes before the
// answer to guest-sync-delimited. It is never part of UTF-8 text.
const delimiter = 0xFF

// Client is one connection to a guest agent. It is made by Dial or New.
type Client struct {
	conn   net.Conn
	limits Limits
	turn   chan struct{} // holds a token while no command runs
	r      *bufio.Reader
	inStep bool // the next line will be the answer to the next command
}

// New returns a client on a connection, which it owns from then on.
func New(conn net.Conn, lim Limits) *Client {
	c := &Client{
		conn:   conn,
		limits: lim.withDefaults(),
		turn:   make(chan struct{}, 1),
		r:      bufio.NewReaderSize(conn, 16<<10),
	}
	c.turn <- struct{}{}
	return c
}

// Close ends the connection and any command that waits on it, which fails with
// ErrGone.
func (c *Client) Close() error { return c.conn.Close() }

// Sync brings the client in step with the guest: it throws away all that the
// guest has sent and will send before its answer to a fresh, random id. With a
// context that has a deadline it waits that long, for a guest agent that is
// busy answers when it is done.
func (c *Client) Sync(ctx context.Context) error {
	ctx, cancel := bounded(ctx, cmdSync)
	defer cancel()
	if err := c.take(ctx); err != nil {
		return &OpError{Command: cmdSync, Err: err}
	}
	defer c.release()
	return c.sync(ctx)
}

// command runs one command and hands what the guest returned to decode.
func (c *Client) command(ctx context.Context, name string, args any, decode func(json.RawMessage) error) error {
	ctx, cancel := bounded(ctx, name)
	defer cancel()
	request, err := encode(name, args)
	if err != nil {
		return &OpError{Command: name, Err: err}
	}
	if err := c.take(ctx); err != nil {
		return &OpError{Command: name, Err: err}
	}
	defer c.release()
	if err := c.ready(ctx); err != nil {
		return &OpError{Command: name, Err: err}
	}
	defer c.bind(ctx)()
	if _, err := c.conn.Write(request); err != nil {
		return c.failed(name, transportError(ctx, err))
	}
	return c.answer(ctx, name, decode)
}

// ready makes sure that the next line will be the answer to the next command.
func (c *Client) ready(ctx context.Context) error {
	if !c.inStep || c.r.Buffered() > 0 {
		return c.resync(ctx)
	}
	return nil
}

// answer reads the reply to a command and hands what the guest returned to
// decode.
func (c *Client) answer(ctx context.Context, name string, decode func(json.RawMessage) error) error {
	line, err := c.readLine()
	if err != nil {
		return c.failed(name, transportError(ctx, err))
	}
	reply, err := decodeReply(line, c.limits)
	if err == nil {
		err = decode(reply)
	}
	if err != nil {
		return c.failed(name, err)
	}
	return nil
}

// failed is the error of a command that was sent.
func (c *Client) failed(name string, err error) error {
	var refused *CommandError
	if errors.As(err, &refused) {
		refused.Command = name
	} else {
		// A result of the wrong shape may be the answer to something else.
		c.inStep = false
	}
	return &OpError{Command: name, Sent: true, Err: err}
}

func (c *Client) take(ctx context.Context) error {
	select {
	case <-c.turn:
		return nil
	case <-ctx.Done():
		return transportError(ctx, ctx.Err())
	}
}

func (c *Client) release() { c.turn <- struct{}{} }

// resync is the sync in front of another command.
func (c *Client) resync(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, deadlines[cmdSync].limit)
	defer cancel()
	if err := c.sync(ctx); err != nil {
		return err
	}
	if c.r.Buffered() > 0 {
		c.inStep = false
		return fmt.Errorf("%w: it talks without being asked", ErrMalformed)
	}
	return nil
}

func (c *Client) sync(ctx context.Context) error {
	c.inStep = false
	id, err := randomID()
	if err != nil {
		return &OpError{Command: cmdSync, Err: err}
	}
	request, err := encode(cmdSync, map[string]int64{"id": id})
	if err != nil {
		return &OpError{Command: cmdSync, Err: err}
	}
	defer c.bind(ctx)()
	if _, err := c.conn.Write(append([]byte{delimiter}, request...)); err != nil {
		return &OpError{Command: cmdSync, Sent: true, Err: transportError(ctx, err)}
	}
	if err := c.awaitSync(ctx, id); err != nil {
		return &OpError{Command: cmdSync, Sent: true, Err: err}
	}
	c.inStep = true
	return nil
}

// awaitSync reads until the answer to the sync with this id. Answers to earlier
// syncs, forged ones, and everything else are thrown away.
func (c *Client) awaitSync(ctx context.Context, id int64) error {
	const longest = 256 // an answer is a number in an object
	var frame []byte
	inFrame := false
	for range c.limits.DiscardBytes {
		b, err := c.r.ReadByte()
		if err != nil {
			return transportError(ctx, err)
		}
		switch {
		case b == delimiter:
			inFrame, frame = true, frame[:0]
		case !inFrame:
		case b != '\n':
			frame = append(frame, b)
			inFrame = len(frame) <= longest
		default:
			inFrame = false
			if c.answers(frame, id) {
				return nil
			}
		}
	}
	return fmt.Errorf("%w: %d bytes without an answer", ErrTooLarge, c.limits.DiscardBytes)
}

func (c *Client) answers(frame []byte, id int64) bool {
	raw, err := decodeReply(frame, c.limits)
	if err != nil {
		return false
	}
	got, err := decodeInt(raw)
	return err == nil && got == id
}

// readLine returns the next line that is not blank.
func (c *Client) readLine() ([]byte, error) {
	var line []byte
	for budget := c.limits.ReplyBytes; ; {
		part, err := c.r.ReadSlice('\n')
		if len(part) > budget {
			return nil, fmt.Errorf("%w: more than %d bytes", ErrTooLarge, c.limits.ReplyBytes)
		}
		budget -= len(part)
		line = append(line, part...)
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
		case err != nil:
			return nil, err
		case len(bytes.TrimSpace(line)) > 0:
			return line, nil
		default:
			line = line[:0]
		}
	}
}

// bind makes the connection's reads and writes end with the context, until the
// returned function is called.
func (c *Client) bind(ctx context.Context) func() {
	end, _ := ctx.Deadline() // bounded has given it one
	// An error means that the connection is closed, which the read will tell.
	_ = c.conn.SetDeadline(end)
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		_ = c.conn.SetDeadline(time.Unix(1, 0))
	})
	return func() {
		if !stop() {
			<-interrupted // or it would interrupt the next command
		}
	}
}

// encode returns a command as one line.
func encode(name string, args any) ([]byte, error) {
	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{name, args})
	if err != nil {
		return nil, err
	}
	return append(line, '\n'), nil
}

// randomID returns a number that the guest could not have foreseen, and that
// survives a parser that keeps numbers as doubles.
func randomID() (int64, error) {
	var b [8]byte
	if _, err := rand.Read(b[:]); err != nil {
		return 0, err
	}
	return int64(binary.LittleEndian.Uint64(b[:]) >> 11), nil
}
