package agent

import (
	"context"
	"time"

	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
)

// finish settles and commits what was cut, and lets the hooks know of the thaw as
// soon as a host that goes down loses nothing any more. The disks run on the overlays by
// now, and only the operation's journal knows of them: an operation that ended
// here would leave layers that no snapshot accounts for. So what fails, by a
// full disk for example, is tried again until it works, or until the agent
// stops, which leaves it to the recovery of the next.
func (c *cut) finish(ctx context.Context) error {
	if err := c.o.Step(ctx, "settle", c.untilDone(c.settle)); err != nil {
		return err
	}
	c.hooks.after(ctx)
	return c.o.Step(ctx, "commit", c.untilDone(c.commit))
}

// untilDone tries f until it works. What has a kind that another attempt would
// only repeat is returned: commit has recorded the layers then.
func (c *cut) untilDone(f func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		for told := false; ; told = true {
			err := f(ctx)
			if err == nil || fault.Of(err) == fault.NotQuiesced || fault.Of(err) == fault.Exists {
				return err
			}
			c.o.Logger().Error("the snapshot cannot be finished yet", "error", err)
			if !told { // the log has the rest: this may go on for hours
				c.warn(warnNotSettled, "", "the disks are cut; what comes after is tried again each second: "+err.Error())
			}
			select {
			case <-c.stopping:
				return op.ErrLeave
			case <-time.After(askAgain):
			}
		}
	}
}
