package agent

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/blockdev"
)

// VMs returns all VMs by name, from memory alone, and how they are found.
func (a *Agent) VMs(context.Context) ([]VMView, Discovery) {
	a.mu.RLock()
	all := make([]*vm, 0, len(a.vms))
	for _, v := range a.vms {
		all = append(all, v)
	}
	w := a.watcher
	a.mu.RUnlock()
	var d Discovery
	if w != nil {
		d.Source, d.Reason = w.Source()
	}
	var views []VMView
	for _, v := range all {
		views = append(views, a.views(v)...)
	}
	slices.SortFunc(views, func(x, y VMView) int {
		return cmp.Or(strings.Compare(x.Name, y.Name), strings.Compare(x.ID, y.ID), cmp.Compare(x.pid(), y.pid()))
	})
	return views, d
}

func (v VMView) pid() int {
	if v.Process == nil {
		return 0
	}
	return v.Process.PID
}

// VM returns one VM.
func (a *Agent) VM(_ context.Context, ref string) (VMView, error) {
	v, err := a.find(ref)
	if err != nil {
		return VMView{}, err
	}
	return a.views(v)[0], nil
}

// views returns what is known of a VM: once for each process that claims its
// identity, once when none runs.
func (a *Agent) views(v *vm) []VMView {
	v.mu.Lock()
	base := VMView{
		ID: v.id, Name: v.rec.Name, UUID: v.rec.UUID, State: Stopped, FirstSeen: v.rec.FirstSeen,
		LastSeen: v.rec.LastSeen, Snapshots: v.counts, GuestAgent: GuestAgentView{Presence: NoChannel},
	}
	if v.freeze != nil {
		f := *v.freeze
		base.Freeze = &f
	}
	runs, layers := slices.Clone(v.runs), v.layers
	disks := v.disks
	v.mu.Unlock()
	base.Operation, _ = a.ops.Running(base.ID)
	if len(runs) == 0 {
		base.Disks = stoppedDisks(disks, layers)
		return []VMView{base}
	}
	views := make([]VMView, len(runs))
	for i, r := range runs {
		views[i] = r.view(base, layers)
		if len(runs) > 1 {
			views[i].Problems = append(views[i].Problems, Problem{"duplicate-identity",
				"another QEMU process has the same identity", "give each VM a UUID of its own, or stop one of them"})
		}
	}
	return views
}

// view adds what the process tells.
func (r *run) view(v VMView, layers []catalog.Layer) VMView {
	p := r.proc
	r.mu.Lock()
	defer r.mu.Unlock()
	v.LastSeen = time.Now()
	v.RunState, v.State = r.status, Unknown
	switch {
	case r.session == nil:
	case r.status == "running":
		v.State = Running
	case r.status == "shutdown" || r.status == "postmigrate":
		v.State = Stopped
	case r.status != "":
		v.State = Paused
	}
	v.Process = &ProcessView{
		PID: p.PID, Started: p.Started, QEMUVersion: r.version, Binary: p.Binary,
		Unit: p.Cgroup.Unit, Slice: p.Cgroup.Slice, CgroupMode: string(p.Cgroup.Mode), QMPSocket: r.socket,
	}
	v.GuestAgent = GuestAgentView{Presence: r.presence, Socket: p.GuestAgent.Path}
	for i := range r.disks {
		v.Disks = append(v.Disks, r.disks[i].view(p, layers))
	}
	if r.problem != nil {
		v.Problems = append(v.Problems, *r.problem)
	}
	if p.Root != "" {
		v.Problems = append(v.Problems, Problem{"other-mount-namespace",
			"QEMU has a file system tree of its own; its files are reached through " + p.Root,
			"nothing has to be done while it runs; a stopped VM is only known by its own paths"})
	}
	for _, note := range p.Notes {
		v.Problems = append(v.Problems, Problem{"note", note, ""})
	}
	return v
}

// view shows a disk of a running VM.
func (d *liveDisk) view(p discover.Process, layers []catalog.Layer) DiskView {
	v := DiskView{
		Device: d.drive.Device, Node: d.drive.Root, Bus: d.launch.Interface, LaunchPath: d.rec.LaunchPath,
		LaunchFormat: d.launch.Format, Throttled: d.drive.Throttled, IOThread: d.launch.IOThread,
		NotCuttable: d.reason, SettleNeeded: d.rec.SettleNeeded,
	}
	for i, l := range d.chain {
		if i == 0 {
			v.VirtualSize = l.Node.VirtualSize
		}
		lv := LayerView{Path: absolute(p, l.Filename), Format: l.Node.Driver, VirtualSize: l.Node.VirtualSize}
		if info, err := blockdev.StatPath(p.Root + lv.Path); err == nil {
			lv.Allocated = info.Allocated
		}
		if file, err := fileAt(p.Root + lv.Path); err == nil {
			lv = known(lv, layers, file)
		}
		v.Layers = append(v.Layers, lv)
	}
	return v
}

// known adds what the catalog knows of a file.
func known(v LayerView, layers []catalog.Layer, file file) LayerView {
	for _, l := range layers {
		if file.is(l) {
			v.ID, v.Path, v.Foreign, v.Immutable = l.ID, l.Path, l.Foreign, l.Immutable
		}
	}
	return v
}

// stoppedDisks shows the disks of a stopped VM.
func stoppedDisks(disks []catalog.Disk, layers []catalog.Layer) []DiskView {
	var views []DiskView
	for _, d := range disks {
		if d.Removed {
			continue
		}
		v := DiskView{Device: d.Device, LaunchPath: d.LaunchPath, LaunchFormat: d.LaunchFormat, SettleNeeded: d.SettleNeeded}
		for l := layerOf(layers, d.ActiveLayer); l.ID != ""; l = layerOf(layers, l.Parent) {
			if len(v.Layers) == 0 {
				v.VirtualSize = l.VirtualSize
			}
			v.Layers = append(v.Layers, layerView(l))
		}
		views = append(views, v)
	}
	return views
}

func layerView(l catalog.Layer) LayerView {
	v := LayerView{ID: l.ID, Path: l.Path, Format: l.Format, VirtualSize: l.VirtualSize, Foreign: l.Foreign, Immutable: l.Immutable}
	if info, err := blockdev.StatPath(l.Path); err == nil {
		v.Allocated = info.Allocated
	}
	return v
}

// Snapshots returns snapshots, the newest first.
func (a *Agent) Snapshots(ctx context.Context, f SnapshotFilter) ([]SnapshotView, error) {
	vmID := ""
	if f.VM != "" {
		v, err := a.find(f.VM)
		if err != nil {
			return nil, err
		}
		vmID = v.id
	}
	all, err := a.catalog.Snapshots(ctx, vmID)
	if err != nil {
		return nil, err
	}
	views := make([]SnapshotView, 0, len(all))
	for _, s := range all {
		if hasLabels(s.Labels, f.Labels) {
			views = append(views, a.snapshotView(s))
		}
	}
	return views, nil
}

func hasLabels(have, want map[string]string) bool {
	for k, v := range want {
		if got, ok := have[k]; !ok || got != v {
			return false
		}
	}
	return true
}

func (a *Agent) snapshotView(s catalog.Snapshot) SnapshotView {
	view := SnapshotView{Snapshot: s, Layers: map[string]LayerView{}}
	a.mu.RLock()
	v := a.vms[s.VMID]
	a.mu.RUnlock()
	if v == nil {
		return view
	}
	v.mu.Lock()
	view.VMName = v.rec.Name
	layers := v.layers
	v.mu.Unlock()
	for _, d := range s.Disks {
		if l := layerOf(layers, d.LayerID); l.ID != "" {
			view.Layers[d.LayerID] = layerView(l)
		}
	}
	return view
}

// Snapshot returns the snapshot of a "VM/NAME" or an id.
func (a *Agent) Snapshot(ctx context.Context, ref string) (SnapshotView, error) {
	s, err := a.findSnapshot(ctx, ref)
	if err != nil {
		return SnapshotView{}, err
	}
	return a.snapshotView(s), nil
}

func (a *Agent) findSnapshot(ctx context.Context, ref string) (catalog.Snapshot, error) {
	vmRef, name, ok := strings.Cut(ref, "/")
	if !ok {
		s, err := a.catalog.Snapshot(ctx, ref)
		if fault.Of(err) == fault.NotFound {
			return s, fault.New(fault.NotFound, "no snapshot %q", ref).WithHint("name a snapshot as VM/NAME; vmsnap snapshot list shows them")
		}
		return s, err
	}
	v, err := a.find(vmRef)
	if err != nil {
		return catalog.Snapshot{}, err
	}
	s, err := a.catalog.SnapshotByName(ctx, v.id, name)
	if fault.Of(err) == fault.NotFound {
		return s, fault.New(fault.NotFound, "VM %s has no snapshot %q", v.name(), name).
			WithHint("vmsnap snapshot list %s shows its snapshots", v.name())
	}
	return s, err
}

// RenameSnapshot gives a snapshot another name. Its files keep theirs.
func (a *Agent) RenameSnapshot(ctx context.Context, ref, newName string) (SnapshotView, error) {
	if err := checkName(newName); err != nil {
		return SnapshotView{}, err
	}
	s, err := a.findSnapshot(ctx, ref)
	if err != nil {
		return SnapshotView{}, err
	}
	if err := a.rename(ctx, s, newName); err != nil {
		return SnapshotView{}, err
	}
	s.Name = newName
	return a.snapshotView(s), a.rewriteManifests(s)
}
