package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/memdump"
	"github.com/vmsnap/vmsnap/monitor"
)

// The journal entries of a snapshot with memory.
const (
	entryMemory  = "memory"  // the memory's file is about to be made, or QEMU's migration settings changed
	entryTracked = "tracked" // memory and disks are of one instant, and the guest runs
	entryDiscard = "discard" // the memory and the cut are about to be taken back
)

// memory is the part of a cut that saves what the guest has in its memory. Its
// exported fields are what the journal keeps.
type memory struct {
	Dir      string // of the file, as this process sees it
	Name     string // of the file
	Strategy memdump.Strategy
	Reason   string
	RAM      uint64 // bytes
	// Recipient is whom the file is encrypted to once it is saved; "" for none.
	Recipient string `json:",omitempty"`
	Settings  memdump.Settings
	Pause     memdump.Pause

	tracked   bool // memory and disks are of one instant
	discarded bool // it is being taken back
	facts     memdump.Facts
	reserve   uint64
	root      *os.Root
	file      *memdump.File
	guard     *memdump.PauseGuard
	save      *memdump.Save
	saved     *catalog.SavedMemory
}

func (m *memory) path() string { return filepath.Join(m.Dir, m.Name) }

// open opens the file's directory, and makes it if there is none. A link in its
// place is not followed to anywhere else.
func (m *memory) open() error {
	parent, err := os.OpenRoot(filepath.Dir(m.Dir))
	if err != nil {
		return err
	}
	defer func() { _ = parent.Close() }()
	base := filepath.Base(m.Dir)
	if err := parent.Mkdir(base, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	m.root, err = parent.OpenRoot(base)
	return err
}

// removeMemory removes the file, if there is one.
func (c *cut) removeMemory() error {
	m := c.memory
	if m.file != nil {
		return c.forgetPlain(m.file.Discard())
	}
	return c.forgetPlain(memdump.Remove(m.root, m.Name))
}

// prepareMemory makes everything that the pause needs, so that nothing of it
// happens while the guest stands still: the file with its space set aside, the
// guard that ends the pause when this process cannot, and QEMU's settings.
func (c *cut) prepareMemory(ctx context.Context) (err error) {
	m := c.memory
	m.Name = c.o.ID() + memorySuffix
	if err := m.open(); err != nil {
		return c.memoryFailed(err)
	}
	c.o.Cleanup(func() { _ = m.root.Close() })
	if err := c.o.Journal(ctx, entryMemory, m); err != nil {
		return err
	}
	c.o.Revert("remove the memory file "+m.Name, func(context.Context) error { return c.removeMemory() })
	if m.file, err = memdump.Create(m.root, m.Name, c.memoryHeader(), m.reserve); err != nil {
		return c.memoryFailed(err)
	}
	if err := c.startPauseGuard(ctx); err != nil {
		return c.memoryFailed(err)
	}
	run := c.run
	if m.Strategy == memdump.Background && !c.cfg.KeepPages {
		if err := run.huge.beforeSave(run.proc.PID); err != nil {
			c.o.Logger().Warn("huge pages cannot be counted, and will not be put back", "error", err)
		}
		c.o.Cleanup(func() { run.huge.afterSave(c, run.proc.PID) })
	}
	run.setSaving(true)
	c.o.Cleanup(func() { run.setSaving(false) })
	m.save, err = memdump.Prepare(ctx, memdump.Config{
		Session: c.session, Strategy: m.Strategy, Facts: m.facts, ID: c.o.ID(), Target: m.file.Target(), Guard: m.guard,
		PID: c.run.proc.PID, MaxPause: c.req.MaxPause,
		Note: func(s memdump.Settings) error {
			m.Settings = s
			return c.o.Journal(ctx, entryMemory, m)
		},
	})
	if err != nil {
		return c.memoryFailed(err)
	}
	c.o.Revert("put the migration settings back", c.closeSave)
	return nil
}

// startPauseGuard starts the process that lets the VM run when this one cannot.
func (c *cut) startPauseGuard(ctx context.Context) (err error) {
	var sockets []string
	for _, s := range c.run.proc.QMP {
		if addr, err := c.run.proc.Address(s); err == nil {
			sockets = append(sockets, addr)
		}
	}
	c.memory.guard, err = memdump.StartGuard(ctx, memdump.GuardConfig{
		Command: c.cfg.PauseGuard, Session: c.session, Sockets: sockets, VM: c.vm.name(),
		PID: c.run.proc.PID, StartTime: c.run.proc.StartTime,
		Resumed: c.resumedPath(), Log: c.o.Logger(),
	})
	if err != nil {
		return err
	}
	c.o.Cleanup(func() {
		if err := c.memory.guard.Close(); err != nil {
			c.o.Logger().Warn("pause guard", "error", err)
		}
		_ = os.Remove(c.resumedPath()) // only recovery reads it, and there will be none
	})
	return nil
}

func (c *cut) memoryHeader() memdump.Header {
	return memdump.Header{
		VM: c.vm.name(), Snapshot: c.req.Name, Operation: c.o.ID(), QEMU: c.captured.QEMUVersion,
		Machine: c.captured.MachineType, RAM: c.memory.RAM, Created: time.Now(), Strategy: c.memory.Strategy,
		Recipient: c.memory.Recipient,
	}
}

// memoryFailed gives an error about the memory a kind and the words an operator
// needs.
func (c *cut) memoryFailed(err error) error {
	return fault.New(kindOf(err), "VM %s: memory file %s: %w", c.vm.name(), c.memory.path(), err)
}

// transactWithMemory is transact for a guest that stands still meanwhile, until
// its memory is, or is certain to become, that of the same instant.
func (c *cut) transactWithMemory(ctx context.Context) error {
	m := c.memory
	if c.guard == nil {
		if err := c.announce(ctx); err != nil {
			return err
		}
		// Stopping the CPUs flushes every image: what is left to write then is part
		// of the pause. A frozen guest has had it written.
		for _, d := range c.disks {
			if err := d.syncBase(); err != nil {
				return c.failure(d, err)
			}
		}
	}
	pause, err := m.save.Cut(ctx, c.send, c.memoryProgress)
	m.Pause = pause
	if pause.Length > 0 && c.cfg.OnPause != nil {
		c.cfg.OnPause(pause.Length)
	}
	if err != nil {
		return c.memoryFailed(err)
	}
	if c.req.MaxPause > 0 && pause.Length > c.req.MaxPause {
		c.warn(warnPauseExceeded, "", "the guest stood still for "+pause.Length.String()+", longer than the "+c.req.MaxPause.String()+" allowed")
	}
	return nil
}

func (c *cut) memoryProgress(p memdump.Progress) {
	c.o.ProgressOfPass(p.Pass, p.Done, p.Total, "bytes")
}

// finishWithMemory follows a cut of which the memory is still being written. A
// failure or a cancel from here on takes the cut back, by merging.
func (c *cut) finishWithMemory(ctx context.Context) error {
	if c.req.Quiesce == QuiesceRequire && c.quiesce.Reason != "" {
		return fault.New(fault.NotQuiesced, "VM %s was cut, but not while the guest was frozen (%s)", c.vm.name(), c.quiesce.Reason)
	}
	if err := c.o.Journal(ctx, entryTracked, c.memory); err != nil {
		return err
	}
	// A cut that is settled for some disks only could not be merged back.
	if err := c.o.Step(context.WithoutCancel(ctx), "settle", c.untilDone(c.settleOnce)); err != nil {
		return err
	}
	c.hooks.after(ctx)
	if err := c.o.Step(ctx, "memory", c.saveMemory); err != nil {
		return err
	}
	if err := c.packMemory(ctx); err != nil {
		return err
	}
	if err := c.o.PointOfNoReturn(); err != nil {
		return err
	}
	c.o.DropReverts()
	ctx = context.WithoutCancel(ctx)
	if err := c.o.Step(ctx, "commit", c.untilDone(c.commit)); err != nil {
		return err
	}
	c.ended(ctx)
	return nil
}

// settleOnce settles, and remembers that it has.
func (c *cut) settleOnce(ctx context.Context) error {
	if c.settled {
		return nil
	}
	err := c.settle(ctx)
	c.settled = err == nil
	return err
}

// saveMemory waits until QEMU has written all, while the file is hashed and kept
// from filling the page cache.
func (c *cut) saveMemory(ctx context.Context) error {
	m := c.memory
	following, stop := context.WithCancel(ctx)
	followed := make(chan error, 1)
	go func() { followed <- m.file.Follow(following) }()
	err := c.untilSaved(ctx)
	stop()
	err = errors.Join(err, <-followed)
	if err != nil {
		return err
	}
	sum, err := m.file.Finish(ctx)
	if err != nil {
		return c.memoryFailed(err)
	}
	m.saved = &catalog.SavedMemory{
		Path: m.path(), Strategy: string(m.Strategy), Reason: m.Reason, Size: memdump.HeaderSize + sum.Stored, StreamSize: sum.Length,
		Checksum: sum.StoredChecksum, RAM: m.RAM, Pause: m.Pause.Length, Duration: time.Since(c.cutAt),
	}
	return c.closeSave(ctx)
}

// untilSaved waits for QEMU, or leaves it to the next daemon: QEMU goes on
// writing without us.
func (c *cut) untilSaved(ctx context.Context) error {
	ctx, stop := c.leaving(ctx)
	defer stop()
	err := c.memory.save.Wait(ctx, c.memoryProgress)
	if cause := context.Cause(ctx); err != nil && cause != nil {
		return cause
	}
	if err != nil {
		return c.memoryFailed(err)
	}
	return nil
}

// leaving returns a context that ends with op.ErrLeave when the agent stops.
func (a *Agent) leaving(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, leave := context.WithCancelCause(ctx)
	go func() {
		select {
		case <-a.stopping:
			leave(op.ErrLeave)
		case <-ctx.Done():
		}
	}()
	return ctx, func() { leave(nil) }
}

// closeSave puts the migration settings back. The session may be another one
// than at the cut.
func (c *cut) closeSave(ctx context.Context) error {
	err := c.memory.save.Close(ctx)
	if !errors.Is(err, monitor.ErrGone) {
		return err
	}
	if err := c.awaitAnswer(ctx); err != nil {
		return err
	}
	s, err := c.vm.monitorOf(c.run)
	if err != nil {
		return nil //nolint:nilerr // QEMU is gone, and its settings with it
	}
	return c.memory.Settings.Restore(ctx, s)
}

// packMemory compresses and encrypts the file, as far as it is to be.
func (c *cut) packMemory(ctx context.Context) error {
	switch {
	case c.memory.Recipient != "":
		return c.o.Step(ctx, "encrypt", c.encryptMemory)
	case c.req.Compress:
		return c.o.Step(ctx, "compress", c.compressMemory)
	}
	return nil
}

// encryptMemory replaces the file by an encrypted one, and destroys the plain one.
// It compresses in the same pass: what is encrypted cannot be made smaller.
func (c *cut) encryptMemory(ctx context.Context) error {
	m := c.memory
	sum, err := memdump.Encrypt(ctx, m.root, m.Name, c.req.Compress, func(done, total uint64) { c.o.Progress(done, total, "bytes") })
	if errors.Is(err, memdump.ErrNotOverwritten) {
		c.warn(warnPlainOnDisk, "", "what was saved before it was encrypted may be on the disk still: "+err.Error())
		err = nil
	}
	if err != nil {
		return c.memoryFailed(err)
	}
	m.saved.Size, m.saved.Checksum = memdump.HeaderSize+sum.Stored, sum.StoredChecksum
	m.saved.Compressed, m.saved.Recipient = c.req.Compress, m.Recipient
	return nil
}

// compressMemory replaces the file by a compressed one. QEMU has nothing to do
// with it, so that it cannot be slowed down.
func (c *cut) compressMemory(ctx context.Context) error {
	m := c.memory
	sum, err := memdump.Compress(ctx, m.root, m.Name, func(done, total uint64) { c.o.Progress(done, total, "bytes") })
	if err != nil {
		return c.memoryFailed(err)
	}
	m.saved.Size, m.saved.Checksum, m.saved.Compressed = memdump.HeaderSize+sum.Stored, sum.StoredChecksum, true
	return nil
}
