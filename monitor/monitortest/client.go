package monitortest

import (
	"bytes"
	"encoding/json"
	"net"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// client is the connection that is served.
type client struct {
	server     *Server
	conn       *net.UnixConn
	negotiated atomic.Bool

	gone   <-chan struct{}
	cancel func()         // closes gone
	late   sync.WaitGroup // answers that are still to come

	writing sync.Mutex
}

// leave closes the connection. It may be called more than once.
func (c *client) leave() {
	c.cancel()
	_ = c.conn.Close()
}

// write sends bytes; whether the client is still there is not its business.
func (c *client) write(b []byte) {
	c.writing.Lock()
	defer c.writing.Unlock()
	if !c.server.split {
		_, _ = c.conn.Write(b)
		return
	}
	for i := range b {
		if _, err := c.conn.Write(b[i : i+1]); err != nil {
			return
		}
	}
}

// serve greets and answers until the client leaves.
func (c *client) serve() {
	defer c.late.Wait()
	defer c.leave()
	greeting := c.server.greeting
	if greeting == nil {
		greeting = line(map[string]any{"QMP": map[string]any{
			"version": c.server.version, "capabilities": []string{"oob"},
		}})
	}
	c.write(greeting)

	var (
		chunk   = make([]byte, 64<<10)
		oob     = make([]byte, unix.CmsgSpace(16*4))
		partial []byte
		files   []*os.File // passed with the command that partial begins
	)
	for {
		n, oobn, _, _, err := c.conn.ReadMsgUnix(chunk, oob)
		if err != nil || n == 0 {
			closeAll(files)
			return
		}
		received := c.received(oob[:oobn])
		// The kernel ends a read after the message that carried descriptors, so
		// they belong to the last command that begins in this chunk.
		lines := bytes.SplitAfter(append(partial, chunk[:n]...), []byte{'\n'})
		last := len(lines) - 1
		if len(lines[last]) == 0 {
			last--
		}
		for i, l := range lines[:last+1] {
			if i == last {
				files = append(files, received...)
			}
			if !bytes.HasSuffix(l, []byte{'\n'}) {
				break
			}
			owned := files
			files = nil
			if !c.execute(l, owned) {
				return
			}
		}
		partial = nil
		if l := lines[last]; !bytes.HasSuffix(l, []byte{'\n'}) {
			partial = bytes.Clone(l)
		}
	}
}

// received makes files of passed descriptors.
func (c *client) received(oob []byte) []*os.File {
	if len(oob) == 0 {
		return nil
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		c.server.t.Errorf("monitortest: control message: %v", err)
		return nil
	}
	var files []*os.File
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			c.server.t.Errorf("monitortest: control message: %v", err)
			continue
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "passed"))
		}
	}
	return files
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// execute answers one command. It returns false when the connection ends.
func (c *client) execute(l []byte, files []*os.File) bool {
	var in struct {
		Execute   string
		Arguments json.RawMessage
		ID        json.RawMessage
	}
	// 0xFF ends whatever was begun, as an error.
	if i := bytes.LastIndexByte(l, 0xff); i >= 0 {
		c.write(Fail("GenericError", "JSON parse error, invalid token").body(nil))
		l = l[i+1:]
	}
	if err := json.Unmarshal(l, &in); err != nil {
		closeAll(files)
		c.write(Fail("GenericError", "JSON parse error, "+err.Error()).body(nil))
		return true
	}
	r := Request{Command: in.Execute, Arguments: in.Arguments, ID: in.ID, Files: files, done: c.gone}
	s := c.server
	s.update(func() { s.requests = append(s.requests, r) })
	return c.answer(r, s.replyTo(c, r))
}

// replyTo runs the handler of a command, if it may run.
func (s *Server) replyTo(c *client, r Request) Reply {
	s.mu.Lock()
	h := s.handlers[r.Command]
	s.mu.Unlock()
	switch {
	case r.Command == "qmp_capabilities" && c.negotiated.Swap(true):
		return Fail("CommandNotFound", "Capabilities negotiation is already complete, command ignored")
	case !c.negotiated.Load():
		return Fail("CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'")
	case h == nil:
		return Fail("CommandNotFound", "The command "+r.Command+" has not been found")
	}
	return h(r)
}

// answer sends a reply, now or later. It returns false when that ends the
// connection.
func (c *client) answer(r Request, reply Reply) bool {
	if reply.after == nil {
		return c.send(r, reply)
	}
	c.late.Go(func() {
		select {
		case <-reply.after:
			if !c.send(r, reply) {
				c.leave()
			}
		case <-c.gone:
		}
	})
	return true
}

func (c *client) send(r Request, reply Reply) bool {
	for _, e := range reply.events {
		c.write(eventLine(e))
	}
	if reply.body != nil {
		id := r.ID
		if reply.id != nil {
			id = reply.id
		}
		c.write(reply.body(id))
	}
	return !reply.hangUp
}
