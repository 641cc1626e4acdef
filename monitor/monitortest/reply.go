package monitortest

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
)

// A Request is a command as the server received it.
type Request struct {
	Command   string
	Arguments json.RawMessage // nil if there were none
	ID        json.RawMessage
	// Files were passed along with the command. The server closes them at its
	// end.
	Files []*os.File

	done <-chan struct{}
}

// Decode unmarshals the arguments.
func (r Request) Decode(v any) error {
	if err := json.Unmarshal(r.Arguments, v); err != nil {
		return fmt.Errorf("arguments of %s: %w", r.Command, err)
	}
	return nil
}

// Done is closed when the server closes the connection, as it does at the
// test's end. A handler that blocks must select on it. A client that leaves
// while a handler blocks goes unnoticed, since nothing is read.
func (r Request) Done() <-chan struct{} { return r.done }

// A Handler answers a command. While it runs the server reads nothing.
type Handler func(Request) Reply

// Hang is the handler of a main loop that hangs: no answer ever comes, and
// nothing more is read.
func Hang(r Request) Reply {
	<-r.Done()
	return Silence()
}

// An Event is what Emit sends.
type Event struct {
	Name string
	Data any // marshalled; nil for none
}

// A Reply is what the server does about a command. Make one with Return, Fail,
// Huge, Raw, Silence or HangUp, and change it with the methods, each of which
// returns a changed copy.
type Reply struct {
	body   func(id json.RawMessage) []byte // nil for nothing
	id     json.RawMessage                 // in place of the request's
	events []Event
	after  <-chan struct{}
	hangUp bool
}

// Return succeeds with a value. Nil stands for QEMU's empty object.
func Return(value any) Reply {
	if value == nil {
		value = struct{}{}
	}
	return Reply{body: func(id json.RawMessage) []byte {
		return line(struct {
			Return any             `json:"return"`
			ID     json.RawMessage `json:"id,omitempty"`
		}{value, id})
	}}
}

// Fail refuses with an error class, such as "GenericError", and a text.
func Fail(class, desc string) Reply {
	return Reply{body: func(id json.RawMessage) []byte {
		type failure struct {
			Class string `json:"class"`
			Desc  string `json:"desc"`
		}
		return line(struct {
			ID    json.RawMessage `json:"id,omitempty"`
			Error failure         `json:"error"`
		}{id, failure{class, desc}})
	}}
}

// Huge succeeds with a string of n bytes.
func Huge(n int) Reply { return Return(strings.Repeat("x", n)) }

// Raw sends bytes as they are.
func Raw(b []byte) Reply {
	b = slices.Clone(b)
	return Reply{body: func(json.RawMessage) []byte { return b }}
}

// Silence never answers. Later commands are served.
func Silence() Reply { return Reply{} }

// HangUp closes the connection without an answer.
func HangUp() Reply { return Reply{hangUp: true} }

// WithID answers under another id, given as JSON. "" leaves the id out.
func (r Reply) WithID(id string) Reply {
	r.id = json.RawMessage(id)
	return r
}

// AfterEvents sends events ahead of the answer.
func (r Reply) AfterEvents(events ...Event) Reply {
	r.events = slices.Clone(events)
	return r
}

// After answers when the channel is closed. Meanwhile later commands are
// served.
func (r Reply) After(c <-chan struct{}) Reply {
	r.after = c
	return r
}

// Cut sends only the first n bytes of the answer and closes the connection.
func (r Reply) Cut(n int) Reply {
	whole := r.body
	r.body = func(id json.RawMessage) []byte {
		b := whole(id)
		return b[:min(n, len(b))]
	}
	r.hangUp = true
	return r
}

// line marshals a message as QEMU ends it. A value that cannot be marshalled
// is a mistake in the test.
func line(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("monitortest: %v", err))
	}
	return append(b, '\r', '\n')
}
