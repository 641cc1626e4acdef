package testvm

import (
	"context"
	"fmt"

	"github.com/vmsnap/vmsnap/internal/testvm/wire"
)

// StartCounter makes the guest count, as fast as its disks allow, in its memory
// and on the file system of each disk (O_DIRECT and fdatasync), and compare them
// before each step. Memory and disks that are not of one instant are found out
// by it when the guest runs on from them (Count).
func (g *Guest) StartCounter(ctx context.Context) error {
	_, err := g.call(ctx, wire.Request{Op: wire.OpStartCounter})
	return err
}

// Count returns how far the counter has come. It fails if memory and disks were
// found not to be of one instant, or a disk failed; the counter has ended then.
func (g *Guest) Count(ctx context.Context) (uint64, error) {
	reply, err := g.call(ctx, wire.Request{Op: wire.OpCount})
	return reply.Sequence, err
}

// Dirty makes the guest fill size bytes of its memory and change them at a rate
// in bytes per second, page by page, round and round, until it is called again.
// It returns when they are filled. A rate of 0 leaves the memory as it is, and a
// size of 0 gives it back.
func (g *Guest) Dirty(ctx context.Context, size, rate int64) error {
	_, err := g.call(ctx, wire.Request{Op: wire.OpDirty, Size: size, Rate: rate})
	return err
}

// Load kills QEMU if it still runs, and starts it by the same command line with
// -incoming defer and -S. load must have it load the guest's memory, by the QMP
// socket, and let it run. Load returns when the guest answers. Writers do not
// survive it.
func (g *Guest) Load(ctx context.Context, load func(context.Context) error) error {
	g.Kill()
	if err := g.load(ctx, load); err != nil {
		return fmt.Errorf("load guest %s: %w%s", g.Name, err, g.logs())
	}
	return nil
}

func (g *Guest) load(ctx context.Context, load func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, bootDeadline)
	defer cancel()
	p, err := startProcess(append(g.Args(), "-incoming", "defer", "-S"), g.path(qemuLog))
	if err != nil {
		return err
	}
	conn, err := dial(ctx, p, g.path(controlSocket))
	if err != nil {
		p.kill()
		return fmt.Errorf("connect to the guest: %w", err)
	}
	c := newControl(conn)
	err = load(ctx)
	if err == nil {
		_, err = c.call(ctx, wire.Request{Op: wire.OpExec, Command: "true"})
	}
	if err != nil {
		p.kill()
		c.close()
		return err
	}
	g.mu.Lock()
	g.process, g.control = p, c
	g.mu.Unlock()
	return nil
}

// Follow takes over a QEMU that another program has started with the guest's
// memory, in the place of the one before. Such a guest can be killed, but not
// restarted. Follow returns when the guest answers. Writers do not survive it.
func (g *Guest) Follow(ctx context.Context, pid int) error {
	ctx, cancel := context.WithTimeout(ctx, bootDeadline)
	defer cancel()
	p, err := adoptProcess(pid)
	if err != nil {
		return fmt.Errorf("follow guest %s: %w", g.Name, err)
	}
	conn, err := dial(ctx, p, g.path(controlSocket))
	if err != nil {
		return fmt.Errorf("follow guest %s: %w%s", g.Name, err, g.logs())
	}
	c := newControl(conn)
	if _, err := c.call(ctx, wire.Request{Op: wire.OpExec, Command: "true"}); err != nil {
		c.close()
		return fmt.Errorf("follow guest %s: %w%s", g.Name, err, g.logs())
	}
	g.mu.Lock()
	old := g.control
	g.process, g.control = p, c
	g.mu.Unlock()
	if old != nil {
		old.close()
	}
	return nil
}
