package agent

import (
	"context"
	"errors"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/memdump"
	"github.com/vmsnap/vmsnap/monitor"
)

// memorySuffix ends the names of memory files.
const memorySuffix = ".mem"

// preflightMemory decides how the memory would be saved, and predicts what it
// takes.
func (a *Agent) preflightMemory(ctx context.Context, v *vm, s *monitor.Session, req SnapshotRequest, p *preflight) error {
	facts, err := memdump.Probe(ctx, s, p.run.proc.PID)
	if err != nil {
		return fault.New(kindOf(err), "VM %s: %w", v.name(), err)
	}
	choice, err := memdump.Choose(facts, memdump.Strategy(req.Strategy))
	if err != nil {
		p.refuse(memoryRefusal(v, err))
		return nil
	}
	for _, w := range choice.Warnings {
		p.warn(w.Code, "", "%s", w.Message)
	}
	c, err := p.run.configuration(ctx, s)
	if err != nil {
		return fault.New(fault.Unresponsive, "VM %s: %w", v.name(), err)
	}
	if why := c.unrestorable(); len(why) > 0 {
		p.warn(warnNotRestorable, "", "the memory could not be loaded again: %s", strings.Join(why, "; "))
	}
	if why := c.machine().Unstartable(); len(why) > 0 {
		p.warn(warnNeedsLauncher, "", "only the VM's own launcher can start a QEMU that loads the memory again (--launcher external): %s", strings.Join(why, "; "))
	}
	for _, d := range p.excluded {
		p.warn(warnNotRestorable, d.Device, "the memory goes with all disks, and disk %s is not in the snapshot", d.Device)
	}
	if len(p.disks) == 0 {
		return nil // refused already
	}
	recipient, refused := a.memoryRecipient()
	if refused != nil {
		p.refuse(refused.About(v.name()))
		return nil
	}
	p.memory = &memory{
		Dir: a.memoryDir(p.disks[0]), Strategy: choice.Strategy, Reason: choice.Reason, RAM: facts.RAM, Recipient: recipient,
		facts: facts, reserve: facts.Reserve(),
	}
	p.plan.Consistency = catalog.Memory
	if err := p.placeMemory(v); err != nil || req.MaxPause == 0 {
		return err // measuring how fast the guest changes its memory takes a while
	}
	return a.predictMemory(ctx, v, req, p)
}

// memoryDir is where the memory's file is made: beside the first disk's overlay,
// unless the configuration says otherwise.
func (a *Agent) memoryDir(d *cutDisk) string {
	if a.cfg.MemoryDir != "" {
		return a.cfg.MemoryDir
	}
	return filepath.Join(d.Prefix+d.OverlayDir, manifestDir)
}

func memoryRefusal(v *vm, err error) *fault.Error {
	kind := fault.Failed
	var unsuitable *memdump.UnsuitableError
	switch {
	case errors.Is(err, memdump.ErrBusy):
		kind = fault.Busy
	case errors.As(err, &unsuitable), errors.Is(err, memdump.ErrNotConverging):
		kind = fault.Unsupported
	}
	return fault.New(kind, "VM %s: its memory cannot be saved: %w", v.name(), err).
		WithHint("without --memory-strategy the best way that works is chosen; without --memory the disks alone are cut")
}

// placeMemory plans the file, and refuses what would not fit.
func (p *preflight) placeMemory(v *vm) error {
	m := p.memory
	free, err := freeIn(m.Dir)
	if err != nil {
		return fault.New(kindOf(err), "VM %s: %s: %w", v.name(), m.Dir, err)
	}
	p.plan.Memory = &PlanMemory{
		Strategy: MemoryStrategy(m.Strategy), Reason: m.Reason, Directory: m.Dir, Free: free, Reserve: m.reserve, RAM: m.RAM,
		Recipient: m.Recipient,
	}
	if free < m.reserve {
		p.refuse(fault.New(fault.NoSpace, "VM %s: its memory needs %d MiB set aside in %s, where %d MiB are free",
			v.name(), m.reserve>>20, m.Dir, free>>20).WithHint("free some space there, or configure memory-dir"))
	} else if m.Recipient != "" && free-m.reserve < m.reserve {
		p.refuse(fault.New(fault.NoSpace, "VM %s: its memory needs %d MiB set aside in %s and as much again to be encrypted, and %d MiB are free",
			v.name(), m.reserve>>20, m.Dir, free>>20).WithHint("free some space there, or configure memory-dir"))
	}
	return nil
}

// predictMemory measures and predicts, once, and refuses what would take too
// long.
func (a *Agent) predictMemory(ctx context.Context, v *vm, req SnapshotRequest, p *preflight) error {
	if p.memory == nil || p.plan.Memory.Duration > 0 {
		return nil
	}
	s, err := v.monitorOf(p.run)
	if err != nil {
		return err
	}
	rate, err := a.catalog.LastSaveRate(ctx, v.id)
	if err != nil {
		return err
	}
	predicted, err := memdump.Predict(ctx, s, p.memory.facts, memdump.Choice{Strategy: p.memory.Strategy}, rate)
	if err != nil {
		return fault.New(kindOf(err), "VM %s: %w", v.name(), err)
	}
	plan := p.plan.Memory
	plan.Bytes, plan.Duration, plan.Pause, plan.DirtyRate = predicted.Bytes, predicted.Duration, predicted.Pause, predicted.DirtyRate
	if req.MaxPause > 0 && predicted.Pause > req.MaxPause {
		p.refuse(fault.New(fault.Unsupported, "VM %s: its guest would stand still for about %s, and at most %s is allowed",
			v.name(), predicted.Pause, req.MaxPause).WithHint("raise --max-pause, or choose another --memory-strategy"))
	}
	return nil
}

// freeIn returns the bytes free where a directory is, or will be made.
func freeIn(dir string) (uint64, error) {
	var st unix.Statfs_t
	err := unix.Statfs(dir, &st)
	if errors.Is(err, unix.ENOENT) {
		err = unix.Statfs(filepath.Dir(dir), &st)
	}
	return st.Bavail * uint64(st.Bsize), err
}
