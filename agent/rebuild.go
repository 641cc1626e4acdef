package agent

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/blockdev"
)

// Rebuilt is what RebuildCatalog has done.
type Rebuilt struct {
	VMs     []RebuiltVM
	Skipped []string // what was not taken, and why
}

// RebuiltVM is a VM that is in the catalog again.
type RebuiltVM struct {
	ID, Name          string
	Layers, Snapshots int
}

// rebuilding is a RebuildCatalog on its way to Run, which alone takes VMs in.
type rebuilding struct {
	ctx  context.Context //nolint:containedctx // the caller's
	dirs []string
	done chan rebuilt
}

type rebuilt struct {
	Rebuilt
	err error
}

// RebuildCatalog enters the VMs into the catalog that it has lost, with their
// disks, layers and snapshots, from the manifests beside the layers and from the
// images' headers. It looks into the given directories, and into those of all
// disks that are known. A VM of which the catalog knows a snapshot or a covered
// layer is left as it is: only what was found of VMs since the catalog was lost is
// replaced. Operations, events and schedules are not in manifests.
func (a *Agent) RebuildCatalog(ctx context.Context, dirs []string) (Rebuilt, error) {
	for _, d := range dirs {
		if !filepath.IsAbs(d) {
			return Rebuilt{}, fault.New(fault.Usage, "the directory %q is not an absolute path", d)
		}
	}
	r := rebuilding{ctx, dirs, make(chan rebuilt, 1)}
	select {
	case a.rebuilds <- r:
	case <-a.stopping:
		return Rebuilt{}, ErrStopping
	case <-ctx.Done():
		return Rebuilt{}, context.Cause(ctx)
	}
	done := <-r.done
	return done.Rebuilt, done.err
}

// rebuild is RebuildCatalog between two events of the host, so that no VM comes or
// goes meanwhile.
func (a *Agent) rebuild(ctx, sessions context.Context, dirs []string) rebuilt {
	found := &manifests{vms: map[string]vmManifest{}, snapshots: map[string]manifest{}}
	for _, dir := range a.manifestDirs(dirs) {
		if ctx.Err() != nil {
			return rebuilt{err: context.Cause(ctx)}
		}
		found.read(dir)
	}
	var r rebuilt
	for _, m := range found.assemble() {
		name := m.VM.Name
		snapshots := found.of(m)
		err := a.rebuildVM(ctx, sessions, &m, snapshots)
		if err != nil {
			found.skipped = append(found.skipped, fmt.Sprintf("VM %s (%s): %v", name, m.VM.ID, err))
			continue
		}
		r.VMs = append(r.VMs, RebuiltVM{ID: m.VM.ID, Name: name, Layers: len(m.Layers), Snapshots: len(snapshots)})
		a.log.Warn("a VM was entered into the catalog from its manifests", "vm", name, "id", m.VM.ID, "snapshots", len(snapshots))
	}
	r.Skipped = found.skipped
	return r
}

// manifestDirs adds to directories those of all disks that are known.
func (a *Agent) manifestDirs(given []string) []string {
	dirs := map[string]bool{}
	for _, d := range given {
		dirs[filepath.Clean(d)] = true
	}
	if a.cfg.OverlayDir != "" {
		dirs[a.cfg.OverlayDir] = true
	}
	a.mu.RLock()
	defer a.mu.RUnlock()
	for _, v := range a.vms {
		v.mu.Lock()
		for _, d := range v.disks {
			dirs[filepath.Dir(d.LaunchPath)] = true
		}
		for _, l := range v.layers {
			dirs[filepath.Dir(l.Path)] = true
		}
		for _, r := range v.runs {
			for _, d := range r.proc.Drives {
				if d.File != "" {
					dirs[filepath.Dir(absolute(r.proc, d.File))] = true
				}
				if over := a.overlayDir(r.proc, d.Device); over != "" {
					dirs[over] = true
				}
			}
		}
		v.mu.Unlock()
	}
	return sortedKeys(dirs)
}

// assemble returns a manifest for each VM, by name. Of a VM whose own manifest is
// gone the snapshots' tell what they can.
func (m *manifests) assemble() []vmManifest {
	for _, s := range m.snapshots {
		v, known := m.vms[s.VM.ID]
		if known && !v.Written.IsZero() {
			continue
		}
		if v.VM.ID == "" || s.Snapshot.Created.After(v.VM.LastSeen) {
			v.VM, v.Disks = s.VM, s.Disks
		}
		v.Version = manifestVersion
		for _, l := range s.Layers {
			if layerOf(v.Layers, l.ID).ID == "" {
				v.Layers = append(v.Layers, l)
			}
		}
		m.vms[s.VM.ID] = v
	}
	var all []vmManifest
	for _, v := range m.vms {
		all = append(all, v)
	}
	slices.SortFunc(all, func(x, y vmManifest) int {
		return cmp.Or(strings.Compare(x.VM.Name, y.VM.Name), strings.Compare(x.VM.ID, y.VM.ID))
	})
	return all
}

// of returns the snapshots of a VM, the oldest first: those that its own manifest
// names, and those that were taken after it was written. The others were deleted,
// and their manifests were left.
func (m *manifests) of(v vmManifest) []catalog.Snapshot {
	var all []catalog.Snapshot
	for id, s := range m.snapshots {
		if s.VM.ID != v.VM.ID {
			continue
		}
		if !slices.Contains(v.Snapshots, id) && s.Snapshot.Created.Before(v.Written) {
			m.skipped = append(m.skipped, fmt.Sprintf("snapshot %s/%s: it was deleted", s.VM.Name, s.Snapshot.Name))
			continue
		}
		var config bytes.Buffer
		if json.Compact(&config, s.Snapshot.Config) == nil {
			s.Snapshot.Config = config.Bytes()
		}
		all = append(all, s.Snapshot)
	}
	for _, id := range v.Snapshots {
		if _, there := m.snapshots[id]; !there {
			m.skipped = append(m.skipped, fmt.Sprintf("snapshot %s of VM %s: its manifest is gone", id, v.VM.Name))
		}
	}
	slices.SortFunc(all, func(x, y catalog.Snapshot) int { return x.Created.Compare(y.Created) })
	return all
}

// rebuildVM enters one VM into the catalog, in place of what was found of it since
// the catalog was lost.
func (a *Agent) rebuildVM(ctx, sessions context.Context, m *vmManifest, snapshots []catalog.Snapshot) error {
	a.recording.Lock()
	old, processes, err := a.replaceable(ctx, m)
	if err == nil {
		err = m.reconcile(snapshots)
	}
	if err == nil {
		err = a.enterVM(ctx, old, m, snapshots)
	}
	if err != nil {
		a.recording.Unlock()
		return err
	}
	v := &vm{id: m.VM.ID, rec: m.VM}
	v.rec.Stopped = ""
	err = a.reload(ctx, v)
	a.mu.Lock()
	for _, id := range old {
		if was := a.vms[id]; was != nil {
			was.mu.Lock()
			for _, r := range was.runs {
				r.cancel()
			}
			was.mu.Unlock()
		}
		delete(a.vms, id)
	}
	a.vms[v.id] = v
	a.mu.Unlock()
	a.recording.Unlock()
	for _, p := range processes {
		a.started(sessions, p)
	}
	return err
}

// replaceable returns the records that stand for the VM now, and its processes. It
// fails when they are more than what was seen of a VM that runs.
func (a *Agent) replaceable(ctx context.Context, m *vmManifest) (old []string, processes []discover.Process, err error) {
	known, err := a.catalog.VMs(ctx)
	if err != nil {
		return nil, nil, err
	}
	for _, rec := range known {
		if rec.ID != m.VM.ID && rec.Identity != m.VM.Identity {
			continue
		}
		_, layers, snapshots, err := a.records(ctx, rec.ID)
		if err != nil {
			return nil, nil, err
		}
		own := slices.ContainsFunc(layers, func(l catalog.Layer) bool { return l.Covered && !l.Foreign })
		if own || len(snapshots) > 0 {
			return nil, nil, errors.New("the catalog knows it")
		}
		if id, busy := a.ops.Running(rec.ID); busy {
			return nil, nil, fmt.Errorf("operation %s is running", id)
		}
		old = append(old, rec.ID)
		a.mu.RLock()
		v := a.vms[rec.ID]
		a.mu.RUnlock()
		if v != nil {
			v.mu.Lock()
			for _, r := range v.runs {
				processes = append(processes, r.proc)
			}
			v.mu.Unlock()
		}
	}
	return old, processes, nil
}

// enterVM writes the records, all or none.
func (a *Agent) enterVM(ctx context.Context, old []string, m *vmManifest, snapshots []catalog.Snapshot) error {
	return a.catalog.Update(ctx, func(tx *catalog.Tx) error {
		for _, id := range old {
			if err := tx.DeleteVM(ctx, id); err != nil {
				return err
			}
		}
		if _, err := tx.UpsertVM(ctx, m.VM); err != nil {
			return err
		}
		if err := putLayers(ctx, tx, m.Layers, m.Disks); err != nil {
			return err
		}
		if m.Preview != nil {
			m.Preview.VMID = m.VM.ID
			if err := tx.PutPreview(ctx, *m.Preview); err != nil {
				return err
			}
		}
		for _, s := range snapshots {
			if err := tx.CommitSnapshot(ctx, catalog.Commit{Snapshot: s}); err != nil {
				return err
			}
		}
		return nil
	})
}

// reconcile brings a manifest up to what the images say: files that were copied
// are other ones now, and layers may have been made since it was written. It fails
// when what is left makes no tree.
func (m *vmManifest) reconcile(snapshots []catalog.Snapshot) error {
	for i := range m.Layers {
		l := &m.Layers[i]
		f, err := fileAt(l.Path)
		if err != nil || f.is(*l) || l.Device != "" || f.device != "" {
			continue // what is missing or another one is for the doctor to tell
		}
		h, err := blockdev.ReadHeaderFile(l.Path)
		parent := layerOf(m.Layers, l.Parent)
		if l.Format == "qcow2" && err == nil && h.VirtualSize == l.VirtualSize && h.BackingPath(l.Path) == parent.Path {
			f.identify(l)
		}
	}
	for i := range m.Disks {
		if !m.Disks[i].Removed {
			m.adoptTop(&m.Disks[i])
		}
	}
	for _, d := range m.Disks {
		if d.ActiveLayer != "" && layerOf(m.Layers, d.ActiveLayer).ID == "" {
			return fmt.Errorf("the active layer of disk %s is not known", d.Device)
		}
	}
	for _, s := range snapshots {
		if checkValid(s) != nil { // the rest of one that was being deleted
			for i, d := range s.Disks {
				if layerOf(m.Layers, d.LayerID).ID == "" {
					s.Disks[i].LayerID = ""
				}
			}
		}
		for _, id := range layersOf(s) {
			if layerOf(m.Layers, id).ID == "" {
				return fmt.Errorf("snapshot %s has a layer that is not known", s.Name)
			}
		}
	}
	return nil
}

// maxAdopted bounds the layers that may have been made since a manifest was
// written.
const maxAdopted = 64

// adoptTop takes in layers that lie on a known one and that the launch path leads
// to: an operation made them, and was cut off before it wrote its manifest.
func (m *vmManifest) adoptTop(d *catalog.Disk) {
	var above []catalog.Layer
	for path := d.LaunchPath; len(above) < maxAdopted; {
		f, err := fileAt(path)
		if err != nil || f.device != "" {
			return
		}
		if known := f.in(m.Layers); known.ID != "" {
			if known.DiskID == d.ID {
				m.lay(d, known.ID, above)
			}
			return
		}
		h, err := blockdev.ReadHeaderFile(path)
		if err != nil || h.Backing == "" {
			return
		}
		l := catalog.Layer{ID: newID(), DiskID: d.ID, Path: permanentName(path, f), Format: "qcow2", VirtualSize: h.VirtualSize, Created: time.Now()}
		f.identify(&l)
		if match := layerFile.FindStringSubmatch(filepath.Base(l.Path)); match != nil {
			l.ID = match[2] + match[3]
		}
		above = append(above, l)
		path = h.BackingPath(path)
	}
}

// permanentName returns the name of ours that a file has beside a path, which may
// be its launch path; the path itself when it has none.
func permanentName(path string, f file) string {
	entries, err := readDir(filepath.Dir(path))
	if err != nil || layerFile.MatchString(filepath.Base(path)) {
		return path
	}
	for _, e := range entries {
		other := filepath.Join(filepath.Dir(path), e.Name())
		if !e.Type().IsRegular() || !layerFile.MatchString(e.Name()) {
			continue
		}
		if info, err := blockdev.StatPath(other); err == nil && info.FileID == f.FileID {
			return other
		}
	}
	return path
}

// lay puts layers, the newest first, on a known one.
func (m *vmManifest) lay(d *catalog.Disk, on string, above []catalog.Layer) {
	for _, l := range slices.Backward(above) {
		for i := range m.Layers {
			if m.Layers[i].ID == on {
				m.Layers[i].Covered = true
			}
		}
		l.Parent = on
		m.Layers = append(m.Layers, l)
		on = l.ID
	}
	if len(above) > 0 || !slices.ContainsFunc(m.Layers, func(l catalog.Layer) bool { return l.Parent == on }) {
		d.ActiveLayer = on
	}
}
