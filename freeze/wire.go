package freeze

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// The guard's pipe is a socket pair, with one JSON object a line. The agent
// sends a hello and then orders; the guard sends reports. Either end may be
// gone or stopped at any time.

// hello is the first line to the guard.
type hello struct {
	ID      string  `json:"id"`
	Dir     string  `json:"dir"`
	Owner   Process `json:"owner"`
	Request Request `json:"request"`
	// Recover is the lease that a lost guard left, to be thawed.
	Recover *Lease `json:"recover,omitempty"`
}

// order is what the agent wants.
type order string

const (
	orderFreeze order = "freeze"
	orderThaw   order = "thaw" // also before the freeze is answered, which abandons it
	orderEnd    order = "end"  // the guest was reset: nothing is frozen any more
)

// reportKind is what a report is about.
type reportKind string

const (
	reportReady      reportKind = "ready"      // or why the guard cannot be used
	reportFreeze     reportKind = "freeze"     // the answer to orderFreeze
	reportThaw       reportKind = "thaw"       // the answer to orderThaw
	reportUnresolved reportKind = "unresolved" // the guest does not answer the thaw
	reportEnded      reportKind = "ended"      // the last one
)

// report is one line from the guard.
type report struct {
	Kind    reportKind   `json:"kind"`
	Err     *remoteError `json:"err,omitempty"`
	Ready   *readiness   `json:"ready,omitempty"`
	Frozen  *Frozen      `json:"frozen,omitempty"`
	Thawed  *Thawed      `json:"thawed,omitempty"`
	Outcome *Outcome     `json:"outcome,omitempty"`
}

// readiness is what the guard found when it started.
type readiness struct {
	Filesystems []Filesystem `json:"filesystems"`
	Scope       string       `json:"scope,omitempty"`
	NoScope     string       `json:"no_scope,omitempty"` // why there is none
}

// longestLine is more than any list of file systems that qga.Limits let pass.
const longestLine = 16 << 20

// pipe is one end of the socket pair.
type pipe struct {
	conn  net.Conn
	lines *bufio.Scanner
	send  sync.Mutex // one line at a time
}

func newPipe(conn net.Conn) *pipe {
	lines := bufio.NewScanner(conn)
	lines.Buffer(make([]byte, 0, 4096), longestLine)
	return &pipe{conn: conn, lines: lines}
}

// write sends one message, and gives up at the limit.
func (p *pipe) write(message any, limit time.Duration) error {
	b, err := json.Marshal(message)
	if err != nil {
		return err
	}
	p.send.Lock()
	defer p.send.Unlock()
	if err := p.conn.SetWriteDeadline(time.Now().Add(limit)); err != nil {
		return err
	}
	_, err = p.conn.Write(append(b, '\n'))
	return err
}

// read receives one message. The error is io.EOF when the other end is closed.
func (p *pipe) read(message any) error {
	if !p.lines.Scan() {
		if err := p.lines.Err(); err != nil {
			return err
		}
		return io.EOF
	}
	if err := json.Unmarshal(p.lines.Bytes(), message); err != nil {
		return fmt.Errorf("on the guard's pipe: %w", err)
	}
	return nil
}

// closeWrite tells the other end that nothing more will come, and still
// receives what it has to say.
func (p *pipe) closeWrite() error {
	half, ok := p.conn.(interface{ CloseWrite() error })
	if !ok {
		return errors.ErrUnsupported
	}
	return half.CloseWrite()
}
