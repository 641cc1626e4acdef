package agent

import (
	"fmt"
	"path/filepath"
	"slices"

	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/blockdev"
)

// growing is a disk that QEMU may write to, with the file that its active layer
// grows in. Sizes are bytes.
type growing struct {
	device    string
	failed    blockdev.Stop // why a request of the guest failed
	path      string        // as this process sees it; empty when it grows in no file
	raw       bool
	node      string // of the file
	threshold uint64 // that QEMU has for that node; 0: none
	virtual   uint64
	room      fileStat
	seen      bool // whether the file system has told room
}

// mayGrow returns what the layer may still grow by: it holds the whole disk and
// its own tables at most. In clusters of 64 KiB these are less than 1/4096.
func (d *growing) mayGrow() uint64 {
	most := d.virtual
	if !d.raw {
		most += d.virtual>>12 + roomForTables
	}
	return most - min(most, d.room.allocated)
}

// wants returns how much is to be free where the layer grows: so much, or what it
// may still grow by.
func (d *growing) wants(limit uint64) uint64 { return min(d.mayGrow(), limit) }

// tight reports whether less is free than the layer wants. Once it was, an eighth
// more is to be free before it is not: what is deleted and written in turns is told
// of once.
func (d *growing) tight(limit uint64, was bool) bool {
	if !d.seen {
		return was && d.path != ""
	}
	wants := d.wants(limit)
	if was {
		wants = min(d.mayGrow(), wants+wants/8)
	}
	return d.room.free < wants
}

// thresholdStep is the least by which a layer grows before it is looked at again.
const thresholdStep = 64 << 10

// rearm returns the offset of the file at which QEMU is to tell that it is written
// to, and 0 when what is set is right. It is half of the way to where little is
// free, since others may grow in the same file system. A raw layer is written to
// everywhere, and grows nevertheless.
func (d *growing) rearm(limit uint64) uint64 {
	wants := d.wants(limit)
	if !d.seen || d.raw || d.node == "" || d.room.free <= wants || wants == 0 {
		return 0
	}
	left := d.room.free - wants
	if d.threshold > d.room.size && d.threshold <= d.room.size+left {
		return 0
	}
	return d.room.size + max(left/2, thresholdStep)
}

// tightness is a disk that runs out of space soon.
type tightness struct {
	Free, Wants uint64 // bytes
	Dir         string // of its active layer
}

func (t tightness) String() string {
	return fmt.Sprintf("%d bytes are free in %s, where it grows, and are to be %d", t.Free, t.Dir, t.Wants)
}

// tightness describes a disk that is tight.
func (d *growing) tightness(limit uint64) tightness {
	return tightness{Free: d.room.free, Wants: d.wants(limit), Dir: filepath.Dir(d.path)}
}

// growing lists the disks of a running VM that may be written to.
func (r *run) growing(v *vm, g *blockdev.Graph) []growing {
	var all []growing
	for _, drive := range g.Drives() {
		d := growing{device: drive.Device, failed: drive.Failed}
		chain, err := g.Chain(drive)
		if err == nil && drive.Unnamed {
			d.device = v.label(r.proc, drive.Device, chain[0])
		}
		if launch := launchOf(r.proc, drive); err == nil && !drive.ReadOnly && !drive.Removable && !launch.CDROM && !launch.Snapshot {
			d.grows(r, chain[0])
		}
		all = append(all, d)
	}
	return all
}

// grows takes in the layer that a disk grows in, unless that is in no file.
func (d *growing) grows(r *run, top blockdev.Layer) {
	if top.File == nil || top.File.Driver != "file" {
		return
	}
	path, err := r.proc.HostPath(absolute(r.proc, top.Filename))
	if err != nil {
		return // QEMU has another file system tree, which cannot be looked into
	}
	d.path, d.raw, d.virtual = path, top.Node.Driver == "raw", top.Node.VirtualSize
	d.node, d.threshold = top.File.Name, top.File.WriteThreshold
}

// outOfSpace returns the disks for which QEMU has stopped the guest because there
// was no space. There are none when another disk has failed for another reason.
func outOfSpace(disks []growing) []*growing {
	var all []*growing
	for i := range disks {
		switch d := &disks[i]; d.failed {
		case blockdev.NotStopped:
		case blockdev.StopNoSpace:
			all = append(all, d)
		default:
			return nil
		}
	}
	return all
}

// leaveCPUs says that the operation, which holds changing, neither stops the guest
// nor relies on it standing still.
func (v *vm) leaveCPUs(o *op.Op) {
	set := func(calm bool) {
		v.cpus.Lock()
		defer v.cpus.Unlock()
		v.calm = calm
	}
	set(true)
	o.Cleanup(func() { set(false) }) // before changing is let go
}

// holdCPUs keeps operations that stop the guest from beginning until release is
// called. It fails when there is one.
func (v *vm) holdCPUs() (release func(), ok bool) {
	if v.changing.TryRLock() {
		return v.changing.RUnlock, true
	}
	v.cpus.Lock()
	if !v.calm {
		v.cpus.Unlock()
		return nil, false
	}
	return v.cpus.Unlock, true
}

// roomProblems are what is shown of disks that run out of space. It runs under r.mu.
func (r *run) roomProblems() []Problem {
	var all []Problem
	if r.stuck != "" {
		all = append(all, Problem{"out-of-space", "QEMU has stopped the guest: " + r.stuck,
			"make room: delete snapshots, or make the file system larger; with resume-guests the guest goes on by itself then, else by vmsnap doctor --repair"})
	}
	for _, device := range sortedKeys(r.tight) {
		all = append(all, Problem{"space-low", "disk " + device + ": " + r.tight[device].String(),
			"make room before the guest is stopped: delete snapshots, or make the file system larger"})
	}
	return all
}

// lookAtRoom has the room of the disks looked at soon.
func (r *run) lookAtRoom() {
	select {
	case r.roomNews <- struct{}{}:
	default: // it is going to be
	}
}

// devices names disks.
func devices(disks []*growing) []string {
	var names []string
	for _, d := range disks {
		names = append(names, d.device)
	}
	slices.Sort(names)
	return names
}
