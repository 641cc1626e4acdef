package agent

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
)

// VMs returns all VMs by name, and how they are found. It waits for nobody but,
// for statPatience, the file systems of the layers.
func (a *Agent) VMs(ctx context.Context) ([]VMView, Discovery) {
	a.mu.RLock()
	w := a.watcher
	a.mu.RUnlock()
	var d Discovery
	if w != nil {
		d.Source, d.Reason = w.Source()
	}
	ctx, cancel := context.WithTimeout(ctx, statPatience)
	defer cancel()
	// All looks go on at once, and are waited for one after the other.
	all := a.all()
	looks := make([]lookingAt, len(all))
	for i, v := range all {
		looks[i] = v.lookAt(a.sketch(v))
	}
	each := make([][]VMView, len(all))
	for i, l := range looks {
		each[i] = l.await(ctx)
	}
	return byName(each), d
}

// sketches returns what VMs does but for what the file systems know of the layers.
func (a *Agent) sketches() []VMView {
	all := a.all()
	each := make([][]VMView, len(all))
	for i, v := range all {
		each[i] = a.sketch(v).views
	}
	return byName(each)
}

// all returns the VMs, in no order.
func (a *Agent) all() []*vm {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return slices.Collect(maps.Values(a.vms))
}

func byName(each [][]VMView) []VMView {
	sorted := make([]*VMView, 0, len(each)) // views are too large to be moved about
	for _, views := range each {
		for i := range views {
			sorted = append(sorted, &views[i])
		}
	}
	slices.SortFunc(sorted, func(x, y *VMView) int {
		return cmp.Or(strings.Compare(x.Name, y.Name), strings.Compare(x.ID, y.ID), cmp.Compare(x.pid(), y.pid()))
	})
	views := make([]VMView, len(sorted))
	for i, v := range sorted {
		views[i] = *v
	}
	return views
}

func (v *VMView) pid() int {
	if v.Process == nil {
		return 0
	}
	return v.Process.PID
}

// VM returns one VM.
func (a *Agent) VM(ctx context.Context, ref string) (VMView, error) {
	v, err := a.find(ref)
	if err != nil {
		return VMView{}, err
	}
	a.space(ctx, v)
	ctx, cancel := context.WithTimeout(ctx, statPatience)
	defer cancel()
	view := a.views(ctx, v)[0]
	return view, a.nameOrigins(ctx, v, view.Disks)
}

// nameOrigins adds to layers that are another VM's whose they are. Whatever lies
// on them is a linked clone.
func (a *Agent) nameOrigins(ctx context.Context, v *vm, disks []DiskView) error {
	for _, d := range disks {
		for i, l := range d.Layers {
			f, ok := v.stats.seen(l.Path)
			if i == 0 || !ok {
				continue
			}
			owner, err := a.catalog.OwnerOfFile(ctx, f.file.Dev, f.file.Ino)
			if fault.Of(err) == fault.NotFound {
				continue // nobody's, or a base that many share
			}
			if err != nil {
				return err
			}
			if origin, err := a.find(owner); err == nil && origin != v {
				d.Layers[i].VM = origin.name()
			}
		}
	}
	return nil
}

// views returns what is known of a VM: once for each process that claims its
// identity, once when none runs.
func (a *Agent) views(ctx context.Context, v *vm) []VMView {
	return v.lookAt(a.sketch(v)).await(ctx)
}

// sketch is what is known of a VM without a look at its layers' files.
type sketch struct {
	views  []VMView
	roots  []string // that the paths of each view's layers begin at
	layers []catalog.Layer
}

func (a *Agent) sketch(v *vm) sketch {
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
	if s := v.space.reading(); s != nil {
		space := s.vm
		base.Space = &space
	}
	if len(runs) == 0 {
		base.Disks = stoppedDisks(disks, layers)
		return sketch{[]VMView{base}, []string{""}, layers}
	}
	s := sketch{layers: layers}
	for _, r := range runs {
		view := r.view(base)
		if len(runs) > 1 {
			view.Problems = append(view.Problems, Problem{"duplicate-identity",
				"another QEMU process has the same identity", "give each VM a UUID of its own, or stop one of them"})
		}
		s.views, s.roots = append(s.views, view), append(s.roots, r.proc.Root)
	}
	return s
}

// view adds what the process tells.
func (r *run) view(v VMView) VMView {
	p := r.proc
	r.mu.Lock()
	defer r.mu.Unlock()
	v.LastSeen = time.Now()
	v.RunState, v.State = r.status, Unknown
	switch {
	case r.session == nil:
	case r.status == "running":
		v.State = Running
	case r.status == "shutdown" || r.status == "postmigrate" && !r.saved:
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
		v.Disks = append(v.Disks, r.disks[i].view(p))
	}
	if r.problem != nil {
		v.Problems = append(v.Problems, *r.problem)
	}
	v.OutOfSpace = r.stuck != ""
	for i := range v.Disks {
		_, v.Disks[i].SpaceLow = r.tight[v.Disks[i].Device]
	}
	v.Problems = append(v.Problems, r.roomProblems()...)
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

// view shows a disk of a running VM, as QEMU has it.
func (d *liveDisk) view(p discover.Process) DiskView {
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
		if i == 0 && d.active.ID != "" {
			lv.Path = d.active.Path // QEMU may know it by the launch path
		}
		v.Layers = append(v.Layers, lv)
	}
	return v
}

// lookingAt is a look at the files of a VM's layers that was begun.
type lookingAt struct {
	sketch
	looks []looked // of each view
}

// lookAt begins to look at the layers of a sketch.
func (v *vm) lookAt(s sketch) lookingAt {
	l := lookingAt{s, make([]looked, len(s.views))}
	for i, view := range s.views {
		var paths []string
		for _, d := range view.Disks {
			for _, layer := range d.Layers {
				paths = append(paths, s.roots[i]+layer.Path)
			}
		}
		l.looks[i] = v.stats.begin(paths)
	}
	return l
}

// await returns the views with what the file system and the catalog know of the
// layers.
func (l lookingAt) await(ctx context.Context) []VMView {
	for i, view := range l.views {
		stats := l.looks[i].await(ctx)
		for _, d := range view.Disks {
			for j, layer := range d.Layers {
				d.Layers[j] = layer.fill(l.roots[i]+layer.Path, stats, l.layers)
			}
		}
	}
	return l.views
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

// layerView shows a layer as the catalog knows it.
func layerView(l catalog.Layer) LayerView {
	return LayerView{ID: l.ID, Path: l.Path, Format: l.Format, VirtualSize: l.VirtualSize, Foreign: l.Foreign, Immutable: l.Immutable}
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
		a.space(ctx, v)
	}
	all, err := a.catalog.Snapshots(ctx, vmID)
	if err != nil {
		return nil, err
	}
	shown := slices.DeleteFunc(slices.Clone(all), func(s catalog.Snapshot) bool {
		return !hasLabels(s.Labels, f.Labels) || f.Visible != nil && !f.Visible(s.VMID, a.vmNameOf(s))
	})
	return a.snapshotViews(ctx, shown, all), nil
}

func hasLabels(have, want map[string]string) bool {
	for k, v := range want {
		if got, ok := have[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// snapshotViews shows snapshots with their layers, and where they stand among all
// of their VMs. Those of one VM wait for its file systems together.
func (a *Agent) snapshotViews(ctx context.Context, shown, all []catalog.Snapshot) []SnapshotView {
	ctx, cancel := context.WithTimeout(ctx, statPatience)
	defer cancel()
	views := make([]SnapshotView, len(shown))
	ofVM, history := map[string][]*SnapshotView{}, map[string][]catalog.Snapshot{}
	for _, s := range all {
		history[s.VMID] = append(history[s.VMID], s)
	}
	for i, s := range shown {
		views[i] = SnapshotView{Snapshot: s, Layers: map[string]LayerView{}}
		ofVM[s.VMID] = append(ofVM[s.VMID], &views[i])
	}
	var looking sync.WaitGroup
	for id, those := range ofVM {
		a.mu.RLock()
		v := a.vms[id]
		a.mu.RUnlock()
		if v != nil {
			looking.Go(func() {
				_, previewed, err := a.catalog.Preview(ctx, id)
				if err != nil {
					a.log.Warn("whether a VM runs a preview is not known", "vm", v.name(), "error", err)
				}
				v.place(those, history[id], previewed)
				a.showClones(ctx, v, those)
				v.lookAtSnapshots(ctx, those)
			})
		}
	}
	looking.Wait()
	return views
}

// lookAtSnapshots adds the layers to snapshots of the VM.
func (v *vm) lookAtSnapshots(ctx context.Context, views []*SnapshotView) {
	v.mu.Lock()
	name, layers := v.rec.Name, v.layers
	v.mu.Unlock()
	var paths []string
	for _, view := range views {
		view.VMName = name
		for _, d := range view.Disks {
			if l := layerOf(layers, d.LayerID); l.ID != "" {
				view.Layers[d.LayerID] = layerView(l)
				paths = append(paths, l.Path)
			}
		}
	}
	stats := v.stats.look(ctx, paths)
	reading := v.space.reading()
	for _, view := range views {
		if reading != nil {
			if space, known := reading.snapshots[view.ID]; known {
				view.Space = &space
			}
		}
		for id, l := range view.Layers {
			l.Allocated = stats[l.Path].allocated
			view.Layers[id] = l
		}
	}
}

func (a *Agent) snapshotView(ctx context.Context, s catalog.Snapshot) (SnapshotView, error) {
	all, err := a.catalog.Snapshots(ctx, s.VMID)
	if err != nil {
		return SnapshotView{}, err
	}
	return a.snapshotViews(ctx, []catalog.Snapshot{s}, all)[0], nil
}

// Snapshot returns the snapshot of a "VM/NAME" or an id.
func (a *Agent) Snapshot(ctx context.Context, ref string) (SnapshotView, error) {
	s, err := a.findSnapshot(ctx, ref)
	if err != nil {
		return SnapshotView{}, err
	}
	a.mu.RLock()
	v := a.vms[s.VMID]
	a.mu.RUnlock()
	if v != nil {
		a.space(ctx, v)
	}
	return a.snapshotView(ctx, s)
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
	view, err := a.snapshotView(ctx, s)
	return view, errors.Join(err, a.rewriteManifests(s))
}
