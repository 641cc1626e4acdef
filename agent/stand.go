package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/monitor"
)

// stand is how a VM's disks are in use at one moment.
type stand struct {
	vm      *vm
	run     *run // nil for a stopped VM
	session *monitor.Session
	graph   *blockdev.Graph
	disks   []liveDisk
}

// standOf asks a VM's QEMU, if there is one, for its disks. register says that no
// operation changes them meanwhile (liveDisks).
func (a *Agent) standOf(ctx context.Context, v *vm, register bool) (*stand, error) {
	r, err := v.known(ctx)
	if err != nil {
		return nil, err
	}
	at := &stand{vm: v, run: r}
	if r == nil {
		v.mu.Lock()
		stopped := v.rec.Stopped
		v.mu.Unlock()
		if stopped == endedByMigration {
			return nil, fault.New(fault.Unsupported, "VM %s has migrated to another host, where its disks may be in use", v.name())
		}
		return at, nil
	}
	if at.session, err = v.monitorOf(r); err != nil {
		return nil, err
	}
	if at.graph, err = blockdev.ReadGraph(ctx, at.session); err != nil {
		return nil, fault.New(fault.Unresponsive, "VM %s: %w", v.name(), err)
	}
	if err := notMigrating(ctx, v, at.session); err != nil {
		return nil, err
	}
	at.disks = a.liveDisks(ctx, v, r, at.graph, register)
	return at, nil
}

// prefix is where the paths of the VM's layers begin for this process.
func (at *stand) prefix() string {
	if at.run == nil {
		return ""
	}
	return at.run.proc.Root
}

// inUse reports whether a running QEMU has a layer open.
func (at *stand) inUse(t *layerTree, id string) bool {
	return at.run != nil && t.inChain(id)
}

// inChain reports whether a disk runs on a layer, or would if its VM did.
func (t *layerTree) inChain(id string) bool {
	for active, d := range t.active {
		if d.Removed {
			continue
		}
		n := 0
		for l := t.layers[active]; l.ID != "" && n <= len(t.layers); l = t.layers[l.Parent] {
			if l.ID == id {
				return true
			}
			n++
		}
	}
	return false
}

// check fails if a layer that is to go cannot be worked on now.
func (at *stand) check(t *layerTree, wanted map[string]bool) error {
	for _, id := range sortedKeys(wanted) {
		if l := t.layers[id]; at.inUse(t, id) {
			if _, err := at.disk(t, l.DiskID); err != nil {
				return err
			}
		}
	}
	return nil
}

// disk returns a disk as QEMU has it. Its chain must be that of the catalog.
func (at *stand) disk(t *layerTree, id string) (*liveDisk, error) {
	for i := range at.disks {
		if d := &at.disks[i]; d.rec.ID == id {
			return d, at.fit(t, d)
		}
	}
	for _, d := range at.disks {
		if d.reason != "" && d.rec.ID == "" {
			return nil, fault.New(fault.Unsupported, "disk %s: %s", d.drive.Device, d.reason)
		}
	}
	return nil, fault.New(fault.Unsupported, "QEMU does not show the disk %s", deviceOf(t.disks, id))
}

// fit fails unless QEMU runs a disk on the layers that the catalog has, which name
// each other in their headers, and does nothing else with them.
func (at *stand) fit(t *layerTree, d *liveDisk) error {
	if d.reason != "" {
		return fault.New(fault.Unsupported, "disk %s: %s", d.rec.Device, d.reason)
	}
	if job := at.graph.Job(d.drive); job != "" {
		return fault.New(fault.Busy, "disk %s: QEMU's block job %s is working on it", d.rec.Device, job)
	}
	n := 0
	for l := t.layers[d.rec.ActiveLayer]; l.ID != ""; l = t.layers[l.Parent] {
		n++
		if l.Foreign || t.layers[l.Parent].Foreign {
			continue // it is as QEMU has found it
		}
		if err := verifyBacking(at.prefix(), l, t.layers[l.Parent]); err != nil {
			return fmt.Errorf("disk %s: %w", d.rec.Device, err)
		}
	}
	if n != len(d.chain) {
		return fault.New(fault.Unsupported, "disk %s: QEMU has %d layers of it open, and %d are known", d.rec.Device, len(d.chain), n).
			WithHint("vmsnap doctor %s tells more", at.vm.name())
	}
	return nil
}

// nodeOf returns QEMU's node of a layer of a disk.
func (d *liveDisk) nodeOf(t *layerTree, id string) (blockdev.Layer, error) {
	at := 0
	for l := t.layers[d.rec.ActiveLayer]; l.ID != "" && at < len(d.chain); l = t.layers[l.Parent] {
		if l.ID == id {
			return d.chain[at], nil
		}
		at++
	}
	return blockdev.Layer{}, fmt.Errorf("disk %s does not run on the layer %s", d.rec.Device, t.layers[id].Path)
}

// deviceOf is what a disk is called.
func deviceOf(disks []catalog.Disk, id string) string {
	for _, d := range disks {
		if d.ID == id {
			return d.Device
		}
	}
	return id
}

// reservations are bytes of file systems that merges which run will take.
type reservations struct {
	mu    sync.Mutex
	bytes map[uint64]uint64 // by device number
}

// roomFor fails if a directory's file system has not so many bytes free that
// nobody has reserved.
func (a *Agent) roomFor(path string, bytes uint64) error {
	release, err := a.reserve(path, bytes)
	if err == nil {
		release()
	}
	return err
}

// reserve sets bytes of a directory's file system aside, among the merges of this
// host, until release is called.
func (a *Agent) reserve(path string, bytes uint64) (release func(), err error) {
	if bytes == 0 {
		return func() {}, nil
	}
	var st unix.Statfs_t
	info, err := blockdev.StatPath(path)
	if err = errors.Join(err, unix.Statfs(path, &st)); err != nil {
		return nil, fmt.Errorf("free space of %s: %w", path, err)
	}
	free := st.Bavail * uint64(st.Bsize)
	r := &a.reserved
	r.mu.Lock()
	defer r.mu.Unlock()
	if taken := r.bytes[info.Dev]; free < taken || free-taken < bytes {
		return nil, fault.New(fault.NoSpace, "%s has %d bytes free, of which other merges will take %d; %d are needed", path, free, taken, bytes)
	}
	if r.bytes == nil {
		r.bytes = map[uint64]uint64{}
	}
	r.bytes[info.Dev] += bytes
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.bytes[info.Dev] -= bytes
	}, nil
}
