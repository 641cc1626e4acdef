package qgatest

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"slices"
	"time"
)

const delimiter = 0xFF

// The commands that Behaviours are given to.
const (
	Sync       = "guest-sync-delimited"
	Ping       = "guest-ping"
	Info       = "guest-info"
	OSInfo     = "guest-get-osinfo"
	FSInfo     = "guest-get-fsinfo"
	Status     = "guest-fsfreeze-status"
	Freeze     = "guest-fsfreeze-freeze"
	FreezeList = "guest-fsfreeze-freeze-list"
	Thaw       = "guest-fsfreeze-thaw"
)

// commands are all that are served, and whether they are while frozen (QEMU,
// qga/main.c, ga_freeze_allowlist).
var commands = map[string]bool{
	Sync: true, Ping: true, Info: true, Status: true, Thaw: true,
	OSInfo: false, FSInfo: false, Freeze: false, FreezeList: false,
}

// input is what the guest agent's parser found.
type input struct {
	Execute   string `json:"execute"`
	Arguments struct {
		ID          json.RawMessage `json:"id"`
		Mountpoints []string        `json:"mountpoints"`
	} `json:"arguments"`
	err error
}

// accept serves one client after another.
func (s *Server) accept() {
	for {
		conn, err := s.listener.Accept()
		if err != nil {
			return
		}
		s.update(func() { s.conn = conn })
		s.receive(conn)
		_ = conn.Close()
		s.update(func() { s.conn = nil })
	}
}

// receive feeds the guest agent from one client.
func (s *Server) receive(conn net.Conn) {
	select {
	case <-s.stopped: // Stop may have missed this one
		return
	default:
	}
	lines := bufio.NewReader(conn)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return
		}
		for {
			part, rest, reset := bytes.Cut(line, []byte{delimiter})
			if len(bytes.TrimSpace(part)) > 0 {
				s.enqueue(part)
			}
			if !reset {
				break
			}
			line = rest
		}
	}
}

func (s *Server) enqueue(line []byte) {
	var in input
	if err := json.Unmarshal(line, &in); err != nil {
		in = input{err: err}
	}
	s.update(func() { s.queue = append(s.queue, in) })
}

// serve is the guest agent: one command after another.
func (s *Server) serve() {
	for {
		s.mu.Lock()
		changed := s.changed
		var next *input
		if len(s.queue) > 0 {
			next, s.queue = &s.queue[0], s.queue[1:]
		}
		s.mu.Unlock()
		if next == nil {
			select {
			case <-changed:
				continue
			case <-s.stopped:
				return
			}
		}
		turn := &Turn{Server: s, in: *next}
		s.behaviour(next.Execute)(turn)
	}
}

func (s *Server) behaviour(command string) Behaviour {
	b := Behaviour((*Turn).Behave)
	s.update(func() {
		s.events = append(s.events, Event{Command: command, At: time.Now()})
		if list := s.once[command]; len(list) > 0 {
			b, s.once[command] = list[0], list[1:]
		} else if always := s.always[command]; always != nil {
			b = always
		}
	})
	return b
}

// Turn is one command being served.
type Turn struct {
	Server *Server
	in     input
}

// Behave does what qemu-ga does.
func (t *Turn) Behave() { t.Write(t.answer()) }

// Write sends bytes to the client, if there is one. A client that has left does
// not matter to the guest.
func (t *Turn) Write(b []byte) { t.write(b) }

// write reports whether there is a client that takes the bytes.
func (t *Turn) write(b []byte) bool {
	t.Server.mu.Lock()
	conn := t.Server.conn
	t.Server.mu.Unlock()
	if conn == nil {
		return false
	}
	_, err := conn.Write(b)
	return err == nil
}

// answer runs the command and returns its reply.
func (t *Turn) answer() []byte {
	s := t.Server
	allowed, known := commands[t.in.Execute]
	s.mu.Lock()
	frozen := s.frozen > 0
	s.mu.Unlock()
	switch {
	case t.in.err != nil:
		return refusal("GenericError", "JSON parse error, "+t.in.err.Error())
	case !known:
		return refusal("CommandNotFound", "The command "+t.in.Execute+" has not been found")
	case frozen && !allowed:
		return refusal("CommandNotFound", "Command "+t.in.Execute+" has been disabled: the agent is in frozen state")
	}
	switch t.in.Execute {
	case Sync:
		return append([]byte{delimiter}, reply(t.in.Arguments.ID)...)
	case Ping:
		return reply(struct{}{})
	case Info:
		return reply(s.info())
	case OSInfo:
		return reply(map[string]string{"id": "test", "name": "Test Guest", "kernel-release": "6.1.0"})
	case FSInfo:
		s.mu.Lock()
		defer s.mu.Unlock()
		return reply(s.filesystems)
	case Status:
		if frozen {
			return reply("frozen")
		}
		return reply("thawed")
	case Thaw:
		var n int
		s.update(func() { n, s.frozen = s.frozen, 0 })
		return reply(n)
	default:
		return reply(s.freeze(t.in.Execute == FreezeList, t.in.Arguments.Mountpoints))
	}
}

func (s *Server) freeze(chosen bool, mountpoints []string) (n int) {
	s.update(func() {
		for _, fs := range s.filesystems {
			if fs.Type != "vfat" && (!chosen || slices.Contains(mountpoints, fs.Mountpoint)) {
				s.frozen++
			}
		}
		n = s.frozen
	})
	return n
}

func (s *Server) info() any {
	type command struct {
		Name    string `json:"name"`
		Enabled bool   `json:"enabled"`
	}
	var list []command
	for name := range commands {
		list = append(list, command{name, true})
	}
	return map[string]any{"version": "7.2.22", "supported_commands": list}
}

// reply returns a result as one line. What is passed to it can be encoded.
func reply(result any) []byte {
	b, err := json.Marshal(map[string]any{"return": result})
	if err != nil {
		panic(fmt.Sprintf("encode %v: %v", result, err))
	}
	return append(b, '\n')
}

func refusal(class, desc string) []byte {
	b, err := json.Marshal(map[string]any{"error": map[string]string{"class": class, "desc": desc}})
	if err != nil {
		panic(fmt.Sprintf("encode %s: %v", desc, err))
	}
	return append(b, '\n')
}
