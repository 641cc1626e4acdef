package agent

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"path/filepath"
	"strings"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/blockdev"
)

// manifest is what stands beside the layers: everything that the catalog knows
// of a snapshot, so that a lost catalog can be rebuilt.
//
// A snapshot's manifest is written once, with the layers that it can be restored
// from, and again when one of them changes. The tree of all layers, and which of
// them are active, changes with every operation: it is in a vmManifest.
type manifest struct {
	Version  int              `json:"version"`
	VM       catalog.VM       `json:"vm"`
	Snapshot catalog.Snapshot `json:"snapshot"`
	Disks    []catalog.Disk   `json:"disks"`
	Layers   []catalog.Layer  `json:"layers"`
}

const manifestVersion = 1

// manifestDir holds the manifests, beside the layers.
const manifestDir = ".vmsnap"

// writeManifests writes the manifest into each directory that holds a layer of
// the snapshot.
func (c *cut) writeManifests(s catalog.Snapshot, layers []catalog.Layer) error {
	c.vm.mu.Lock()
	m := manifest{Version: manifestVersion, VM: c.vm.rec, Snapshot: s, Disks: c.vm.disks, Layers: layers}
	c.vm.mu.Unlock()
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	var errs []error
	done := map[string]bool{}
	for _, d := range c.disks {
		beside := d.baseDir
		if d.BaseDevice != "" {
			beside = d.overlayDir
		}
		if path := beside.Path(""); !done[path] {
			done[path] = true
			errs = append(errs, beside.WriteFile(manifestDir, s.ID+".json", data))
		}
	}
	return errors.Join(errs...)
}

// rewriteManifests brings the manifests of a snapshot up to the catalog.
func (a *Agent) rewriteManifests(s catalog.Snapshot) error {
	a.mu.RLock()
	v := a.vms[s.VMID]
	a.mu.RUnlock()
	if v == nil {
		return nil
	}
	v.mu.Lock()
	layers := v.layers
	m := manifest{Version: manifestVersion, VM: v.rec, Snapshot: s, Disks: v.disks}
	v.mu.Unlock()
	dirs := map[string]bool{}
	for _, d := range s.Disks {
		if l := layerOf(layers, d.LayerID); l.ID != "" {
			m.Layers = append(m.Layers, l)
			dirs[manifestDirOf(l, layers)] = true
		}
	}
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	var errs []error
	for dir := range dirs {
		errs = append(errs, writeManifest(dir, s.ID, data))
	}
	return errors.Join(errs...)
}

// manifestDirOf returns the directory of the manifests of a layer's snapshots:
// the one that it stands in, for a block device that of a layer on it, if there is
// any.
func manifestDirOf(l catalog.Layer, layers []catalog.Layer) string {
	if l.Device == "" {
		return filepath.Dir(l.Path)
	}
	for _, child := range layers {
		if child.Parent == l.ID {
			return filepath.Dir(child.Path)
		}
	}
	return ""
}

func writeManifest(path, id string, data []byte) (err error) {
	dir, err := blockdev.OpenDir(path, "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	return dir.WriteFile(manifestDir, id+".json", data)
}

// readManifest reads a manifest to compare it with the catalog. Whoever may write
// to the directory of a VM's disks may have put something else in its place, which
// is not waited for, and says nothing.
func readManifest(path, name string) (data []byte, err error) {
	dir, err := blockdev.OpenDir(path, "")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	return dir.ReadFile(manifestDir, name, maxManifest)
}

// vmManifest is what the catalog knows of a VM's disks and of all their layers. It
// stands in each directory that holds one of them, and the one written last
// counts.
type vmManifest struct {
	Version   int             `json:"version"`
	Written   time.Time       `json:"written"`
	VM        catalog.VM      `json:"vm"`
	Disks     []catalog.Disk  `json:"disks"`
	Layers    []catalog.Layer `json:"layers"`
	Snapshots []string        `json:"snapshots"` // ids; each has a manifest of its own
	// Preview is the trial state that the VM runs, nil when it runs none.
	Preview *catalog.Preview `json:"preview,omitempty"`
}

// vmManifestPrefix begins the names of these manifests, before the VM's id.
const vmManifestPrefix = "vm-"

// keepManifests brings the manifests of a VM up to the catalog at the end of an
// operation that may have changed its layers or snapshots.
func (a *Agent) keepManifests(ctx context.Context, o *op.Op, v *vm, kind op.Kind) {
	if v == nil || kind == op.KindFreeze || kind == op.KindVerify {
		return
	}
	stale, err := a.staleManifests(context.WithoutCancel(ctx), v)
	for _, m := range stale {
		err = errors.Join(err, m.bring())
	}
	if err != nil {
		o.Warn(op.Warning{Code: warnManifest, Message: err.Error()})
	}
}

// staleManifest is one that does not say what the catalog does.
type staleManifest struct {
	root, dir, name string
	data            []byte // what it should hold; nil for one that should not be there
	missing         bool
}

func (m staleManifest) path() string { return filepath.Join(m.dir, manifestDir, m.name) }

// bring writes the manifest, or removes it.
func (m staleManifest) bring() (err error) {
	dir, err := blockdev.OpenDir(m.dir, m.root)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	if m.data == nil {
		return dir.Remove(filepath.Join(manifestDir, m.name))
	}
	return dir.WriteFile(manifestDir, m.name, m.data)
}

// staleManifests compares the manifests of a VM with the catalog.
func (a *Agent) staleManifests(ctx context.Context, v *vm) ([]staleManifest, error) {
	disks, layers, snapshots, err := a.records(ctx, v.id)
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	m := vmManifest{Version: manifestVersion, VM: v.rec, Disks: disks, Layers: layers, Snapshots: []string{}}
	v.mu.Unlock()
	if p, open, err := a.catalog.Preview(ctx, v.id); err != nil {
		return nil, err
	} else if open {
		m.Preview = &p
	}
	dirs, kept := map[string]bool{}, len(snapshots) > 0
	for _, l := range layers {
		kept = kept || l.Covered && !l.Foreign
		if !l.Foreign && (l.Device == "" || manifestDirOf(l, layers) != "") {
			dirs[manifestDirOf(l, layers)] = true
		}
	}
	var stale []staleManifest
	for _, s := range snapshots {
		m.Snapshots = append(m.Snapshots, s.ID)
		missing, err := missingManifests(v, s, disks, layers)
		if err != nil {
			return nil, err
		}
		stale = append(stale, missing...)
	}
	root := v.root()
	for _, dir := range sortedKeys(dirs) {
		name := vmManifestPrefix + v.id + ".json"
		old, err := readManifest(root+dir, name)
		missing := errors.Is(err, fs.ErrNotExist)
		if err != nil && !missing {
			return nil, err
		}
		if !kept {
			if !missing {
				stale = append(stale, staleManifest{root: root, dir: dir, name: name})
			}
			continue
		}
		if !missing && m.same(old) {
			continue
		}
		m.Written = time.Now().UTC()
		data, err := json.MarshalIndent(m, "", "  ")
		if err != nil {
			return nil, err
		}
		stale = append(stale, staleManifest{root, dir, name, data, missing})
	}
	return stale, nil
}

// same reports whether a manifest says the same of the VM's disks and layers.
// When it was seen and how it ended is nothing that a manifest is for.
func (m vmManifest) same(data []byte) bool {
	var old vmManifest
	if json.Unmarshal(data, &old) != nil {
		return false
	}
	old.Written, old.VM.LastSeen, old.VM.Stopped = m.Written, m.VM.LastSeen, m.VM.Stopped
	was, err := json.Marshal(old)
	is, errIs := json.Marshal(m)
	return err == nil && errIs == nil && bytes.Equal(was, is)
}

// missingManifests returns those that a snapshot should have and has not, or that
// say something else of it.
func missingManifests(v *vm, s catalog.Snapshot, disks []catalog.Disk, layers []catalog.Layer) ([]staleManifest, error) {
	v.mu.Lock()
	m := manifest{Version: manifestVersion, VM: v.rec, Snapshot: s, Disks: disks}
	v.mu.Unlock()
	dirs := map[string]bool{}
	for _, d := range s.Disks {
		if l := layerOf(layers, d.LayerID); l.ID != "" {
			m.Layers = append(m.Layers, l)
			dirs[manifestDirOf(l, layers)] = true
		}
	}
	var stale []staleManifest
	root := v.root()
	for _, dir := range sortedKeys(dirs) {
		data, err := readManifest(root+dir, s.ID+".json")
		missing := errors.Is(err, fs.ErrNotExist)
		if err != nil && !missing {
			return nil, err
		}
		if !missing && m.sameSnapshot(data) {
			continue
		}
		if data, err = json.MarshalIndent(m, "", "  "); err != nil {
			return nil, err
		}
		stale = append(stale, staleManifest{root, dir, s.ID + ".json", data, missing})
	}
	return stale, nil
}

// sameSnapshot reports whether a manifest says the same of the snapshot itself.
func (m manifest) sameSnapshot(data []byte) bool {
	var old manifest
	if json.Unmarshal(data, &old) != nil {
		return false
	}
	old.Snapshot.State = cmp.Or(old.Snapshot.State, catalog.PointValid)
	was, err := json.Marshal(old.Snapshot)
	is, errIs := json.Marshal(m.Snapshot)
	return err == nil && errIs == nil && bytes.Equal(was, is)
}

// snapshotOf returns the id of the snapshot that a manifest's name is for.
func snapshotOf(name string) (string, bool) {
	id, ok := strings.CutSuffix(name, ".json")
	return id, ok && !strings.HasPrefix(id, vmManifestPrefix)
}
