package agent

import (
	"context"
	"errors"
	"sync"

	"github.com/vmsnap/vmsnap/memdump"
)

// hugePages puts back what tracking writes does to the memory of one QEMU: the
// guest runs on small pages afterwards, which is slower, and makes the pause of
// the next save longer. It works in the background, and stops for a save.
type hugePages struct {
	mu     sync.Mutex
	before memdump.HugePages // the most that there was before a save
	stop   context.CancelFunc
	ended  chan struct{} // closed when nothing is being put back; nil before the first time
}

// beforeSave ends what is still being put back, and notes what there is: the
// guest may have got more since the last save, and not yet all of it back.
func (h *hugePages) beforeSave(pid int) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ended != nil {
		h.stop()
		<-h.ended
	}
	now, err := memdump.QueryHugePages(pid)
	if err == nil {
		h.before = h.before.Most(now)
	}
	return err
}

// afterSave begins to put back what is missing.
func (h *hugePages) afterSave(c *cut, pid int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.before.Bytes() == 0 {
		return
	}
	ctx, stop := c.leaving(context.Background())
	ended := make(chan struct{})
	h.stop, h.ended = stop, ended
	log, before := c.o.Logger(), h.before
	c.group.Go(func() {
		defer close(ended)
		defer stop()
		r, err := memdump.Collapse(ctx, pid, memdump.CollapseOptions{Before: before})
		if err != nil && ctx.Err() == nil && !errors.Is(err, memdump.ErrQEMUEnded) {
			log.Warn("the guest's huge pages are not put back", "error", err)
			return
		}
		log.Info("huge pages put back", "before", r.Before, "found", r.Found, "now", r.After, "cpu", r.CPU, "took", r.Elapsed)
	})
}
