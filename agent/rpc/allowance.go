package rpc

import (
	"context"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// What one user may have of the daemon at a time. Each is more than a controller
// of a thousand VMs needs, and little enough for others not to notice.
const (
	mostConnections = 1024
	mostCalls       = 512  // under way, watches included
	callRate        = 1000 // a second, on average
	callBurst       = 2000
)

// allowances count the calls of each user.
type allowances struct {
	now func() time.Time

	mu    sync.Mutex
	users map[uint32]*allowance
}

// allowance is what a user has taken.
type allowance struct {
	calls  int       // under way
	tokens float64   // calls that may begin at once
	at     time.Time // when the tokens were counted
}

func newAllowances() *allowances {
	return &allowances{now: time.Now, users: map[uint32]*allowance{}}
}

// enter lets a call begin, or says why it must not. Who is let in leaves.
func (a *allowances) enter(ctx context.Context) (leave func(), err error) {
	peer, known := peerFrom(ctx)
	if !known {
		return func() {}, nil // it is refused for that
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.now()
	u := a.users[peer.UID]
	if u == nil {
		a.forget(now)
		u = &allowance{tokens: callBurst, at: now}
		a.users[peer.UID] = u
	}
	u.tokens = min(callBurst, u.tokens+now.Sub(u.at).Seconds()*callRate)
	u.at = now
	switch {
	case u.calls >= mostCalls:
		return nil, fault.New(fault.Busy, "uid %d has %d calls under way, which is the most that a user may have", peer.UID, u.calls).
			WithHint("end some of them; one watch of events tells of all operations")
	case u.tokens < 1:
		return nil, fault.New(fault.Busy, "uid %d makes more than %d calls a second", peer.UID, callRate).WithHint("wait a second")
	}
	u.calls++
	u.tokens--
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		u.calls--
	}, nil
}

// forget forgets the users who have not called for long. The caller holds the
// lock.
func (a *allowances) forget(now time.Time) {
	for uid, u := range a.users {
		if u.calls == 0 && now.Sub(u.at) > callBurst/callRate*time.Second {
			delete(a.users, uid)
		}
	}
}

// frontListener accepts connections, and learns who is at the other end. A user's
// connections beyond mostConnections are closed at once.
type frontListener struct {
	net.Listener
	log hclog.Logger

	mu   sync.Mutex
	open map[uint32]int
}

// knownConn is a connection whose peer the kernel has told.
type knownConn struct {
	net.Conn
	peer Peer
	gone func()
}

// Close closes the connection.
func (c *knownConn) Close() error {
	c.gone()
	return c.Conn.Close()
}

// Accept returns the next connection of a user who may have one more. One whose
// peer is unknown is returned as it is.
func (l *frontListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		peer, err := identify(conn)
		if err != nil {
			l.log.Error("connection without an identity", "error", err)
			return conn, nil
		}
		if !l.take(peer.UID) {
			l.log.Warn("connection closed: its user has too many", "uid", peer.UID, "pid", peer.PID, "connections", mostConnections)
			_ = conn.Close() // nothing was sent on it
			continue
		}
		return &knownConn{Conn: conn, peer: peer, gone: sync.OnceFunc(func() { l.giveBack(peer.UID) })}, nil
	}
}

func (l *frontListener) take(uid uint32) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open[uid] >= mostConnections {
		return false
	}
	l.open[uid]++
	return true
}

func (l *frontListener) giveBack(uid uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open[uid]--; l.open[uid] == 0 {
		delete(l.open, uid)
	}
}
