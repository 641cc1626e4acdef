package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/blockdev"
)

// What is found out about files that nothing accounts for, and about memory.
const (
	findLayerOrphaned  = "layer-orphaned"
	findNameLeft       = "name-left-behind"
	findMemoryMissing  = "memory-missing"
	findMemoryAltered  = "memory-altered"
	findMemoryLocked   = "memory-locked"
	findMemoryOrphaned = "memory-orphaned"
)

// quarantineDir is where files go that seem to be of no use, beside the manifests:
// whoever misses one finds it there.
const quarantineDir = manifestDir + "/quarantine"

// maxStrangers bounds the files of one directory that are looked at.
const maxStrangers = 100000

// layerFile matches the names that layers are given, and takes them apart: the
// stem of the launch path's name, and the id.
var layerFile = regexp.MustCompile(`^(.+)\.([0-9a-f]{8})(-[0-9]+b?)?\.(qcow2|raw)$`)

// memoryFile matches the names of memory files.
var memoryFile = regexp.MustCompile(`^([0-9a-f]{8})\` + memorySuffix + `$`)

// lookForStrangers looks for files that have the names of ours, in the
// directories of this VM, and that no VM's records account for.
func (x *examination) lookForStrangers(ctx context.Context) error {
	if x.root != "" {
		return nil // what others do there cannot be known
	}
	known, err := x.knownFiles(ctx)
	if err != nil {
		return err
	}
	stems := map[string]bool{}
	for _, d := range x.disks {
		name := filepath.Base(d.LaunchPath)
		stems[strings.TrimSuffix(name, filepath.Ext(name))] = true
	}
	for _, dir := range x.dirs() {
		entries, err := readDir(dir)
		if err != nil {
			continue // its layers are missing, and told of
		}
		for _, e := range entries {
			path := filepath.Join(dir, e.Name())
			if stem, left := strings.CutSuffix(e.Name(), blockdev.LinkSuffix); left && x.launches(filepath.Join(dir, stem)) {
				x.lookAtLink(ctx, path, known)
				continue
			}
			m := layerFile.FindStringSubmatch(e.Name())
			if m == nil || !stems[m[1]] || !e.Type().IsRegular() {
				continue
			}
			if info, err := blockdev.StatPath(path); err == nil && !known[info.FileID] {
				x.orphan(ctx, path, entries)
			}
		}
	}
	return x.lookForStrangeMemory(ctx)
}

// readDir lists a directory, of which there may be too much.
func readDir(path string) ([]os.DirEntry, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	entries, err := f.ReadDir(maxStrangers)
	if errors.Is(err, io.EOF) {
		err = nil // it is empty
	}
	return entries, errors.Join(err, f.Close())
}

// launches reports whether a path is a launch path of the VM.
func (x *examination) launches(path string) bool {
	return slices.ContainsFunc(x.disks, func(d catalog.Disk) bool { return d.LaunchPath == path })
}

// knownFiles are the files of all VMs' layers.
func (x *examination) knownFiles(ctx context.Context) (map[blockdev.FileID]bool, error) {
	vms, err := x.catalog.VMs(ctx)
	if err != nil {
		return nil, err
	}
	known := map[blockdev.FileID]bool{}
	for _, rec := range vms {
		layers, err := x.catalog.Layers(ctx, rec.ID)
		if err != nil {
			return nil, err
		}
		for _, l := range layers {
			known[blockdev.FileID{Dev: l.Dev, Ino: l.Ino}] = true
		}
	}
	return known, nil
}

// lookAtLink finds a link that was to become the launch path, and is only one more
// name of a layer.
func (x *examination) lookAtLink(ctx context.Context, path string, known map[blockdev.FileID]bool) {
	info, err := os.Lstat(path)
	if err != nil {
		return
	}
	file, err := blockdev.StatPath(path)
	if info.Mode()&os.ModeSymlink == 0 && (err != nil || !known[file.FileID] || file.Links < 2) {
		return // not one of ours
	}
	x.found(ctx, Finding{
		Code: findNameLeft, Message: fmt.Sprintf("%s is a name that an interrupted change of the launch path has left", path), Repair: "remove that name",
	}, func(context.Context) error {
		return x.inDir(path, func(dir *blockdev.Dir, name string) error {
			lift := info.Mode()&os.ModeSymlink == 0
			flagged := false
			if lift {
				if set, err := dir.Immutable(name); err == nil && set {
					flagged = true
					if err := dir.SetImmutable(name, false); err != nil {
						return err
					}
				}
			}
			other := x.otherNameOf(filepath.Dir(path), name, file.FileID)
			err := dir.Remove(name)
			if flagged && other != "" {
				err = errors.Join(err, dir.SetImmutable(other, true))
			}
			return errors.Join(err, dir.Sync())
		})
	})
}

// otherNameOf finds another name of a file in a directory.
func (x *examination) otherNameOf(dir, but string, id blockdev.FileID) string {
	entries, err := readDir(dir)
	if err != nil {
		return ""
	}
	for _, e := range entries {
		if e.Name() == but || !e.Type().IsRegular() {
			continue
		}
		if info, err := blockdev.StatPath(filepath.Join(dir, e.Name())); err == nil && info.FileID == id {
			return e.Name()
		}
	}
	return ""
}

// orphan tells of a layer that nothing accounts for. It may be all that is left of
// something, so that it is never deleted.
func (x *examination) orphan(ctx context.Context, path string, beside []os.DirEntry) {
	f := Finding{
		Code: findLayerOrphaned, Message: fmt.Sprintf("%s has the name of a layer, and no snapshot and no disk accounts for it", path),
		Repair: "move it to " + filepath.Join(filepath.Dir(path), quarantineDir),
	}
	if user := userOf(path, beside); user != "" {
		f.Hint = user + "; vmsnap doctor --rebuild finds snapshots that the catalog has lost"
		x.found(ctx, f, nil)
		return
	}
	x.found(ctx, f, func(context.Context) error {
		return x.inDir(path, func(dir *blockdev.Dir, name string) error {
			to, err := dir.Quarantine(name, quarantineDir)
			if err == nil {
				x.o.Logger().Warn("a file was moved to the quarantine", "file", path, "to", dir.Path(to))
			}
			return err
		})
	})
}

// userOf says who uses an image: a process, or an image beside it that lies on
// it. What cannot be found out counts as used.
func userOf(path string, beside []os.DirEntry) string {
	used, err := blockdev.InUse(path)
	switch {
	case err != nil:
		return "it cannot be told whether it is in use: " + err.Error()
	case used:
		return "a process has it open"
	}
	id, err := blockdev.StatPath(path)
	if err != nil {
		return "it cannot be looked at: " + err.Error()
	}
	for _, e := range beside {
		other := filepath.Join(filepath.Dir(path), e.Name())
		if !e.Type().IsRegular() || other == path {
			continue
		}
		h, err := blockdev.ReadHeaderFile(other)
		if err != nil || h.Backing == "" {
			continue
		}
		if info, err := blockdev.StatPath(h.BackingPath(other)); err == nil && info.FileID == id.FileID {
			return other + " lies on it"
		}
	}
	return ""
}

// lookAtMemory looks for the snapshots' memory files.
func (x *examination) lookAtMemory(ctx context.Context) error {
	for _, s := range x.snapshots {
		if s.Memory == nil {
			continue
		}
		name := s.VMName + "/" + s.Name
		fi, err := os.Stat(s.Memory.Path)
		if err != nil {
			x.found(ctx, Finding{
				Code: findMemoryMissing, Message: fmt.Sprintf("snapshot %s: its memory cannot be found: %v", name, err),
				Hint: "put the file back from a backup; the disks can be restored without it",
			}, nil)
			continue
		}
		if uint64(fi.Size()) != s.Memory.Size {
			err = fmt.Errorf("it has %d bytes instead of %d", fi.Size(), s.Memory.Size)
		} else if locked := x.locked(s.Memory); locked != nil {
			x.found(ctx, Finding{
				Code: findMemoryLocked, Message: fmt.Sprintf("snapshot %s: its memory cannot be read: %s", name, locked.Message), Hint: locked.Hint,
			}, nil)
			continue
		} else if x.deep {
			err = x.readMemory(ctx, s.Memory)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			x.found(ctx, Finding{
				Code: findMemoryAltered, Message: fmt.Sprintf("snapshot %s: %s is not what was saved: %v", name, s.Memory.Path, err),
				Hint: "put the file back from a backup; the disks can be restored without it",
			}, nil)
		}
	}
	return nil
}

// locked returns why there is no key for an encrypted memory file, nil when there is
// one, or when that is not what is wrong with it.
func (x *examination) locked(m *catalog.SavedMemory) *fault.Error {
	if m.Recipient == "" {
		return nil
	}
	dir, err := openMemoryDir(filepath.Dir(m.Path))
	if err != nil {
		return nil //nolint:nilerr // reading it tells
	}
	defer func() { _ = dir.Close() }()
	_, err = x.keyFor(dir, m.Path)
	locked, _ := errors.AsType[*fault.Error](err)
	return locked
}

// readMemory reads all of a memory file and compares it with what was recorded.
func (x *examination) readMemory(ctx context.Context, m *catalog.SavedMemory) error {
	sum, err := x.verifyMemory(ctx, m.Path, func(done, total uint64) { x.progress(done, total) })
	if err == nil && sum.StoredChecksum != m.Checksum {
		err = errors.New("its checksum is another one")
	}
	return err
}

func (x *examination) progress(done, total uint64) {
	if x.o != nil {
		x.o.Progress(done, total, "bytes")
	}
}

// lookForStrangeMemory looks for memory files that no snapshot has. One that an
// operation of another VM has made is left to that VM.
func (x *examination) lookForStrangeMemory(ctx context.Context) error {
	all, err := x.catalog.Snapshots(ctx, "")
	if err != nil {
		return err
	}
	known, dirs := map[string]bool{}, map[string]bool{}
	for _, s := range all {
		if s.Memory != nil {
			known[s.Memory.Path] = true
		}
	}
	if p, open, err := x.catalog.Preview(ctx, x.vm.id); err != nil {
		return err
	} else if open && p.Former != nil && p.Former.Memory != nil {
		known[p.Former.Memory.Path] = true
	}
	for _, dir := range x.dirs() {
		dirs[filepath.Join(dir, manifestDir)] = true
	}
	if x.cfg.MemoryDir != "" {
		dirs[x.cfg.MemoryDir] = true
	}
	for _, dir := range sortedKeys(dirs) {
		entries, err := readDir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil && len(entries) == 0 {
			return err
		}
		for _, e := range entries {
			m, path := memoryFile.FindStringSubmatch(e.Name()), filepath.Join(dir, e.Name())
			if m == nil || !e.Type().IsRegular() || known[path] {
				continue
			}
			rec, err := x.catalog.Operation(ctx, m[1])
			if err == nil && rec.VMID != x.vm.id || err != nil && dir == x.cfg.MemoryDir {
				continue
			}
			x.found(ctx, Finding{
				Code: findMemoryOrphaned, Message: path + " is a memory file, and no snapshot has it",
				Repair: "move it to " + filepath.Join(dir, filepath.Base(quarantineDir)),
				Hint:   "",
			}, func(context.Context) error {
				return x.inDir(path, func(dir *blockdev.Dir, name string) error {
					_, err := dir.Quarantine(name, filepath.Base(quarantineDir))
					return err
				})
			})
		}
	}
	return nil
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
