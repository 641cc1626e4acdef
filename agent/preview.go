package agent

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/launch"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/monitor"
)

// PreviewRequest asks for a VM to run a trial state.
type PreviewRequest struct {
	RestoreRequest
	Connected      bool // leave the network links up
	DiscardRunning bool // what the running guest has in memory may be lost
}

// PreviewView is a trial state that a VM runs.
type PreviewView struct {
	Snapshot  string
	Operation string
	Opened    time.Time
	Isolated  bool
	Disks     []string // devices
	Saved     uint64   // bytes of the state before's memory, which undo loads; 0 when it was not saved
}

// previewState is what the journal keeps of a restore that is a preview.
type previewState struct {
	Snapshot string
	Isolated bool
	Launcher launch.Kind `json:",omitempty"` // that was asked for
}

// PreviewSnapshot starts to run a trial state, and returns the operation.
func (a *Agent) PreviewSnapshot(ctx context.Context, req PreviewRequest) (op.Record, error) {
	s, v, err := a.snapshotOf(ctx, req.Snapshot)
	if err != nil {
		return op.Record{}, err
	}
	spec := op.Spec{Kind: op.KindPreview, VMID: v.id, VMName: v.name(), Request: req, RequestID: req.RequestID, UID: req.UID}
	return a.changes(ctx, spec, v, func(ctx context.Context, o *op.Op) error {
		r := &restore{cut: &cut{Agent: a, o: o, vm: v}}
		r.Preview = &previewState{Snapshot: s.Name, Isolated: !req.Connected, Launcher: req.Launcher}
		r.keepsAs("")
		from, how, err := a.trial(ctx, v, s, req)
		if err != nil {
			return err
		}
		return r.to(ctx, from, how, func(p *restorePlan) {
			for _, d := range p.disks {
				if d.Settle != SettleLive {
					p.refuse(fault.New(fault.Unsupported, "VM %s: disk %s: its launch path can lead to another state only when the VM has stopped, which cannot be undone", v.name(), d.Device).
						WithHint("restore the snapshot; the state before is kept"))
				}
			}
			if p.memory != nil && len(p.excluded) > 0 {
				p.refuse(fault.New(fault.Unsupported, "VM %s: disk %s is not in the preview and may be written to meanwhile, so what the guest has in memory could not come back: guest and disks would not fit together",
					v.name(), p.excluded[0].Device).WithHint("preview all disks; or --discard-running-state: undo starts the guest from its disks"))
			}
		})
	})
}

// changes begins an operation that changes the VM's layers.
func (a *Agent) changes(ctx context.Context, spec op.Spec, v *vm, recipe op.Recipe) (op.Record, error) {
	return a.begin(ctx, spec, func(ctx context.Context, o *op.Op) error {
		v.changing.Lock()
		o.Cleanup(func() {
			v.changing.Unlock()
			a.lookAgain(context.WithoutCancel(ctx), v)
		})
		return recipe(ctx, o)
	})
}

// recordPreview enters the trial layers into the catalog. The layers that were
// active are kept, as they are, for the end of the preview.
func (r *restore) recordPreview(ctx context.Context) error {
	layers, disks, err := r.entries(ctx, &catalog.Snapshot{})
	if err != nil {
		return err
	}
	p := catalog.Preview{
		VMID: r.vm.id, Operation: r.o.ID(), Snapshot: r.Preview.Snapshot, Opened: r.cutAt, Isolated: r.Preview.Isolated,
		Offline: r.offline, Config: r.config,
	}
	if m := r.Memory; m != nil {
		p.Former = &catalog.PreviewFormer{Ran: m.Former != nil, Launcher: string(r.Preview.Launcher)}
		if m.Former != nil {
			p.Former.Memory = m.Former.Saved
		}
	}
	for _, d := range r.disks {
		base, err := r.catalog.Layer(ctx, d.BaseID)
		if err != nil {
			return err
		}
		p.Disks = append(p.Disks, catalog.PreviewDisk{DiskID: d.DiskID, Device: d.Device, Before: d.BaseID, Trial: d.OverlayID, Size: base.VirtualSize})
	}
	return r.catalog.Update(ctx, func(tx *catalog.Tx) error {
		if err := putLayers(ctx, tx, layers, disks); err != nil {
			return err
		}
		return tx.PutPreview(ctx, p)
	})
}

// Preview returns the trial state that a VM runs, or fault.NotFound.
func (a *Agent) Preview(ctx context.Context, ref string) (PreviewView, error) {
	v, err := a.find(ref)
	if err != nil {
		return PreviewView{}, err
	}
	p, err := a.previewOf(ctx, v)
	if err != nil {
		return PreviewView{}, err
	}
	return previewView(p), nil
}

func previewView(p catalog.Preview) PreviewView {
	view := PreviewView{Snapshot: p.Snapshot, Operation: p.Operation, Opened: p.Opened, Isolated: p.Isolated}
	if p.Former != nil && p.Former.Memory != nil {
		view.Saved = p.Former.Memory.Size
	}
	for _, d := range p.Disks {
		view.Disks = append(view.Disks, d.Device)
	}
	return view
}

func (a *Agent) previewOf(ctx context.Context, v *vm) (catalog.Preview, error) {
	p, ok, err := a.catalog.Preview(ctx, v.id)
	if err == nil && !ok {
		err = fault.New(fault.NotFound, "VM %s runs no preview", v.name())
	}
	return p, err
}

// notPreviewed refuses what may not be done while a preview is open.
func (a *Agent) notPreviewed(ctx context.Context, spec op.Spec) error {
	switch spec.Kind {
	case op.KindPreviewCommit, op.KindPreviewUndo, op.KindSettle:
		return nil
	}
	p, ok, err := a.catalog.Preview(ctx, spec.VMID)
	if err != nil || !ok {
		return err
	}
	if spec.RequestID != "" { // a repeated request gets its first operation
		if _, known, err := a.catalog.OperationByRequest(ctx, spec.UID, spec.RequestID); err != nil || known {
			return err
		}
	}
	return fault.New(fault.Busy, "VM %s runs a preview of %s", spec.VMName, p.Snapshot).
		WithHint("vmsnap preview commit %s keeps it, vmsnap preview undo %s goes back", spec.VMName, spec.VMName)
}

// CommitPreview keeps the trial state: the state before becomes a snapshot.
func (a *Agent) CommitPreview(ctx context.Context, ref string, uid uint32) (op.Record, error) {
	v, err := a.find(ref)
	if err != nil {
		return op.Record{}, err
	}
	if _, err := a.previewOf(ctx, v); err != nil {
		return op.Record{}, err
	}
	spec := op.Spec{Kind: op.KindPreviewCommit, VMID: v.id, VMName: v.name(), Request: struct{}{}, UID: uid}
	return a.changes(ctx, spec, v, func(ctx context.Context, o *op.Op) error { return a.commitPreview(ctx, o, v) })
}

func (a *Agent) commitPreview(ctx context.Context, o *op.Op, v *vm) error {
	p, err := a.previewOf(ctx, v)
	if err != nil {
		return err
	}
	s := catalog.Snapshot{
		ID: newID(), VMID: v.id, VMName: v.name(), Name: "before-" + generatedName(p.Opened, p.Operation),
		Description: fmt.Sprintf("the state before the preview of %s", p.Snapshot), Created: p.Opened, Consistency: catalog.Crash,
		Quiesce: catalog.Quiesce{Requested: string(QuiesceNone)}, Operation: o.ID(), Config: p.Config, Automatic: true,
		State: catalog.PointValid,
	}
	if p.Offline {
		s.Consistency = catalog.Offline
	}
	for _, d := range p.Disks {
		s.Disks = append(s.Disks, catalog.SnapshotDisk{DiskID: d.DiskID, Device: d.Device, LayerID: d.Before, Size: d.Size})
	}
	err = o.Step(ctx, "network", func(ctx context.Context) error {
		if !p.Isolated {
			return nil
		}
		return a.linksOf(ctx, v, true)
	})
	if err != nil {
		return err
	}
	return o.Step(ctx, "commit", func(ctx context.Context) error {
		if err := o.PointOfNoReturn(); err != nil {
			return err
		}
		ctx = context.WithoutCancel(ctx)
		if f := p.Former; f != nil && f.Memory != nil {
			if err := o.Journal(ctx, entryForget, discard{f.Memory.Path}); err != nil {
				return err
			}
		}
		err := a.catalog.Update(ctx, func(tx *catalog.Tx) error {
			if err := tx.DeletePreview(ctx, v.id); err != nil {
				return err
			}
			return tx.CommitSnapshot(ctx, catalog.Commit{Snapshot: s})
		})
		if err != nil {
			return err
		}
		o.SetSnapshot(s.ID)
		if err := errors.Join(a.reload(ctx, v), a.rewriteManifests(s)); err != nil {
			o.Warn(op.Warning{Code: warnManifest, Message: err.Error()})
		}
		if f := p.Former; f != nil && f.Memory != nil {
			if err := removeMemory(f.Memory.Path); err != nil {
				o.Logger().Error("the memory of the state before the preview was not removed; vmsnap doctor finds it", "error", err)
			}
		}
		return nil
	})
}

// UndoPreview goes back to the state before, and throws the trial state away.
func (a *Agent) UndoPreview(ctx context.Context, ref string, uid uint32) (op.Record, error) {
	v, err := a.find(ref)
	if err != nil {
		return op.Record{}, err
	}
	p, err := a.previewOf(ctx, v)
	if err != nil {
		return op.Record{}, err
	}
	spec := op.Spec{Kind: op.KindPreviewUndo, VMID: v.id, VMName: v.name(), Request: struct{}{}, UID: uid}
	return a.changes(ctx, spec, v, func(ctx context.Context, o *op.Op) error {
		r := &restore{cut: &cut{Agent: a, o: o, vm: v}}
		r.Undo, r.NoSafety = &undoState{Isolated: p.Isolated}, true
		if f := p.Former; f != nil && f.Memory != nil {
			r.Undo.Memory = f.Memory.Path
		}
		r.keepsAs("")
		s := catalog.Snapshot{Name: "before-" + p.Snapshot, VMID: v.id, VMName: v.name()}
		for _, d := range p.Disks {
			s.Disks = append(s.Disks, catalog.SnapshotDisk{DiskID: d.DiskID, Device: d.Device, LayerID: d.Before, Size: d.Size})
		}
		how, err := a.wayBack(ctx, v, p, &s)
		if err != nil {
			return err
		}
		return r.to(ctx, s, how, func(p *restorePlan) {
			p.plan.Warnings = slices.DeleteFunc(p.plan.Warnings, func(w op.Warning) bool { return w.Code == warnExcluded })
		})
	})
}

// undoState is what the journal keeps of a restore that undoes a preview.
type undoState struct {
	Isolated bool   // the links are to be up again
	Memory   string `json:",omitempty"` // path of that of the state before
}

// fold merges the overlays of an undo, which hold what was written since the
// guest was reset, into the layers that were active before the preview: those
// are active again.
func (r *restore) fold(ctx context.Context) error {
	back := &cut{Agent: r.Agent, o: r.o, vm: r.vm, run: r.run, session: r.session, settled: true}
	for _, d := range r.disks {
		was := &cutDisk{
			Device: d.Device, DiskID: d.DiskID, Dir: d.Dir, Prefix: d.Prefix, Launch: d.Launch, BaseDir: filepath.Dir(d.On[0].Path),
			Base: filepath.Base(d.On[0].Path), BaseID: d.On[0].ID, BaseFormat: d.On[0].Format, OverlayDir: d.OverlayDir, Overlay: d.Overlay,
			OverlayID: d.OverlayID, Size: d.Size, Options: d.Options, Settle: SettleLive,
		}
		if err := was.open(); err != nil {
			return r.failure(d, err)
		}
		back.disks = append(back.disks, was)
	}
	defer back.closeDirs()
	for i, d := range back.disks {
		err := back.mergeDisk(ctx, d, i)
		if errors.Is(err, errKeepLayers) || errors.Is(err, blockdev.ErrNotMerged) {
			r.warn(warnLayersKept, d.Device, "it keeps one more layer: "+err.Error())
			r.kept = append(r.kept, d.DiskID)
			continue
		}
		if err != nil {
			return r.failure(d, err)
		}
	}
	return nil
}

// recordUndo enters into the catalog what was active before the preview, and
// removes what was tried.
func (r *restore) recordUndo(ctx context.Context) error {
	err := r.catalog.Update(ctx, func(tx *catalog.Tx) error {
		known, err := tx.Disks(ctx, r.vm.id)
		if err != nil {
			return err
		}
		for _, d := range r.disks {
			i := slices.IndexFunc(known, func(k catalog.Disk) bool { return k.ID == d.DiskID })
			if i < 0 {
				return fault.New(fault.Failed, "VM %s has no disk %s any more", r.vm.name(), d.Device)
			}
			active, err := r.undone(ctx, tx, d)
			if err != nil {
				return err
			}
			known[i].ActiveLayer, known[i].SettleNeeded = active.ID, false
			if err := putLayers(ctx, tx, []catalog.Layer{active}, []catalog.Disk{known[i]}); err != nil {
				return err
			}
			if err := tx.DeleteLayer(ctx, d.BaseID); err != nil {
				return err
			}
		}
		return tx.DeletePreview(ctx, r.vm.id)
	})
	if err != nil {
		return err
	}
	return errors.Join(r.removeActive(), r.discardBefore())
}

// undone is the layer that a disk writes to after an undo: the one that was
// active before the preview, or the one on it that could not be merged.
func (r *restore) undone(ctx context.Context, tx *catalog.Tx, d *cutDisk) (catalog.Layer, error) {
	was, err := tx.Layer(ctx, d.On[0].ID)
	if err != nil {
		return was, err
	}
	if slices.Contains(r.kept, d.DiskID) {
		tried, err := tx.Layer(ctx, d.BaseID)
		if err != nil {
			return was, err
		}
		two, err := d.layers(r.o.ID(), tried)
		if err != nil {
			return was, err
		}
		return two[1], nil
	}
	was.Covered, was.Immutable = false, false
	return was, nil
}

// linksOf sets the network links of a running VM up or down.
func (a *Agent) linksOf(ctx context.Context, v *vm, up bool) error {
	r, err := v.known(ctx)
	if err != nil || r == nil {
		return err
	}
	s, err := v.monitorOf(r)
	if err != nil {
		return err
	}
	return setLinks(ctx, s, nil, up)
}

// setLinks sets the links of network devices, of all when none are named, up or
// down (set_link in qapi/net.json): the guest sees the cable plugged in or pulled
// out.
func setLinks(ctx context.Context, s *monitor.Session, names []string, up bool) (err error) {
	if names == nil {
		if names, err = s.NetDevices(ctx); err != nil {
			return err
		}
	}
	for _, name := range names {
		if err := s.Execute(ctx, "set_link", map[string]any{"name": name, "up": up}, nil); err != nil {
			return fmt.Errorf("network link %s: %w", name, err)
		}
	}
	return nil
}

// isolateAgain takes the links down of a VM that was started while it runs an
// isolated preview: what QEMU was told before is gone.
func (a *Agent) isolateAgain(ctx context.Context, v *vm, s *monitor.Session) {
	p, ok, err := a.catalog.Preview(ctx, v.id)
	if err == nil && ok && p.Isolated {
		err = setLinks(ctx, s, nil, false)
	}
	if err != nil {
		a.log.Error("the network links of a preview cannot be taken down", "vm", v.name(), "error", err)
	}
}

// recoverPreviewCommit does what is left of a commit.
func (a *Agent) recoverPreviewCommit(ctx context.Context, o *op.Op, v *vm) error {
	return a.untilRecovered(ctx, o, func(ctx context.Context) error { return a.commitPreview(ctx, o, v) })
}
