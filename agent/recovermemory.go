package agent

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"

	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/memdump"
	"github.com/vmsnap/vmsnap/monitor"
)

// loadMemory brings the memory of a cut back from its journal.
func (c *cut) loadMemory(entries []op.Entry) error {
	for _, e := range entries {
		switch e.Kind {
		case entryMemory, entryTracked:
			m := &memory{}
			if err := json.Unmarshal(e.Data, m); err != nil {
				return err
			}
			c.memory = m
			m.tracked = e.Kind == entryTracked
		case entryDiscard:
			if c.memory != nil { // else it was a member's of a group
				c.memory.discarded = true
			}
		}
	}
	if c.memory == nil {
		return nil
	}
	if err := c.memory.open(); err != nil {
		return err
	}
	c.o.Cleanup(func() { _ = c.memory.root.Close() })
	return nil
}

// recoverMemory brings a snapshot with memory to its end, whose agent is gone.
// QEMU writes on by itself, so what was certain to become the memory of the
// cut's instant is waited for. Anything else is taken back.
func (c *cut) recoverMemory(ctx context.Context, last prepared, sent bool) error {
	m := c.memory
	if c.run != nil {
		if err := c.resumeLeft(ctx, sent); err != nil {
			return err
		}
		c.run.setSaving(true)
		c.o.Cleanup(func() { c.run.setSaving(false) })
	}
	happened := m.discarded
	if sent && !happened {
		var err error
		if happened, err = c.happened(ctx, last); err != nil {
			return err
		}
	}
	if !happened {
		return errors.Join(c.o.Step(ctx, "take back", func(ctx context.Context) error {
			return errors.Join(c.dropMemory(ctx), c.takeBack(ctx))
		}), errInterrupted())
	}
	c.done = true
	c.o.RevertAtLength("merge the overlays back", c.mergeBack)
	c.o.RevertAtLength("discard the memory", c.discardMemory)
	if !m.tracked || m.discarded || c.run == nil {
		return errInterrupted()
	}
	if err := c.adoptMemory(ctx); err != nil {
		return err
	}
	c.warn(warnAdopted, "", "vmsnapd ended while the memory was saved; the snapshot was completed when it came back")
	return c.finishWithMemory(ctx)
}

// resumeLeft lets a guest run that was paused for the cut, unless the guard has
// seen to it.
func (c *cut) resumeLeft(ctx context.Context, sent bool) error {
	m := c.memory
	if !sent || m.tracked || m.discarded || !m.Settings.Running {
		return nil
	}
	if _, err := os.Stat(c.resumedPath()); err == nil {
		return nil
	}
	if _, err := memdump.Resume(ctx, c.session); err != nil {
		return fault.New(fault.Unresponsive, "VM %s may stand still: %w", c.vm.name(), err)
	}
	return nil
}

// resumedPath is where the pause guard leaves word that it has resumed the VM.
func (c *cut) resumedPath() string {
	return filepath.Join(c.cfg.StateDir, "resumed-"+c.o.ID())
}

// adoptMemory takes over the save that QEMU is at.
func (c *cut) adoptMemory(ctx context.Context) (err error) {
	m := c.memory
	if m.file, err = memdump.Reopen(m.root, m.Name); err != nil {
		return c.memoryFailed(err)
	}
	m.save, err = memdump.Adopt(ctx, c.session, m.Settings, m.Strategy)
	if err != nil {
		return c.memoryFailed(err)
	}
	return nil
}

// discardMemory gives the memory of a cut up that has happened.
func (c *cut) discardMemory(ctx context.Context) error {
	if err := c.o.Journal(ctx, entryDiscard, struct{}{}); err != nil {
		return err
	}
	return c.dropMemory(ctx)
}

// dropMemory ends the save, puts the migration settings back and removes the
// file.
func (c *cut) dropMemory(ctx context.Context) error {
	if err := c.endSave(ctx); err != nil {
		return err
	}
	if err := c.removeMemory(); err != nil {
		return err
	}
	if err := os.Remove(c.resumedPath()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// endSave ends what QEMU is writing. Before 8.1 it must be let come to its end.
func (c *cut) endSave(ctx context.Context) error {
	m := c.memory
	ctx, stop := c.leaving(ctx)
	defer stop()
	for {
		err := c.tryEndSave(ctx)
		if !errors.Is(err, monitor.ErrGone) {
			if cause := context.Cause(ctx); err != nil && cause != nil {
				return cause
			}
			return err
		}
		// The guard has closed the connection, or QEMU has ended.
		if err := c.awaitAnswer(ctx); err != nil {
			return err
		}
		s, err := c.vm.monitorOf(c.run)
		if err != nil {
			return nil //nolint:nilerr // QEMU is gone, and what it was writing with it
		}
		c.session = s
		if m.save, err = memdump.Adopt(ctx, s, m.Settings, m.Strategy); err != nil {
			return err
		}
	}
}

func (c *cut) tryEndSave(ctx context.Context) (err error) {
	m := c.memory
	if c.run == nil {
		return nil
	}
	if m.save == nil {
		if m.save, err = memdump.Adopt(ctx, c.session, m.Settings, m.Strategy); err != nil {
			return err
		}
	}
	if err := m.save.Cancel(ctx, c.memoryProgress); err != nil {
		return err
	}
	return m.save.Close(ctx)
}
