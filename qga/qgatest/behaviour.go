package qgatest

import (
	"bytes"
	"sync"
	"time"
)

// Behaviour serves one command. Returning from it makes the guest agent take
// the next one.
type Behaviour func(*Turn)

// Silent takes the command and never answers.
func Silent(*Turn) {}

// Return answers with this result, whatever the truth is.
func Return(result any) Behaviour { return func(t *Turn) { t.Write(reply(result)) } }

// Refuse answers with an error.
func Refuse(class, desc string) Behaviour { return func(t *Turn) { t.Write(refusal(class, desc)) } }

// Raw answers with these bytes.
func Raw(b string) Behaviour { return func(t *Turn) { t.Write([]byte(b)) } }

// Mute runs the command and loses the reply.
func Mute(t *Turn) { t.answer() }

// Deep answers with lists nested this deep.
func Deep(levels int) Behaviour {
	return func(t *Turn) {
		t.Write([]byte(`{"return":`))
		t.Write(bytes.Repeat([]byte{'['}, levels))
		t.Write(bytes.Repeat([]byte{']'}, levels))
		t.Write([]byte("}\n"))
	}
}

// Flood answers with this many bytes that never end in a reply.
func Flood(size int) Behaviour {
	return func(t *Turn) {
		chunk := bytes.Repeat([]byte("x"), 64<<10)
		t.Write([]byte(`{"return":"`))
		for sent := 0; sent < size && t.Server.running(); sent += len(chunk) {
			t.Write(chunk)
		}
	}
}

// Endless answers with these bytes again and again, until the client leaves.
func Endless(b string) Behaviour {
	return func(t *Turn) {
		chunk := bytes.Repeat([]byte(b), max(1, (64<<10)/len(b)))
		for t.Server.running() && t.write(chunk) {
		}
	}
}

// Drip runs the command and sends the reply byte by byte.
func Drip(every time.Duration) Behaviour {
	return func(t *Turn) {
		for _, b := range t.answer() {
			select {
			case <-time.After(every):
				t.Write([]byte{b})
			case <-t.Server.stopped:
				return
			}
		}
	}
}

// Die ends the guest and its QEMU instead of answering.
func Die(t *Turn) { go t.Server.Stop() }

// Then runs one behaviour after another for the same command.
func Then(behaviours ...Behaviour) Behaviour {
	return func(t *Turn) {
		for _, b := range behaviours {
			b(t)
		}
	}
}

// Gate holds commands up, as a hook that hangs does. What comes after it waits
// too, since the guest agent does one thing at a time.
type Gate struct {
	entered, released chan struct{}
	enter, release    sync.Once
}

// NewGate returns a gate that is closed.
func NewGate() *Gate {
	return &Gate{entered: make(chan struct{}), released: make(chan struct{})}
}

// Hold waits at the gate and then does what qemu-ga does.
func (g *Gate) Hold(t *Turn) {
	g.enter.Do(func() { close(g.entered) })
	select {
	case <-g.released:
		t.Behave()
	case <-t.Server.stopped:
	}
}

// Entered is closed when the first command waits at the gate.
func (g *Gate) Entered() <-chan struct{} { return g.entered }

// Release opens the gate for good.
func (g *Gate) Release() { g.release.Do(func() { close(g.released) }) }

func (s *Server) running() bool {
	select {
	case <-s.stopped:
		return false
	default:
		return true
	}
}
