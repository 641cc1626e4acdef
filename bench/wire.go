package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"
)

// wire is a connection that carries one JSON object a line: QMP, or the guest
// agent's protocol. It knows no more than a script would.
type wire struct {
	conn     net.Conn
	lines    *bufio.Reader
	greeting []byte            // of QMP
	events   []json.RawMessage // that came between replies, oldest first
}

// dialWire connects. The deadline of ctx is that of everything done on the
// connection until the next call of limit.
func dialWire(ctx context.Context, path string) (*wire, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	w := &wire{conn: conn, lines: bufio.NewReaderSize(conn, 64<<10)}
	return w, w.limit(ctx)
}

// limit gives what follows the deadline of ctx.
func (w *wire) limit(ctx context.Context) error {
	deadline, ok := ctx.Deadline()
	if !ok {
		return errors.New("no deadline")
	}
	return w.conn.SetDeadline(deadline)
}

// encode returns a command as it goes over the wire.
func encode(command string, arguments any) []byte {
	line, err := json.Marshal(map[string]any{"execute": command, "arguments": arguments})
	if err != nil {
		panic(err) // arguments are ours
	}
	return append(line, '\n')
}

// object is a JSON object.
type object = map[string]any

// call sends a command and returns what its reply holds.
func (w *wire) call(command string, arguments, result any) error {
	reply, err := w.exchange(encode(command, arguments))
	if err == nil && result != nil {
		err = json.Unmarshal(reply, result)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	return nil
}

// exchange sends a line and returns what the reply to it holds.
func (w *wire) exchange(line []byte) (json.RawMessage, error) {
	if _, err := w.conn.Write(line); err != nil {
		return nil, err
	}
	return w.reply()
}

// reply reads up to the next reply and returns what it holds.
func (w *wire) reply() (json.RawMessage, error) {
	for {
		line, err := w.lines.ReadBytes('\n')
		if err != nil {
			return nil, err
		}
		var m struct {
			Return json.RawMessage `json:"return"`
			Error  json.RawMessage `json:"error"`
			Event  string          `json:"event"`
		}
		if err := json.Unmarshal(line, &m); err != nil {
			return nil, err
		}
		switch {
		case m.Error != nil:
			return nil, refusal(m.Error)
		case m.Return != nil:
			return m.Return, nil
		case m.Event != "":
			w.events = append(w.events, line)
		}
	}
}

// refusal is the error of a reply, as JSON.
type refusal string

func (r refusal) Error() string { return "refused: " + string(r) }

// awaitJob returns when a job has reached a status, among all that has come
// since the last call.
func (w *wire) awaitJob(id, status string) error {
	for {
		if len(w.events) == 0 {
			line, err := w.lines.ReadBytes('\n')
			if err != nil {
				return fmt.Errorf("wait until job %s is %s: %w", id, status, err)
			}
			w.events = append(w.events, line)
		}
		var e struct {
			Event string `json:"event"`
			Data  struct {
				ID     string `json:"id"`
				Status string `json:"status"`
			} `json:"data"`
		}
		if err := json.Unmarshal(w.events[0], &e); err != nil {
			return err
		}
		w.events = w.events[1:]
		if e.Event == "JOB_STATUS_CHANGE" && e.Data.ID == id && e.Data.Status == status {
			return nil
		}
	}
}

func (w *wire) close() { _ = w.conn.Close() }

// dialQMP connects to a QMP socket and negotiates.
func dialQMP(ctx context.Context, path string) (*wire, error) {
	w, err := dialWire(ctx, path)
	if err != nil {
		return nil, err
	}
	if w.greeting, err = w.lines.ReadBytes('\n'); err != nil {
		w.close()
		return nil, fmt.Errorf("greeting of %s: %w", path, err)
	}
	if err := w.call("qmp_capabilities", object{}, nil); err != nil {
		w.close()
		return nil, err
	}
	return w, nil
}

// dialAgent connects to a guest agent and gets in step with it.
func dialAgent(ctx context.Context, path string) (*wire, error) {
	w, err := dialWire(ctx, path)
	if err != nil {
		return nil, err
	}
	if err := w.sync(); err != nil {
		w.close()
		return nil, fmt.Errorf("get in step with the guest agent: %w", err)
	}
	return w, nil
}

// sync throws away what the guest agent had to tell a former client
// (guest-sync-delimited).
func (w *wire) sync() error {
	id := time.Now().UnixNano() >> 11 // survives a parser that keeps numbers as doubles
	line := encode("guest-sync-delimited", object{"id": id})
	if _, err := w.conn.Write(append([]byte{0xff}, line...)); err != nil {
		return err
	}
	want := fmt.Appendf(nil, `{"return": %d}`, id)
	for {
		if _, err := w.lines.ReadBytes(0xff); err != nil {
			return err
		}
		line, err := w.lines.ReadBytes('\n')
		if err != nil {
			return err
		}
		if bytes.Equal(bytes.TrimSpace(line), want) {
			return nil
		}
	}
}
