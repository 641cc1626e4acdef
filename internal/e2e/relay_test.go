package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// relay stands between the daemon and a socket of a VM, and stops commands on
// their way.
type relay struct {
	t        *testing.T
	path     string // where QEMU listens now
	listener net.Listener

	mu    sync.Mutex
	gates []*gate
}

// gate stops one command of the daemon.
type gate struct {
	name    string
	is      func(line string) bool
	left    int // how many more commands pass first
	reached chan struct{}
	open    chan passage
}

// passage is what becomes of a command that was stopped.
type passage int

const (
	pass       passage = iota
	swallow            // it never gets to QEMU, and the connection ends
	loseAnswer         // QEMU executes it, and the connection ends before the answer
	disconnect         // it is sent, and the connection ends at once, whatever QEMU does
)

// newRelay takes the place of a socket that nobody is connected to.
func newRelay(t *testing.T, socket string) *relay {
	t.Helper()
	r := &relay{t: t, path: socket + "-qemu"}
	if err := os.Rename(socket, r.path); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // it may be QEMU's own again by then
	r.listener = l
	t.Cleanup(r.close)
	go r.serve()
	return r
}

func (r *relay) close() {
	_ = r.listener.Close()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, g := range r.gates {
		close(g.open) // which lets everything pass
	}
	r.gates = nil
}

func (r *relay) serve() {
	for {
		client, err := r.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("unix", r.path)
		if err != nil {
			_ = client.Close()
			continue
		}
		go r.carry(client, server)
	}
}

// hold stops the nth command, from now on, that has a word in it.
func (r *relay) hold(word string, nth int) *gate {
	return r.stop(&gate{name: word, is: func(line string) bool { return strings.Contains(line, `"`+word+`"`) }}, nth)
}

// holdChange stops the nth command, from now on, that changes something.
func (r *relay) holdChange(nth int) *gate {
	return r.stop(&gate{name: fmt.Sprintf("%d commands that change something", nth), is: changes}, nth)
}

func (r *relay) stop(g *gate, nth int) *gate {
	g.left, g.reached, g.open = nth-1, make(chan struct{}), make(chan passage, 1)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.gates = append(r.gates, g)
	return g
}

// drop removes a gate that no command has come to.
func (r *relay) drop(g *gate) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.gates = slices.DeleteFunc(r.gates, func(other *gate) bool { return other == g })
}

// gateOf returns the gate that a command has come to, nil when it passes.
func (r *relay) gateOf(line string) *gate {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, g := range r.gates {
		if !g.is(line) {
			continue
		}
		if g.left > 0 {
			g.left--
			continue
		}
		r.gates = append(r.gates[:i:i], r.gates[i+1:]...)
		return g
	}
	return nil
}

// carry carries commands and answers until an end closes.
func (r *relay) carry(client, server net.Conn) {
	answers := &answers{client: client}
	go func() {
		_, _ = io.Copy(answers, server)
		_ = client.Close()
		_ = server.Close()
	}()
	defer func() { _ = client.Close() }()
	lines := bufio.NewReader(client)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			_ = server.Close()
			return
		}
		how := pass
		if g := r.gateOf(line); g != nil {
			close(g.reached)
			how = <-g.open
		}
		switch how {
		case swallow:
			_ = server.Close()
			return
		case loseAnswer:
			answers.mute()
		}
		if _, err := io.WriteString(server, line); err != nil {
			return
		}
		if how == disconnect {
			answers.mute()
			return // the copier closes the server once QEMU has answered
		}
	}
}

// answers forwards what QEMU says. Once muted it fails at the next answer,
// which ends the connection.
type answers struct {
	mu     sync.Mutex
	client net.Conn
	muted  bool
}

var errMuted = errors.New("the answer is lost")

func (a *answers) mute() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.muted = true
}

func (a *answers) Write(b []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.muted {
		if strings.Contains(string(b), `"return"`) || strings.Contains(string(b), `"error"`) {
			return 0, errMuted
		}
		return len(b), nil // an event
	}
	return a.client.Write(b)
}

// await waits until the command has come.
func (g *gate) await(h *host) {
	h.t.Helper()
	select {
	case <-g.reached:
	case <-time.After(eventLimit):
		h.t.Fatalf("the daemon did not send %s\nvmsnapd's log:\n%s", g.name, h.log)
	}
}

// release lets the command go on.
func (g *gate) release(how passage) { g.open <- how }
