package testvm

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm/wire"
)

// errClosed means that the connection to the guest was closed.
var errClosed = errors.New("the connection to the guest was closed")

// control is a connection to the guest's control port.
type control struct {
	conn    net.Conn
	sending sync.Mutex // one message at a time

	mu      sync.Mutex
	lastID  uint64
	waiting map[uint64]chan wire.Reply
	boots   int           // ready events seen
	booted  chan struct{} // closed at the next ready event
	closed  chan struct{} // closed when the connection has ended
}

// dial connects to a socket of a QEMU that is starting.
func dial(ctx context.Context, p *process, path string) (net.Conn, error) {
	conn, err := Connect(ctx, p.ended, func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	})
	if errors.Is(err, ErrEnded) {
		return nil, fmt.Errorf("QEMU ended: %w", p.err)
	}
	return conn, err
}

func newControl(conn net.Conn) *control {
	c := &control{
		conn:    conn,
		waiting: map[uint64]chan wire.Reply{},
		booted:  make(chan struct{}),
		closed:  make(chan struct{}),
		// Replies to a client before this one must not be taken for ours.
		lastID: uint64(time.Now().UnixNano()),
	}
	go c.receive()
	return c
}

func (c *control) receive() {
	defer close(c.closed)
	lines := bufio.NewReader(c.conn)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return
		}
		var reply wire.Reply
		if json.Unmarshal(line, &reply) != nil {
			continue // the rest of a line to the client before
		}
		c.mu.Lock()
		if reply.Event == wire.EventReady {
			c.boots++
			close(c.booted)
			c.booted = make(chan struct{})
		}
		if answered, ok := c.waiting[reply.ID]; ok {
			answered <- reply
			delete(c.waiting, reply.ID)
		}
		c.mu.Unlock()
	}
}

// awaitBoots returns when the guest has come up n times on this connection.
func (c *control) awaitBoots(ctx context.Context, n int) error {
	for {
		c.mu.Lock()
		boots, booted := c.boots, c.booted
		c.mu.Unlock()
		if boots >= n {
			return nil
		}
		select {
		case <-booted:
		case <-c.closed:
			return errClosed
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// call sends a request and returns its reply.
func (c *control) call(ctx context.Context, req wire.Request) (wire.Reply, error) {
	answered := make(chan wire.Reply, 1)
	c.mu.Lock()
	c.lastID++
	req.ID = c.lastID
	c.waiting[req.ID] = answered
	c.mu.Unlock()
	defer c.forget(req.ID)
	if err := c.send(ctx, req); err != nil {
		return wire.Reply{}, fmt.Errorf("%s: %w", req.Op, err)
	}
	select {
	case reply := <-answered:
		if reply.Err != "" {
			return reply, fmt.Errorf("%s: in the guest: %s", req.Op, reply.Err)
		}
		return reply, nil
	case <-c.closed:
		return wire.Reply{}, fmt.Errorf("%s: %w", req.Op, errClosed)
	case <-ctx.Done():
		return wire.Reply{}, fmt.Errorf("%s: %w", req.Op, ctx.Err())
	}
}

func (c *control) send(ctx context.Context, req wire.Request) error {
	line, err := json.Marshal(req)
	if err != nil {
		return err
	}
	c.sending.Lock()
	defer c.sending.Unlock()
	deadline, _ := ctx.Deadline() // none is the zero time, and means none
	if err := c.conn.SetWriteDeadline(deadline); err != nil {
		return errClosed
	}
	// The first newline ends what a send that failed midway, or a client before
	// us, may have left.
	_, err = c.conn.Write(slices.Concat([]byte("\n"), line, []byte("\n")))
	if errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.EPIPE) {
		return errClosed
	}
	return err
}

func (c *control) forget(id uint64) {
	c.mu.Lock()
	delete(c.waiting, id)
	c.mu.Unlock()
}

func (c *control) close() {
	_ = c.conn.Close()
	<-c.closed
}
