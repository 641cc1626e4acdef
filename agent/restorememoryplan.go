package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/launch"
	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/memdump"
	"github.com/vmsnap/vmsnap/monitor"
)

// RestorePlanMemory is what a restore would do with memory.
type RestorePlanMemory struct {
	Path     string // of the file that is loaded
	Size     uint64 // bytes
	Launcher launch.Kind
	Runs     bool   // the guest runs afterwards; else the VM is paused, as it was
	Saved    string // where the memory of the running guest is saved before; empty when it is not
	Reserve  uint64 // bytes that are set aside for that
}

// planRestoreMemory looks at everything that a restore with memory depends on. The
// disks are restored offline, whether the VM runs or not.
func (a *Agent) planRestoreMemory(ctx context.Context, v *vm, s catalog.Snapshot, all []chosen, req RestoreRequest, p *restorePlan) error {
	captured, err := startsFrom(v, s, req)
	if err != nil {
		return err
	}
	if err := a.planRestoreStopped(ctx, v, all, p); err != nil {
		return err
	}
	p.load = &memoryRestore{Runs: !captured.Paused, Anew: req.Anew, Frozen: s.Quiesce.Frozen > 0}
	p.restore.Memory = &RestorePlanMemory{Runs: p.load.Runs}
	if req.Anew != AnewStays {
		if err := p.launchesWhatItHad(v, captured); err != nil {
			return err
		}
	}
	if req.Memory {
		p.load.Path = s.Memory.Path
		p.restore.Memory.Path, p.restore.Memory.Size = s.Memory.Path, s.Memory.Size
		if err := a.inspectMemory(s); err != nil {
			p.refuse(err)
		}
	}
	if p.live {
		if err := a.planFormer(ctx, v, req, p); err != nil {
			return err
		}
	}
	return a.planLaunch(ctx, v, captured, req, p)
}

// startsFrom returns the configuration that QEMU is started with.
func startsFrom(v *vm, s catalog.Snapshot, req RestoreRequest) (c configuration, err error) {
	if req.Memory {
		return wholeWithMemory(v, s, req)
	}
	if err := json.Unmarshal(s.Config, &c); err != nil {
		return c, fault.New(fault.Failed, "the configuration of VM %s: %w", v.name(), err)
	}
	return c, nil
}

// wholeWithMemory returns the configuration of a snapshot whose memory and disks
// are all to be restored: they are of one instant.
func wholeWithMemory(v *vm, s catalog.Snapshot, req RestoreRequest) (c configuration, err error) {
	name := v.name() + "/" + s.Name
	if s.Memory == nil {
		return c, fault.New(fault.Unsupported, "snapshot %s has no memory", name).WithHint("without --memory its disks are restored")
	}
	if len(req.Disks) > 0 || len(req.Exclude) > 0 {
		return c, fault.New(fault.Usage, "the memory of %s goes only with all of its disks, and with those of no other snapshot: guest and disks would not fit together", name).
			WithHint("leave out --disk and --exclude, or --memory")
	}
	for _, d := range s.Disks {
		if d.Excluded {
			return c, fault.New(fault.Unsupported, "the memory of %s cannot be loaded: disk %s is not in the snapshot, and has been written to since", name, d.Device)
		}
	}
	if err := json.Unmarshal(s.Config, &c); err != nil {
		return c, fault.New(fault.Failed, "the configuration of %s: %w", name, err)
	}
	if ids := c.plugged(); len(ids) > 0 {
		return c, fault.New(fault.Unsupported, "the memory of %s cannot be loaded: %s was plugged in after the start of QEMU, and is not in the launch command", name, strings.Join(ids, ", ")).
			WithHint("without --memory its disks are restored")
	}
	return c, nil
}

// inspectMemory returns why a snapshot's memory file cannot be loaded, or nil, by
// its header and the key that it needs. All of it is read before anything is done.
func (a *Agent) inspectMemory(s catalog.Snapshot) *fault.Error {
	name := s.VMName + "/" + s.Name
	root, err := openMemoryDir(filepath.Dir(s.Memory.Path))
	if err == nil {
		_, err = a.keyFor(root, s.Memory.Path)
		err = errors.Join(err, root.Close())
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fault.New(fault.NotFound, "snapshot %s: its memory file %s is gone", name, s.Memory.Path).WithHint("without --memory its disks are restored")
	case err != nil:
		return fault.New(kindOf(err), "snapshot %s: %w", name, err).WithHint("without --memory its disks are restored")
	}
	return nil
}

// launchesWhatItHad refuses disks that the launch command of the snapshot would
// not find.
func (p *restorePlan) launchesWhatItHad(v *vm, c configuration) error {
	proc, err := discover.ParseCommandLine(c.Command)
	if err != nil {
		return fault.New(fault.Failed, "VM %s: the launch command of the snapshot: %w", v.name(), err)
	}
	proc.Cwd = c.Directory
	for _, d := range p.disks {
		if d.Settle != SettleLive {
			p.refuse(fault.New(fault.Unsupported, "VM %s: disk %s: memory cannot be restored with a disk that is launched as raw, or is a block device", v.name(), d.Device))
			continue
		}
		path := d.dir.Path(d.Launch)
		if !slices.ContainsFunc(proc.Drives, func(l discover.Drive) bool { return l.File != "" && sameLaunch(absolute(proc, l.File), path) }) {
			p.refuse(fault.New(fault.Unsupported, "VM %s: disk %s: its launch path is %s now, and the launch command of the snapshot does not open that", v.name(), d.Device, path))
		}
	}
	return nil
}

// sameLaunch reports whether two paths are the same, or lead to the same file.
func sameLaunch(a, b string) bool {
	if a == b {
		return true
	}
	x, err := blockdev.StatPath(a)
	if err != nil {
		return false
	}
	y, err := blockdev.StatPath(b)
	return err == nil && x.FileID == y.FileID
}

// planFormer plans what becomes of the running VM: its memory is saved, so that it
// can come back.
func (a *Agent) planFormer(ctx context.Context, v *vm, req RestoreRequest, p *restorePlan) error {
	s, err := v.monitorOf(p.run)
	if err != nil {
		return err
	}
	if err := notMigrating(ctx, v, s); err != nil {
		return err
	}
	st, err := s.QueryStatus(ctx)
	if err != nil {
		return fault.New(fault.Unresponsive, "VM %s: %w", v.name(), err)
	}
	if err := a.planFormerDisks(ctx, v, s, p); err != nil {
		return err
	}
	p.load.Former = &formerRun{PID: p.run.proc.PID, StartTime: p.run.proc.StartTime, Ran: st.Status == monitor.RunStateRunning}
	if req.NoSafety || len(p.disks) == 0 {
		return nil
	}
	c, err := p.run.configuration(ctx, s)
	if err != nil {
		return fault.New(fault.Unresponsive, "VM %s: %w", v.name(), err)
	}
	if ids := c.plugged(); len(ids) > 0 {
		p.refuse(fault.New(fault.Unsupported, "VM %s: its present state could not come back with its memory: %s was plugged in after the start of QEMU, and is not in the launch command",
			v.name(), strings.Join(ids, ", ")).WithHint("unplug it, or give the present state up: %s", req.givesUp()))
		return nil
	}
	recipient, refused := a.memoryRecipient()
	if refused != nil {
		p.refuse(refused.About(v.name()).WithHint("put the key right, or give the present state up: %s", req.givesUp()))
		return nil
	}
	facts, err := memdump.Probe(ctx, s, p.run.proc.PID)
	if err != nil {
		return fault.New(kindOf(err), "VM %s: %w", v.name(), err)
	}
	if _, err := memdump.Choose(facts, memdump.Stopped); err != nil {
		p.refuse(memoryRefusal(v, err).WithHint("%s gives the present state up", req.givesUp()))
		return nil
	}
	p.memory = &memory{
		Dir: a.memoryDir(p.disks[0]), Strategy: memdump.Stopped, Reason: "the guest is stopped for the restore", RAM: facts.RAM,
		Recipient: recipient,
		facts:     facts, reserve: facts.Reserve(),
	}
	p.restore.Memory.Saved, p.restore.Memory.Reserve = p.memory.Dir, p.memory.reserve
	return p.placeMemory(v)
}

// planFormerDisks refuses disks that QEMU does not run on as the catalog knows
// them, and notes those that the snapshot does not know.
func (a *Agent) planFormerDisks(ctx context.Context, v *vm, s *monitor.Session, p *restorePlan) error {
	g, err := blockdev.ReadGraph(ctx, s)
	if err != nil {
		return fault.New(fault.Unresponsive, "VM %s: %w", v.name(), err)
	}
	for _, d := range a.liveDisks(ctx, v, p.run, g, true) {
		job := g.Job(d.drive)
		switch {
		case d.reason != "":
			p.refuse(fault.New(fault.Unsupported, "VM %s: disk %s: %s", v.name(), d.drive.Device, d.reason))
		case job != "":
			p.refuse(fault.New(fault.Busy, "VM %s: disk %s: QEMU's block job %s is working on it", v.name(), d.drive.Device, job))
		case !p.restores(d.rec.ID):
			p.excluded = append(p.excluded, catalog.SnapshotDisk{DiskID: d.rec.ID, Device: d.rec.Device, Size: d.virtualSize(), Excluded: true})
			p.warn(warnExcluded, d.rec.Device, "the snapshot is older than disk %s: its file stays as it is, and the restored VM does without it", d.rec.Device)
		}
	}
	return nil
}

// planLaunch chooses who starts the new QEMU, and the one that would bring the
// present state back.
func (a *Agent) planLaunch(ctx context.Context, v *vm, captured configuration, req RestoreRequest, p *restorePlan) error {
	pid, now := 0, captured
	v.mu.Lock()
	now.Unit = cmp.Or(v.rec.Unit, now.Unit)
	v.mu.Unlock()
	if p.live {
		s, err := v.monitorOf(p.run)
		if err != nil {
			return err
		}
		if now, err = p.run.configuration(ctx, s); err != nil {
			return fault.New(fault.Unresponsive, "VM %s: %w", v.name(), err)
		}
		pid = p.run.proc.PID
	}
	want := req.Launcher
	if want == launch.Automatic {
		want = a.cfg.Launcher
	}
	kind, err := launch.Choose(ctx, now.machine(), want, pid)
	if err == nil && kind != launch.External {
		if why := captured.machine().Unstartable(); len(why) > 0 {
			_, err = launch.Choose(ctx, captured.machine(), want, 0)
		}
	}
	if refused, ok := errors.AsType[*fault.Error](err); ok {
		p.refuse(fault.New(refused.Kind, "VM %s: %s", v.name(), refused.Message).WithHint("%s", refused.Hint))
		return nil
	} else if err != nil {
		return err
	}
	p.restore.Memory.Launcher = kind
	if req.Anew == AnewStays {
		captured = now // only for coming back
	}
	machine := captured.machine()
	machine.Unit, machine.Slice = now.Unit, now.Slice // where the VM lives by now
	p.order = launch.Order{Machine: machine, Launcher: kind, VM: v.name(), UUID: captured.UUID, LogDir: a.cfg.StateDir}
	p.back = p.order
	p.back.Machine = now.machine()
	return nil
}

// specify makes the specifications of what is started, which are named by the
// operation.
func (p *restorePlan) specify(operation string) (err error) {
	p.order.Operation, p.back.Operation = operation, operation
	if p.load.Anew == AnewBoots {
		p.order.Boots, p.order.Halted = true, true
	}
	if p.load.Anew != AnewStays {
		if p.load.New, err = launch.New(p.order); err != nil {
			return err
		}
	}
	f := p.load.Former
	if f == nil {
		return nil
	}
	if f.Waits, err = launch.New(p.back); err != nil {
		return err
	}
	p.back.Boots = true
	f.Boots, err = launch.New(p.back)
	return err
}
