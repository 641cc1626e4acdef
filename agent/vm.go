package agent

import (
	"context"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
)

// vm is what the agent holds of one virtual machine.
type vm struct {
	id string // the catalog's; never changes

	mu     sync.Mutex
	rec    catalog.VM
	disks  []catalog.Disk  // as of the last change
	layers []catalog.Layer // of all disks
	runs   []*run          // QEMU processes of this identity; more than one is a problem
	freeze *FreezeView     // set while the agent holds the guest frozen
	held   *held           // set while an operator's freeze stands
	counts int             // snapshots
	stray  map[string]bool // disks that were seen to run on a covered layer, by id

	stats fileStats
	rooms roomStats
	space spaceMeter
	whole wholeImages

	// changing is held for writing while layers are made or moved, so that
	// nobody takes a half-finished change for the state of the disks.
	changing sync.RWMutex
	// cpus is held while calm is looked at or changed: whether the operation that
	// holds changing leaves it to others whether the guest runs.
	cpus sync.Mutex
	calm bool
	// registering is held while disks seen are matched with those known, so that
	// two that look at a new disk at the same time do not both record it.
	registering sync.Mutex
	// reloading is held from reading the catalog until what was read is cached,
	// so that an older reading never replaces a newer one.
	reloading sync.Mutex
	// unfinished is set, and changing held, from the agent's start until its
	// recovery has dealt with the VM.
	unfinished atomic.Bool
}

// strayed remembers that the VM has run on a layer that another one covers.
func (v *vm) strayed(diskID string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.stray == nil {
		v.stray = map[string]bool{}
	}
	v.stray[diskID] = true
}

// hasStrayed reports whether the VM was seen to do so.
func (v *vm) hasStrayed(diskID string) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.stray[diskID]
}

// identity says what a process's VM is identified by: its UUID when it has
// one, else its name, else the path of its first disk.
func identity(p discover.Process) string {
	if p.UUID != "" {
		return "uuid:" + p.UUID
	}
	if p.Name != "" {
		return "name:" + p.Name
	}
	for _, d := range p.Drives {
		if d.File != "" && !d.CDROM && !d.ReadOnly {
			return "path:" + absolute(p, d.File)
		}
	}
	return "path:" + p.Binary
}

func displayName(p discover.Process) string {
	if p.Name != "" {
		return p.Name
	}
	if p.UUID != "" {
		return p.UUID
	}
	for _, d := range p.Drives {
		if d.File != "" && !d.CDROM && !d.ReadOnly {
			base := filepath.Base(d.File)
			return base[:len(base)-len(filepath.Ext(base))]
		}
	}
	return filepath.Base(p.Binary)
}

func absolute(p discover.Process, path string) string {
	if filepath.IsAbs(path) || p.Cwd == "" {
		return filepath.Clean(path)
	}
	return filepath.Join(p.Cwd, path)
}

// loadCatalog brings back the VMs that were seen before.
func (a *Agent) loadCatalog(ctx context.Context) error {
	recs, err := a.catalog.VMs(ctx)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	unfinished := map[string]bool{}
	ops, err := a.catalog.Operations(ctx, op.Filter{Active: true})
	if err != nil {
		return err
	}
	for _, o := range ops {
		unfinished[o.VMID] = true
	}
	for _, rec := range recs {
		if rec.Stopped != endedByMigration {
			rec.Stopped = "" // nobody watched since: it may have run and stopped again
		}
		v := &vm{id: rec.ID, rec: rec}
		if unfinished[rec.ID] {
			v.unfinished.Store(true)
			v.changing.Lock()
		}
		if err := a.reload(ctx, v); err != nil {
			return err
		}
		a.vms[rec.ID] = v
	}
	return nil
}

// reload brings what is cached of a VM's disks up to the catalog.
func (a *Agent) reload(ctx context.Context, v *vm) error {
	v.reloading.Lock()
	defer v.reloading.Unlock()
	id := v.id
	disks, err := a.catalog.Disks(ctx, id)
	if err != nil {
		return err
	}
	layers, err := a.catalog.Layers(ctx, id)
	if err != nil {
		return err
	}
	snapshots, err := a.catalog.CountSnapshots(ctx, id)
	if err != nil {
		return err
	}
	v.mu.Lock()
	v.disks, v.layers, v.counts = disks, layers, snapshots
	v.mu.Unlock()
	v.space.outdate()
	return nil
}

// started takes QEMU processes in. They are recorded together: each commit waits for
// the disk, and a host may have many.
func (a *Agent) started(ctx context.Context, processes ...discover.Process) {
	var managed []discover.Process
	var vms []catalog.VM
	now := time.Now()
	for _, p := range processes {
		p, ours := a.describe(p)
		if !ours {
			a.log.Debug("a QEMU process is left alone", "vm", displayName(p), "pid", p.PID)
			continue
		}
		managed = append(managed, p)
		vms = append(vms, catalog.VM{
			Name: displayName(p), UUID: p.UUID, Identity: identity(p), Unit: p.Cgroup.Unit,
			FirstSeen: now, LastSeen: now, Command: p.Args,
		})
	}
	if len(vms) == 0 {
		return
	}
	a.recording.Lock()
	defer a.recording.Unlock()
	recs, err := a.catalog.UpsertVMs(ctx, vms)
	for i, p := range managed {
		if err != nil {
			a.log.Error("a VM that started cannot be recorded", "vm", displayName(p), "pid", p.PID, "error", err)
			continue
		}
		a.joined(ctx, recs[i], p)
	}
}

// joined gives a process to its VM, and follows it.
func (a *Agent) joined(ctx context.Context, rec catalog.VM, p discover.Process) {
	a.mu.Lock()
	v, known := a.vms[rec.ID], true
	if v == nil {
		v, known = &vm{id: rec.ID, rec: rec}, false
		a.vms[rec.ID] = v
	}
	a.mu.Unlock()
	r := newRun(p)
	runCtx, cancel := context.WithCancel(ctx)
	r.cancel = cancel
	v.mu.Lock()
	before := v.rec
	v.rec = rec
	v.runs = append(v.runs, r)
	v.mu.Unlock()
	a.tellRun(before, known, rec, p)
	a.scheduler.wake()
	a.log.Info("VM started", "vm", rec.Name, "pid", p.PID, "unit", p.Cgroup.Unit)
	a.group.Go(func() { a.follow(runCtx, v, r) })
}

// exited lets a QEMU process go and records how it ended.
func (a *Agent) exited(ctx context.Context, p discover.Process) {
	v, r := a.runOf(p)
	if r == nil {
		return
	}
	a.group.Go(func() {
		// The session has read what QEMU said last before it reports the end.
		how := r.awaitEnd(ctx)
		r.cancel()
		a.ended(ctx, v, r, how)
	})
}

// ended takes a process off its VM, and settles the VM when no other process of
// it runs.
func (a *Agent) ended(ctx context.Context, v *vm, r *run, how string) {
	if a.takeOff(ctx, v, r, how) {
		a.dropDetached(context.WithoutCancel(ctx), v, nil)
		a.settleStopped(ctx, v)
	}
}

// takeOff takes a process off its VM. When it was the last it records how the
// VM stopped.
func (a *Agent) takeOff(ctx context.Context, v *vm, r *run, how string) (last bool) {
	a.recording.Lock()
	defer a.recording.Unlock()
	v.mu.Lock()
	v.runs = slices.DeleteFunc(v.runs, func(other *run) bool { return other == r })
	v.rec.LastSeen = time.Now()
	last = len(v.runs) == 0
	if last {
		v.rec.Stopped = how
	}
	rec := v.rec
	v.mu.Unlock()
	a.log.Info("VM stopped", "vm", rec.Name, "pid", r.proc.PID, "how", how)
	a.tellStop(rec, r.proc.PID, how)
	if !last {
		return false
	}
	if _, err := a.catalog.UpsertVM(context.WithoutCancel(ctx), rec); err != nil {
		a.log.Error("the end of a VM cannot be recorded", "vm", rec.Name, "error", err)
	}
	return true
}

func (a *Agent) runOf(p discover.Process) (*vm, *run) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	for _, v := range a.vms {
		v.mu.Lock()
		for _, r := range v.runs {
			if r.proc.PID == p.PID && r.proc.StartTime == p.StartTime {
				v.mu.Unlock()
				return v, r
			}
		}
		v.mu.Unlock()
	}
	return nil, nil
}

// byID returns the VM of a catalog id, or nil.
func (a *Agent) byID(id string) *vm {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return a.vms[id]
}

// find returns the VM of a name, UUID or id.
func (a *Agent) find(ref string) (*vm, error) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	if v := a.vms[ref]; v != nil {
		return v, nil
	}
	var found []*vm
	for _, v := range a.vms {
		v.mu.Lock()
		if v.rec.Name == ref || v.rec.UUID != "" && v.rec.UUID == ref {
			found = append(found, v)
		}
		v.mu.Unlock()
	}
	switch len(found) {
	case 0:
		return nil, fault.New(fault.NotFound, "no VM %q on this host", ref).WithHint("vmsnap vm list shows the VMs")
	case 1:
		return found[0], nil
	default:
		return nil, fault.New(fault.Usage, "%d VMs are called %q", len(found), ref).WithHint("name it by its UUID or id (vmsnap vm list -o wide)")
	}
}

// alone returns the one QEMU process of a VM, nil when it is stopped. Two
// processes of one identity are refused: nobody could say which is meant.
func (v *vm) alone() (*run, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch len(v.runs) {
	case 0:
		return nil, nil
	case 1:
		return v.runs[0], nil
	default:
		return nil, fault.New(fault.Unsupported, "VM %s: %d QEMU processes (pids %d and %d) have the same identity",
			v.rec.Name, len(v.runs), v.runs[0].proc.PID, v.runs[1].proc.PID).
			WithHint("give each VM a UUID of its own, or stop one of them")
	}
}

// monitorPatience is how long a request waits for the monitor of a QEMU process
// that was found just before, as all are when the agent has just started.
const monitorPatience = 10 * time.Second

// known returns what alone does, once it is known whether the process's monitor
// answers. It waits for that no longer than monitorPatience.
func (v *vm) known(ctx context.Context) (*run, error) {
	r, err := v.alone()
	if err != nil || r == nil {
		return r, err
	}
	select {
	case <-r.met:
	case <-r.ended:
	case <-time.After(monitorPatience):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return v.alone() // it may have ended meanwhile
}

// name returns the VM's name.
func (v *vm) name() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.rec.Name
}
