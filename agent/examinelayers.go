package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/blockdev"
)

// What is found out about layers.
const (
	findLayerMissing  = "layer-missing"
	findLayerReplaced = "layer-replaced"
	findLayerDamaged  = "layer-damaged"
	findLayerLeaks    = "layer-leaks"
	findBackingWrong  = "backing-path-wrong"
	findLaunchAstray  = "launch-path-elsewhere"
	findNotSettled    = "disk-not-settled"
	findUnprotected   = "layer-not-protected"
)

// lookForLayers looks whether each layer's permanent name leads to its file.
func (x *examination) lookForLayers(ctx context.Context) error {
	for _, l := range x.layers {
		f, err := fileAt(x.path(l))
		switch {
		case err == nil && f.is(l):
			x.files[l.ID] = f
		case err == nil:
			x.found(ctx, Finding{
				Code: findLayerReplaced, Message: fmt.Sprintf("disk %s: %s is another file than the layer that was there", x.device(l), l.Path),
				Hint: "put the file back that was there; whatever needs the layer cannot be restored without it",
			}, nil)
		case errors.Is(err, fs.ErrNotExist):
			name := x.otherName(l)
			var repair func(context.Context) error
			if name != "" {
				repair = func(context.Context) error { return x.nameAgain(l, name) }
			}
			x.found(ctx, Finding{
				Code: findLayerMissing, Message: fmt.Sprintf("disk %s: the layer %s is not there", x.device(l), l.Path),
				Repair: "give the file that is called " + name + " its permanent name again",
				Hint:   missingHint(name),
			}, repair)
		default:
			x.found(ctx, Finding{
				Code: findLayerMissing, Message: fmt.Sprintf("disk %s: the layer cannot be looked at: %v", x.device(l), err),
				Hint: "mount its file system, or repair it",
			}, nil)
		}
	}
	return nil
}

func missingHint(name string) string {
	if name != "" {
		return ""
	}
	return "mount its file system, or put the file back from a backup; whatever needs the layer cannot be restored without it"
}

// otherName finds another name of a layer's file beside its own, such as the
// launch path.
func (x *examination) otherName(l catalog.Layer) string {
	dir := filepath.Dir(x.path(l))
	entries, err := os.ReadDir(dir)
	if err != nil || l.Device != "" || x.root != "" {
		return ""
	}
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		if f, err := fileAt(filepath.Join(dir, e.Name())); err == nil && f.is(l) {
			return e.Name()
		}
	}
	return ""
}

// nameAgain gives a layer its permanent name by a hard link.
func (x *examination) nameAgain(l catalog.Layer, from string) error {
	return x.inDir(l.Path, func(dir *blockdev.Dir, name string) error {
		if l.Immutable { // such a file takes no further name
			if err := dir.SetImmutable(from, false); err != nil {
				return err
			}
		}
		err := dir.Name(from, name)
		if l.Immutable {
			err = errors.Join(err, dir.SetImmutable(from, true))
		}
		return errors.Join(err, dir.Sync())
	})
}

// inDir calls f with the directory and the name of a path.
func (x *examination) inDir(path string, f func(dir *blockdev.Dir, name string) error) (err error) {
	dir, err := blockdev.OpenDir(filepath.Dir(path), x.root)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	return f(dir, filepath.Base(path))
}

// lookAtHeaders compares what the images say of themselves with the catalog.
func (x *examination) lookAtHeaders(ctx context.Context) error {
	for _, l := range x.layers {
		if _, there := x.files[l.ID]; !there || l.Format != "qcow2" {
			continue
		}
		h, err := blockdev.ReadHeaderFile(x.path(l))
		if err == nil && h.Corrupt {
			err = errors.New("it is marked as corrupt")
		}
		if err != nil {
			x.found(ctx, Finding{
				Code: findLayerDamaged, Message: fmt.Sprintf("disk %s: %s: %v", x.device(l), l.Path, err),
				Hint: "put the file back from a backup; whatever needs the layer cannot be restored from it",
			}, nil)
			delete(x.files, l.ID) // what is in it needs no further look
			continue
		}
		x.lookAtBacking(ctx, l, h)
	}
	return nil
}

// lookAtBacking looks whether an image names the layer below it.
func (x *examination) lookAtBacking(ctx context.Context, l catalog.Layer, h blockdev.Header) {
	parent := layerOf(x.layers, l.Parent)
	if parent.ID == "" && l.Parent != "" {
		return // another VM's: a clone lies on it
	}
	named := h.BackingPath(l.Path)
	f, err := fileAt(x.root + named)
	if named == "" && parent.ID == "" || named != "" && parent.ID != "" && err == nil && f.is(parent) && h.BackingFormat == parent.Format {
		return
	}
	finding := Finding{
		Code: findBackingWrong, Message: fmt.Sprintf("disk %s: %s names the backing file %q (%s), and lies on %q (%s)",
			x.device(l), l.Path, named, h.BackingFormat, parent.Path, parent.Format),
		Repair: "have it name " + parent.Path,
	}
	_, below := x.files[parent.ID]
	if !below && named == parent.Path {
		return // what is wrong is told of the layer below
	}
	// Only a name that leads nowhere is certain to be the wrong one of the two.
	certain := below && !l.Foreign && named != "" && (errors.Is(err, fs.ErrNotExist) || err == nil && f.is(parent))
	switch {
	case !certain:
		finding.Hint = "find out which of the two it was made on: with the wrong one it reads as garbage"
		x.found(ctx, finding, nil)
	case x.run != nil:
		finding.Hint = "vmsnap doctor " + x.vm.name() + " --repair, when the VM is stopped"
		x.found(ctx, finding, nil)
	default:
		x.found(ctx, finding, func(ctx context.Context) error { return x.rebase(ctx, l, parent) })
	}
}

// rebase has a layer name the one below it, in its header only. A launch guard
// keeps others from writing to it as long as its flag is lifted.
func (x *examination) rebase(ctx context.Context, l, parent catalog.Layer) (err error) {
	var locks []*blockdev.Lock
	defer func() { err = errors.Join(err, closeAll(locks)) }()
	for _, path := range []string{l.Path, parent.Path} {
		lock, err := blockdev.LockNoWriters(path)
		if err != nil {
			return lockError(path, err)
		}
		locks = append(locks, lock)
	}
	if l.Immutable {
		bare, err := x.unflag(ctx, x.o.ID(), l)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, bare.end(false)) }()
	}
	if err := blockdev.Rebase(ctx, l.Path, parent.Path, parent.Format); err != nil {
		return err
	}
	return x.inDir(l.Path, func(dir *blockdev.Dir, name string) error { return dir.SyncFile(name) })
}

// lookAtLaunchPaths looks whether a start of the VM opens the active layers.
func (x *examination) lookAtLaunchPaths(ctx context.Context) error {
	for _, d := range x.disks {
		active := layerOf(x.layers, d.ActiveLayer)
		if d.Removed || active.ID == "" {
			continue
		}
		if d.SettleNeeded {
			x.unsettled(ctx, d)
			continue
		}
		launch, err := fileAt(x.root + d.LaunchPath)
		if err == nil && launch.is(active) {
			continue
		}
		finding := Finding{
			Code: findLaunchAstray, Message: fmt.Sprintf("the launch path %s of disk %s does not lead to its newest layer %s", d.LaunchPath, d.Device, active.Path),
			Repair: "point it at " + active.Path,
		}
		_, there := x.files[active.ID]
		ours := errors.Is(err, fs.ErrNotExist) || err == nil && launch.in(x.chainOf(d)).ID != ""
		if !ours || !there || x.root != "" || active.Device != "" || launch.device != "" {
			finding.Hint = "it leads to a file that is not the VM's: put back what was there"
			x.found(ctx, finding, nil)
			continue
		}
		x.found(ctx, finding, func(ctx context.Context) error { return x.point(ctx, d, active) })
	}
	return nil
}

// point makes a launch path lead to the active layer again.
func (x *examination) point(ctx context.Context, d catalog.Disk, active catalog.Layer) error {
	if _, err := os.Lstat(d.LaunchPath); !errors.Is(err, fs.ErrNotExist) {
		return x.pointPast(ctx, x.o.ID(), d.LaunchPath, active.Path, active)
	}
	in, err := blockdev.OpenDir(filepath.Dir(active.Path), "")
	if err != nil {
		return err
	}
	err = x.inDir(d.LaunchPath, func(dir *blockdev.Dir, name string) error {
		return errors.Join(dir.PointAt(name, in, filepath.Base(active.Path)), dir.Sync())
	})
	return errors.Join(err, in.Close())
}

// unsettled tells of a disk that is settled when the VM has stopped.
func (x *examination) unsettled(ctx context.Context, d catalog.Disk) {
	finding := Finding{
		Code: findNotSettled, Message: fmt.Sprintf("the launch path of disk %s does not lead to its newest layer", d.Device), Repair: "settle it",
	}
	switch {
	case x.run != nil:
		finding.Hint = "it is settled when the VM has stopped, by a vmsnapd that runs then"
		x.found(ctx, finding, nil)
	case x.vm.hasStrayed(d.ID):
		finding.Hint = "the VM was started on a layer that others depend on: decide which state is wanted; vmsnap vm show lists the layers"
		x.found(ctx, finding, nil)
	default:
		x.found(ctx, finding, func(ctx context.Context) error { return x.settleDisk(ctx, x.o, d) })
	}
}

// lookAtProtection looks whether anybody could write to a covered layer.
func (x *examination) lookAtProtection(ctx context.Context) error {
	for _, l := range x.layers {
		if _, there := x.files[l.ID]; !there || !l.Covered || l.Foreign || l.Device != "" {
			continue
		}
		err := x.inDir(l.Path, func(dir *blockdev.Dir, name string) error {
			return x.lookAtFlag(ctx, l, dir, name)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (x *examination) lookAtFlag(ctx context.Context, l catalog.Layer, dir *blockdev.Dir, name string) error {
	set, err := dir.Immutable(name)
	bare := errors.Is(err, blockdev.ErrNoImmutable)
	if bare || err == nil && !set && !l.Immutable {
		fi, look := dir.Root().Lstat(name)
		if look != nil {
			return look
		}
		set, err = fi.Mode().Perm()&0o222 == 0, nil
	}
	if err != nil || set {
		return err
	}
	x.found(ctx, Finding{
		Code: findUnprotected, Message: fmt.Sprintf("disk %s: nothing keeps others from writing to the layer %s, on which newer ones lie", x.device(l), l.Path),
		Repair: "make it immutable again",
	}, func(context.Context) error {
		lock, err := blockdev.LockNoWriters(x.path(l))
		if err != nil {
			return lockError(l.Path, err)
		}
		if bare || !l.Immutable {
			err = dir.Root().Chmod(name, 0o444)
		} else {
			err = dir.SetImmutable(name, true)
		}
		return errors.Join(err, lock.Close())
	})
	return nil
}

// checkTimeout bounds the check of one image: a terabyte has 128 MiB of tables,
// which are read several times.
const checkTimeout = 5 * time.Minute

// lookAtImages has qemu-img verify the structures of the images that nobody writes
// to. What was found whole before and has not changed since is not read again.
func (x *examination) lookAtImages(ctx context.Context) error {
	for _, l := range x.layers {
		if _, there := x.files[l.ID]; !there || l.Format != "qcow2" || !l.Covered && x.run != nil {
			continue
		}
		began := time.Now()
		stamp, err := blockdev.StampOf(x.path(l))
		if err != nil || x.vm.whole.has(stamp) {
			continue
		}
		limited, cancel := context.WithTimeout(ctx, checkTimeout)
		result, err := blockdev.CheckAlone(limited, x.path(l))
		cancel()
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil:
			x.found(ctx, Finding{
				Code: findLayerDamaged, Message: fmt.Sprintf("disk %s: %s cannot be checked: %v", x.device(l), l.Path, err), Hint: "qemu-img check -f qcow2 tells more",
			}, nil)
		case result.Corruptions+result.Errors > 0:
			x.found(ctx, Finding{
				Code: findLayerDamaged, Message: fmt.Sprintf("disk %s: %s has %d faults", x.device(l), l.Path, result.Corruptions+result.Errors),
				Hint: "qemu-img check -f qcow2 tells more; put the file back from a backup, or copy what can be read",
			}, nil)
		case result.Leaks > 0 && !l.Covered: // in a covered one they harm nobody, and nothing writes to it
			x.found(ctx, Finding{
				Code: findLayerLeaks, Message: fmt.Sprintf("disk %s: %s has %d clusters that nothing uses", x.device(l), l.Path, result.Leaks),
				Repair: "give them back",
			}, func(ctx context.Context) error { return x.giveBack(ctx, l) })
		case stamp.Tells(began.Add(-stampAge)):
			x.vm.whole.add(stamp)
		}
	}
	return nil
}

// giveBack frees the clusters of an active layer that nothing uses.
func (x *examination) giveBack(ctx context.Context, l catalog.Layer) error {
	lock, err := blockdev.LockNoWriters(l.Path)
	if err != nil {
		return lockError(l.Path, err)
	}
	return errors.Join(blockdev.FreeLeaks(ctx, l.Path), lock.Close())
}

// wholeImages remembers the images that were found whole.
type wholeImages struct {
	mu     sync.Mutex
	stamps map[blockdev.FileID]blockdev.Stamp
}

func (w *wholeImages) has(s blockdev.Stamp) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	known, has := w.stamps[s.FileID]
	return has && known == s
}

func (w *wholeImages) add(s blockdev.Stamp) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stamps == nil {
		w.stamps = map[blockdev.FileID]blockdev.Stamp{}
	}
	w.stamps[s.FileID] = s
}
