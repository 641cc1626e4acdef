package freeze

import (
	"context"
	"fmt"
)

// mostReplaced is how many guards of one freeze may be lost: one may be killed,
// more means that guards cannot live on this host.
const mostReplaced = 3

// listen takes the guard's reports until it has ended.
func (g *Guard) listen() {
	var last *Outcome
	for {
		var r report
		if err := g.pipe.read(&r); err != nil {
			break
		}
		switch r.Kind {
		case reportFreeze:
			offer(g.frozen, r)
		case reportThaw:
			offer(g.thawed, r)
		case reportUnresolved:
			g.alarm(r.Err)
		case reportEnded:
			last = r.Outcome
		}
	}
	// The pipe closes when the process ends, and how it ended says nothing new.
	_ = g.cmd.Wait()
	_ = g.pipe.conn.Close()
	if last == nil {
		last = g.replace()
	}
	g.outcome = *last
	g.log.Debug("guard has ended", "end", last.End, "reason", last.Reason)
	close(g.done)
}

func offer(answers chan<- report, r report) {
	select {
	case answers <- r:
	default: // one answer is all there is to an order
	}
}

func (g *Guard) alarm(cause *remoteError) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.alarmed {
		return
	}
	g.alarmed = true
	g.log.Error("guest may be frozen and does not answer; the guard goes on thawing", "error", cause)
	close(g.unresolved)
}

// endIfHung is called when the lease is long over. A guard that has told
// nothing of it is stopped or hung, and another one has to thaw.
func (g *Guard) endIfHung() {
	select {
	case <-g.done:
	case <-g.unresolved:
	default:
		g.kill()
	}
}

// kill ends a guard that is hung. listen notices and puts another in its place.
func (g *Guard) kill() {
	g.log.Error("guard does not answer and is killed", "guard", g.process.PID)
	if err := g.cmd.Process.Kill(); err != nil {
		g.log.Debug("guard has ended before", "error", err)
	}
}

// replace follows a guard that ended without a word, because it was killed, by
// one that thaws.
func (g *Guard) replace() *Outcome {
	g.mu.Lock()
	froze := g.froze
	g.mu.Unlock()
	if !froze && g.Recover == nil {
		return &Outcome{End: Unused, Reason: "the guard was lost before the freeze"}
	}
	lease, found, err := findLease(g.cfg.Dir, g.ID)
	if err == nil && !found {
		return &Outcome{End: Unused, Reason: "the guard was lost before it had sent the freeze, or after the thaw"}
	}
	g.log.Error("guard is lost, another one thaws", "guard", g.process.PID, "error", err)
	if err == nil && g.replaced == mostReplaced {
		err = fmt.Errorf("%d guards were lost in a row", mostReplaced+1)
	}
	if err != nil {
		return g.giveUp(err)
	}
	// The lease outlives every caller's context.
	next, err := g.takeOver(context.Background(), lease)
	if err != nil {
		return g.giveUp(err)
	}
	return next
}

func (g *Guard) takeOver(ctx context.Context, lease Lease) (*Outcome, error) {
	next, err := startRecovery(ctx, g.cfg, lease, g.replaced+1)
	if err != nil {
		return nil, err
	}
	select {
	case <-next.Unresolved():
		g.alarm(&remoteError{Message: "the guard was lost, and the guest does not answer another one"})
	case <-next.Done():
	}
	outcome := next.Outcome()
	return &outcome, nil
}

func (g *Guard) giveUp(err error) *Outcome {
	g.alarm(toRemote(err))
	return &Outcome{End: Lost, Reason: fmt.Sprintf("no guard can be kept running: %v", err)}
}
