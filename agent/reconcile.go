package agent

import (
	"context"
	"time"

	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/blockdev"
)

// askAgain is how long a QEMU that does not answer is left alone.
const askAgain = time.Second

// askSoon is how soon it is asked again at first: it may be about to end.
const askSoon = 10 * time.Millisecond

// reconcile finds out whether a transaction happened whose answer never came.
// It asks until QEMU answers or is gone: overlays that may hold a guest's
// writes are never given up on a guess. The guest is thawed first.
func (c *cut) reconcile(ctx context.Context, cause error) (happened bool, err error) {
	c.o.Logger().Warn("the cut's outcome is unknown; asking QEMU", "error", cause)
	if c.guard != nil {
		thaw := c.guard.Close()
		if thaw != nil {
			c.thawUnresolved(thaw)
		}
		c.endFreeze(c.vm, c.guard, thaw)
		c.guard = nil
	}
	if c.req.Quiesce != QuiesceNone {
		c.notQuiesced("QEMU did not answer the cut: " + cause.Error())
	}
	for {
		if !discover.Same(c.run.proc.PID, c.run.proc.StartTime) {
			c.session = nil // an empty overlay equals its base: adopt them
			return true, nil
		}
		if s, err := c.vm.monitorOf(c.run); err == nil {
			if g, err := blockdev.ReadGraph(ctx, s); err == nil {
				c.session = s
				if c.inUse(g) {
					return true, nil
				}
				return false, fault.New(fault.Failed, "VM %s: QEMU did not take the cut, and its answer was lost: %w", c.vm.name(), cause)
			}
		}
		select {
		case <-c.stopping:
			return false, op.ErrLeave
		case <-time.After(askAgain):
		}
	}
}

// beforeReverts waits, after a failure, until QEMU answers or is gone: what
// takes the overlays back has a deadline, and would leave them behind a QEMU
// that hangs. The guest is thawed first.
func (c *cut) beforeReverts(ctx context.Context, cause error) error {
	ctx = context.WithoutCancel(ctx)
	if c.guard != nil {
		thaw := c.guard.Close()
		c.endFreeze(c.vm, c.guard, thaw)
		c.guard = nil
	}
	if err := c.awaitAnswer(ctx); err != nil {
		return err
	}
	return cause
}

// awaitAnswer waits until QEMU answers or is gone.
func (c *cut) awaitAnswer(ctx context.Context) error {
	for wait := askSoon; discover.Same(c.run.proc.PID, c.run.proc.StartTime); wait = min(2*wait, askAgain) {
		s, err := c.vm.monitorOf(c.run)
		if err == nil {
			_, err = s.QueryStatus(ctx)
		}
		if err == nil {
			return nil
		}
		select {
		case <-c.stopping:
			return op.ErrLeave
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(wait):
		}
	}
	return nil
}

// inUse reports whether the overlays are part of the VM's disks. QEMU takes all
// actions of a transaction or none.
func (c *cut) inUse(g *blockdev.Graph) bool {
	for _, d := range c.disks {
		n := g.Nodes[d.overlay().Node]
		if n == nil || n.Child("backing") == "" {
			return false
		}
	}
	return true
}
