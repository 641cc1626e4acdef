package agent

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/blockdev"
)

// CloneView is a linked clone: an image that lies on a restore point.
type CloneView struct {
	Disk    string // of the snapshot, that it is a clone of
	Path    string // where it is, or was made when it is missing
	VM      string // the VM that it was made for; empty for a disk alone
	Created time.Time
	Missing bool // it is not there any more; it may have been moved
}

// findClone finds the file of a clone. It is known by its inode, since the launch
// path of a VM comes to lead to another layer: ok is false when it is not there.
func (a *Agent) findClone(ctx context.Context, c catalog.Clone) (path string, ok bool, err error) {
	id := blockdev.FileID{Dev: c.Dev, Ino: c.Ino}
	info, err := blockdev.StatPath(c.Path)
	if err == nil && info.FileID == id {
		return c.Path, true, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return c.Path, false, err
	}
	l, err := a.catalog.LayerByInode(ctx, c.Dev, c.Ino)
	if fault.Of(err) == fault.NotFound {
		return c.Path, false, nil
	}
	if err != nil {
		return c.Path, false, err
	}
	if info, err := blockdev.StatPath(l.Path); err == nil && info.FileID == id {
		return l.Path, true, nil
	}
	return c.Path, false, nil
}

// liesOn reports whether an image still names a layer as its backing file. One
// that was flattened does not.
func liesOn(path string, l catalog.Layer) (bool, error) {
	h, err := blockdev.ReadHeaderFile(path)
	if err != nil {
		return false, err
	}
	return h.Backing == l.Path, nil
}

// clonesOn returns the clones that lie on a layer. Those that are known not to do
// so any more are forgotten; those that are missing count, because they may have
// been moved.
func (a *Agent) clonesOn(ctx context.Context, layerID string) (paths []string, err error) {
	if layerID == "" {
		return nil, nil // of a disk that the snapshot excludes
	}
	clones, err := a.catalog.ClonesOf(ctx, layerID)
	if err != nil || len(clones) == 0 {
		return nil, err
	}
	layer, err := a.catalog.Layer(ctx, layerID)
	if err != nil {
		return nil, err
	}
	for _, c := range clones {
		path, found, err := a.findClone(ctx, c)
		if err != nil {
			return nil, err
		}
		if !found {
			paths = append(paths, path+" (missing)")
			continue
		}
		if on, err := liesOn(path, layer); err != nil {
			return nil, err
		} else if on {
			paths = append(paths, path)
			continue
		}
		if err := a.catalog.Update(ctx, func(tx *catalog.Tx) error { return tx.DeleteClone(ctx, c.Path) }); err != nil {
			return nil, err
		}
	}
	return paths, nil
}

// checkNoClones fails, naming them, while clones lie on a layer: it must stay as
// it is. Whoever merges layers asks before anything is changed, for the layer
// that is written to and for those that go.
func (a *Agent) checkNoClones(ctx context.Context, layerID string) error {
	paths, err := a.clonesOn(ctx, layerID)
	if err == nil && len(paths) > 0 {
		err = fault.New(fault.HasDependants, "clones lie on the layer %s: %s", layerID, strings.Join(paths, ", ")).
			WithHint("flatten them (qemu-img rebase -b \"\" while nobody uses them) or remove them; vmsnap disk forget PATH forgets one that is missing")
	}
	return err
}

// ForgetClone forgets a clone that is not there any more, or does not lie on its
// layer.
func (a *Agent) ForgetClone(ctx context.Context, path string) error {
	c, err := a.catalog.Clone(ctx, path)
	if err != nil {
		return err
	}
	at, found, err := a.findClone(ctx, c)
	if err != nil {
		return err
	}
	if found {
		layer, err := a.catalog.Layer(ctx, c.LayerID)
		if err != nil {
			return err
		}
		if on, err := liesOn(at, layer); err != nil {
			return err
		} else if on {
			return fault.New(fault.HasDependants, "the clone %s is there, and lies on %s", at, layer.Path).WithHint("remove the file first")
		}
	}
	return a.catalog.Update(ctx, func(tx *catalog.Tx) error { return tx.DeleteClone(ctx, path) })
}

// showClones adds their clones to the snapshots of a VM.
func (a *Agent) showClones(ctx context.Context, v *vm, views []*SnapshotView) {
	clones, err := a.catalog.Clones(ctx, v.id)
	if err != nil {
		a.log.Warn("clones cannot be read", "vm", v.name(), "error", err)
		return
	}
	if len(clones) == 0 {
		return
	}
	var paths []string
	for _, c := range clones {
		paths = append(paths, c.Path)
	}
	stats := v.stats.look(ctx, paths)
	for _, view := range views {
		for _, d := range view.Disks {
			for _, c := range clones {
				if c.LayerID != d.LayerID {
					continue
				}
				_, there := stats[c.Path]
				view.Clones = append(view.Clones, CloneView{Disk: d.Device, Path: c.Path, VM: c.VMName, Created: c.Created, Missing: !there})
			}
		}
		slices.SortStableFunc(view.Clones, func(x, y CloneView) int { return x.Created.Compare(y.Created) })
	}
}
