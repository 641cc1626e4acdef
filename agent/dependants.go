package agent

import (
	"context"
	"errors"
	"path/filepath"
	"slices"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/blockdev"
)

// outsiders finds what lies on the layers of a VM and is none of them: layers of
// other disks and VMs, clones, and images that only their own headers tell of. It
// returns what to call them, by the id of the layer that they lie on. QEMU knows
// only what it has open, so nothing but this keeps a merge from corrupting them.
//
// layers are all layers of the VM, prefix is where their paths begin.
func (a *Agent) outsiders(ctx context.Context, v *vm, layers []catalog.Layer, prefix string) (map[string][]string, error) {
	found := map[string][]string{}
	others, err := a.catalog.Dependants(ctx, v.id)
	if err != nil {
		return nil, err
	}
	for _, l := range others {
		found[l.Parent] = append(found[l.Parent], l.Path)
	}
	byFile := map[blockdev.FileID]catalog.Layer{}
	dirs := map[string]bool{}
	for _, l := range layers {
		if l.Foreign || l.Device != "" {
			continue
		}
		byFile[blockdev.FileID{Dev: l.Dev, Ino: l.Ino}] = l
		dirs[filepath.Dir(l.Path)] = true
		clones, err := a.clonesOn(ctx, l.ID)
		if err != nil {
			return nil, err
		}
		found[l.ID] = append(found[l.ID], clones...)
		shared, err := a.catalog.LayersOfFile(ctx, l.Dev, l.Ino)
		if err != nil {
			return nil, err
		}
		for _, o := range shared {
			// Inode numbers are used again, so what was recorded may be gone.
			if file, err := fileAt(o.Path); o.DiskID != l.DiskID && err == nil && file.is(l) {
				found[l.ID] = append(found[l.ID], "a disk that has "+o.Path+" as a layer too")
			}
		}
	}
	for _, dir := range sortedKeys(dirs) {
		if err := strangers(ctx, dir, prefix, byFile, found); err != nil {
			return nil, err
		}
	}
	return found, nil
}

// strangers finds the images in a directory that lie on a layer, and are not the
// layers that the catalog has there.
func strangers(ctx context.Context, path, prefix string, byFile map[blockdev.FileID]catalog.Layer, found map[string][]string) (err error) {
	dir, err := blockdev.OpenDir(path, prefix)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	images, err := dir.BackedImages(ctx)
	if err != nil {
		return err
	}
	for _, image := range images {
		below, ours := byFile[image.Backing]
		if !ours {
			continue
		}
		l, known := byFile[image.File]
		if known && l.Parent == below.ID || slices.Contains(found[below.ID], image.Path) {
			continue
		}
		found[below.ID] = append(found[below.ID], image.Path)
	}
	return nil
}

// dependantsOf says what lies on a layer in terms of what an operator knows: the
// nearest snapshots on each branch, or the state that a disk has now.
func (t *layerTree) dependantsOf(id string, snapshots []catalog.Snapshot) []string {
	var names []string
	for _, child := range t.children[id] {
		points := pointsAt(snapshots, child)
		if d, active := t.active[child]; active {
			points = append(points, "the state of disk "+d.Device+" now")
		}
		points = append(points, t.held[child]...)
		if len(points) == 0 {
			points = t.dependantsOf(child, snapshots)
		}
		names = append(names, points...)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// pointsAt returns the names of the snapshots that a layer is a restore point of.
func pointsAt(snapshots []catalog.Snapshot, layer string) []string {
	var names []string
	for _, s := range snapshots {
		if slices.ContainsFunc(s.Disks, func(d catalog.SnapshotDisk) bool { return d.LayerID == layer }) {
			names = append(names, s.VMName+"/"+s.Name)
		}
	}
	return names
}
