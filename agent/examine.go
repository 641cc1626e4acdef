package agent

import (
	"context"
	"path/filepath"
	"slices"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/op"
)

// entryRepair announces what the doctor is about to do.
const entryRepair = "repair"

// examination compares what the catalog knows of a VM with its files and, while
// it runs, with what QEMU has open. With an operation it puts right what it can:
// each repair is announced in the journal, and is one step that can be done again
// after a crash, or finds nothing to do then.
type examination struct {
	*Agent
	vm   *vm
	run  *run   // nil when the VM is stopped
	o    *op.Op // nil when nothing is to be changed
	deep bool

	root      string // where the VM's paths begin for this process
	disks     []catalog.Disk
	layers    []catalog.Layer
	snapshots []catalog.Snapshot
	files     map[string]file // by layer id; of those that are where they should be
	findings  []Finding
}

// examine looks at everything of a VM.
func (a *Agent) examine(ctx context.Context, v *vm, o *op.Op, deep bool) (*examination, error) {
	r, err := v.known(ctx)
	if err != nil {
		return nil, err
	}
	x := &examination{Agent: a, vm: v, run: r, o: o, deep: deep, root: v.root(), files: map[string]file{}}
	if x.disks, x.layers, x.snapshots, err = a.records(ctx, v.id); err != nil {
		return nil, err
	}
	for _, look := range []func(context.Context) error{
		x.lookForLayers, x.lookAtHeaders, x.lookAtLaunchPaths, x.lookAtProtection, x.lookAtGraph, x.lookAtMemory, x.lookAtManifests,
		x.lookForStrangers, x.lookAtPreview, x.lookAtGuest, x.lookAtImages,
	} {
		if err := look(ctx); err != nil {
			return nil, err
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
	return x, nil
}

// records returns what the catalog knows of a VM's disks.
func (a *Agent) records(ctx context.Context, id string) (disks []catalog.Disk, layers []catalog.Layer, snapshots []catalog.Snapshot, err error) {
	if disks, err = a.catalog.Disks(ctx, id); err != nil {
		return nil, nil, nil, err
	}
	if layers, err = a.catalog.Layers(ctx, id); err != nil {
		return nil, nil, nil, err
	}
	snapshots, err = a.catalog.Snapshots(ctx, id)
	return disks, layers, snapshots, err
}

// current reports whether the VM's layers are those that were examined. An
// operation that has come and gone meanwhile leaves others.
func (x *examination) current(ctx context.Context) bool {
	disks, layers, snapshots, err := x.records(ctx, x.vm.id)
	return err == nil && slices.Equal(disks, x.disks) && slices.EqualFunc(layers, x.layers, sameLayer) && len(snapshots) == len(x.snapshots)
}

func sameLayer(a, b catalog.Layer) bool {
	a.Created, b.Created = time.Time{}, time.Time{}
	return a == b
}

// found notes a finding, and repairs it when that is asked for and possible.
// What a repair that fails has to say goes to the finding.
func (x *examination) found(ctx context.Context, f Finding, repair func(context.Context) error) {
	f.Repairable = repair != nil
	if !f.Repairable {
		f.Repair = ""
	}
	if x.o != nil && repair != nil {
		err := x.o.Journal(ctx, entryRepair, f)
		if err == nil {
			err = x.o.Step(ctx, f.Code, repair)
		}
		f.Repaired = err == nil
		if err != nil {
			f.Message += "; it could not be repaired: " + err.Error()
		}
	} else if repair != nil && f.Hint == "" {
		f.Hint = "vmsnap doctor " + x.vm.name() + " --repair: " + f.Repair
	}
	x.findings = append(x.findings, f)
}

// path is where this process finds a layer.
func (x *examination) path(l catalog.Layer) string { return x.root + l.Path }

// device is what the disk of a layer is called.
func (x *examination) device(l catalog.Layer) string {
	for _, d := range x.disks {
		if d.ID == l.DiskID {
			return d.Device
		}
	}
	return l.DiskID
}

// chain returns the layers of a disk, the active one first.
func (x *examination) chainOf(d catalog.Disk) (chain []catalog.Layer) {
	for l := layerOf(x.layers, d.ActiveLayer); l.ID != "" && len(chain) <= len(x.layers); l = layerOf(x.layers, l.Parent) {
		chain = append(chain, l)
	}
	return chain
}

// dirs are the directories that hold the VM's layers and launch paths.
func (x *examination) dirs() []string {
	dirs := map[string]bool{}
	for _, l := range x.layers {
		if !l.Foreign && l.Device == "" {
			dirs[filepath.Dir(l.Path)] = true
		}
	}
	for _, d := range x.disks {
		if l := layerOf(x.layers, d.ActiveLayer); l.Device == "" {
			dirs[filepath.Dir(d.LaunchPath)] = true
		}
	}
	return sortedKeys(dirs)
}
