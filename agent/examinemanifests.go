package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"

	"github.com/vmsnap/vmsnap/blockdev"
)

// What is found out about manifests.
const (
	findManifestMissing  = "manifest-missing"
	findManifestDiffers  = "manifest-differs"
	findManifestOrphaned = "manifest-orphaned"
)

// lookAtManifests looks whether the catalog could be made again from what stands
// beside the layers.
func (x *examination) lookAtManifests(ctx context.Context) error {
	stale, err := x.staleManifests(ctx, x.vm)
	if err != nil {
		return err
	}
	for _, m := range stale {
		f := Finding{Code: findManifestDiffers, Message: m.path() + " does not say what the catalog does", Repair: "write it anew"}
		switch {
		case m.missing:
			f.Code, f.Message = findManifestMissing, m.path()+" is not there, so that a catalog that is lost could not be made again"
		case m.data == nil:
			f.Repair = "remove it: nothing is left that it is for"
		}
		x.found(ctx, f, func(context.Context) error { return m.bring() })
	}
	for _, dir := range x.dirs() {
		x.lookForStrangeManifests(ctx, dir)
	}
	return nil
}

// lookForStrangeManifests looks for manifests of snapshots of this VM that the
// catalog does not know.
func (x *examination) lookForStrangeManifests(ctx context.Context, dir string) {
	entries, err := readDir(filepath.Join(x.root+dir, manifestDir))
	if err != nil {
		return // there are none, or they are missing, which is told of
	}
	known := map[string]bool{}
	for _, s := range x.snapshots {
		known[s.ID] = true
	}
	for _, e := range entries {
		id, ok := snapshotOf(e.Name())
		path := filepath.Join(dir, manifestDir, e.Name())
		if !ok || !e.Type().IsRegular() || known[id] {
			continue
		}
		data, err := readManifest(x.root+dir, e.Name())
		var m manifest
		if err != nil || json.Unmarshal(data, &m) != nil || m.VM.ID != x.vm.id {
			continue // another VM's, or somebody else's
		}
		x.strangeManifest(ctx, path, m)
	}
}

func (x *examination) strangeManifest(ctx context.Context, path string, m manifest) {
	f := Finding{
		Code: findManifestOrphaned, Message: fmt.Sprintf("%s is of the snapshot %s/%s, which is not known", path, m.VM.Name, m.Snapshot.Name),
		Repair: "move it to " + filepath.Join(filepath.Dir(path), filepath.Base(quarantineDir)),
	}
	for _, l := range m.Layers {
		if layerOf(x.layers, l.ID).ID != "" {
			continue
		}
		if file, err := fileAt(x.root + l.Path); err == nil && file.is(l) {
			f.Hint = "its layer " + l.Path + " is there: the catalog may be an older one than the files, from a backup"
			x.found(ctx, f, nil)
			return
		}
	}
	x.found(ctx, f, func(context.Context) error {
		return x.inDir(path, func(dir *blockdev.Dir, name string) error {
			_, err := dir.Quarantine(name, filepath.Base(quarantineDir))
			return err
		})
	})
}
