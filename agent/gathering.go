package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// stage is how far a member of a group has come.
type stage int

// The stages, in their order.
const (
	begun    stage = iota
	ready          // everything is made and journalled; only the freeze and the cut are left
	frozen         // the guest is frozen, or is not going to be
	cutTaken       // QEMU has answered the transaction
	thawed         // the guest is thawed, or was not frozen
	fit            // the member is what was asked for
)

// gathering holds the members of a group together: each is a snapshot of its own,
// with its own journal and reverts, and waits here for the others.
//
// A guest is never kept frozen for another one that does not come along: every
// wait between freeze and thaw is short, whatever the others do.
type gathering struct {
	bestEffort bool

	mu       sync.Mutex
	changed  chan struct{} // closed and replaced at each change
	stages   []stage
	dropped  []error // why members dropped out
	sent     []time.Time
	answered []time.Time
}

func newGathering(members int, bestEffort bool) *gathering {
	return &gathering{
		bestEffort: bestEffort, changed: make(chan struct{}), stages: make([]stage, members), dropped: make([]error, members),
		sent: make([]time.Time, members), answered: make([]time.Time, members),
	}
}

// member is one VM's part in a gathering. A nil one is on its own.
type member struct {
	*gathering
	at int
	vm string
}

// errGroup is why a member does not go on alone.
type errGroup struct {
	vm  string
	err error
}

func (e *errGroup) Error() string {
	return fmt.Sprintf("VM %s %s: %v", e.vm, ofTheGroup, e.err)
}

// ofTheGroup tells a member that failed with another from one that failed by
// itself.
const ofTheGroup = "of the same group failed"

func (e *errGroup) Unwrap() error { return e.err }

// reach tells the others how far the member has come.
func (m *member) reach(s stage) {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stages[m.at] = s
	m.tell()
}

// drop takes the member out. Unless the group makes its best effort the others
// fail with it.
func (m *member) drop(err error) {
	if m == nil || err == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dropped[m.at] != nil {
		return
	}
	other, with := errors.AsType[*errGroup](err)
	if !with {
		other = &errGroup{m.vm, err}
	}
	m.dropped[m.at] = other
	m.tell()
}

// tell wakes all that wait. The caller holds mu.
func (g *gathering) tell() {
	close(g.changed)
	g.changed = make(chan struct{})
}

// transaction records when the member's cut was sent and answered.
func (m *member) transaction(sent, answered time.Time) {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sent[m.at], m.answered[m.at] = sent, answered
}

// failed returns why the group has failed, or nil. The caller holds mu.
func (g *gathering) failed() error {
	if g.bestEffort {
		return nil
	}
	for _, err := range g.dropped {
		if err != nil {
			return err
		}
	}
	return nil
}

// have reports whether all members from one to before another that have not
// dropped out have come so far. The caller holds mu.
func (g *gathering) have(from, to int, s stage) bool {
	for i := from; i < to; i++ {
		if g.dropped[i] == nil && g.stages[i] < s {
			return false
		}
	}
	return true
}

// all waits until all have come so far.
func (m *member) all(ctx context.Context, s stage) error {
	if m == nil {
		return nil
	}
	return m.await(ctx, 0, len(m.stages), s)
}

// earlier waits for those that stand before the member.
func (m *member) earlier(ctx context.Context, s stage) error {
	if m == nil {
		return nil
	}
	return m.await(ctx, 0, m.at, s)
}

// laterAWhile waits for those that stand behind the member, and no longer than a
// while.
func (m *member) laterAWhile(ctx context.Context, s stage, while time.Duration) {
	if m == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, while)
	defer cancel()
	_ = m.awaitEven(ctx, m.at+1, len(m.stages), s) // the guest is thawed whatever comes of it
}

// allAWhile is laterAWhile for all.
func (m *member) allAWhile(ctx context.Context, s stage, while time.Duration) {
	if m == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, while)
	defer cancel()
	_ = m.awaitEven(ctx, 0, len(m.stages), s)
}

// await waits for some members, and fails with the group.
func (m *member) await(ctx context.Context, from, to int, s stage) error {
	return m.wait(ctx, func() (bool, error) {
		if err := m.failed(); err != nil {
			return false, fault.New(fault.Of(err), "%w", err)
		}
		return m.have(from, to, s), nil
	})
}

// awaitEven waits for some members, of a group that may have failed.
func (m *member) awaitEven(ctx context.Context, from, to int, s stage) error {
	return m.wait(ctx, func() (bool, error) { return m.have(from, to, s), nil })
}

// wait waits until done says so. done is called with mu held.
func (g *gathering) wait(ctx context.Context, done func() (bool, error)) error {
	for {
		g.mu.Lock()
		ok, err := done()
		changed := g.changed
		g.mu.Unlock()
		if ok || err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// skew returns by how much the cuts of the members can lie apart: from the first
// transaction that was sent to the last answer. Each cut is somewhere in between.
func (g *gathering) skew() time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	var first, last time.Time
	for i := range g.stages {
		if g.dropped[i] != nil || g.sent[i].IsZero() {
			continue
		}
		if first.IsZero() || g.sent[i].Before(first) {
			first = g.sent[i]
		}
		if g.answered[i].After(last) {
			last = g.answered[i]
		}
	}
	return last.Sub(first)
}
