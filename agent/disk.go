package agent

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/blockdev"
)

// liveDisk is a disk as QEMU has it, matched with what the catalog knows.
type liveDisk struct {
	drive  blockdev.Drive
	chain  []blockdev.Layer
	launch discover.Drive // zero for a drive that was plugged in later
	rec    catalog.Disk   // ID is empty when the disk could not be matched
	active catalog.Layer
	path   string // the active layer's file as QEMU opened it, absolute
	reason string // why it cannot be cut; empty when it can
}

// virtualSize returns the disk's size in bytes, 0 when it is unknown.
func (d *liveDisk) virtualSize() uint64 {
	if len(d.chain) == 0 {
		return 0
	}
	return d.top().Node.VirtualSize
}

// top returns the node that a cut covers.
func (d *liveDisk) top() blockdev.Layer { return d.chain[0] }

// liveDisks matches QEMU's writable drives with the catalog's disks, and
// records what is seen for the first time. A drive that cannot be matched is
// listed with the reason.
//
// Unless the caller holds vm.changing, register must come from there: a disk
// whose layers are being moved must not be taken for a new one.
func (a *Agent) liveDisks(ctx context.Context, v *vm, r *run, g *blockdev.Graph, register bool) []liveDisk {
	var disks []liveDisk
	for _, drive := range g.Drives() {
		chain, err := g.Chain(drive)
		if drive.Unnamed && err == nil {
			drive.Device = v.label(r.proc, drive.Device, chain[0])
		}
		launch := launchOf(r.proc, drive)
		if drive.ReadOnly || drive.Removable || launch.CDROM || launch.Interface == "pflash" {
			continue
		}
		d := liveDisk{drive: drive, launch: launch}
		if err != nil {
			d.reason = err.Error()
			disks = append(disks, d)
			continue
		}
		d.chain = chain
		d.path = absolute(r.proc, d.top().Filename)
		if d.reason = a.uncuttable(r.proc, &d); d.reason == "" && !register {
			d.reason = "an operation is changing its layers"
		} else if d.reason == "" {
			if err := a.recognise(ctx, v, r, &d); err != nil {
				d.reason = err.Error()
			}
		}
		disks = append(disks, d)
	}
	return disks
}

// label returns what a disk that nobody named is called: what it was called when
// its active layer was made, else the name of its root.
func (v *vm) label(p discover.Process, root string, active blockdev.Layer) string {
	path, err := p.HostPath(absolute(p, active.Filename))
	if err != nil {
		return root
	}
	file, err := fileAt(path)
	if err != nil {
		return root
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, l := range v.layers {
		if !file.is(l) {
			continue
		}
		for _, d := range v.disks {
			if d.ID == l.DiskID {
				return d.Device
			}
		}
	}
	return root
}

// launchOf finds the drive of the launch command that a drive was made by.
func launchOf(p discover.Process, d blockdev.Drive) discover.Drive {
	for _, l := range p.Drives {
		if l.ID != "" && l.ID == d.Backend || l.Device != "" && l.Device == d.Device || l.Node != "" && (l.Node == d.Root || d.Unnamed && l.Node == d.Device) {
			return l
		}
	}
	return discover.Drive{}
}

// uncuttable says what about the drive itself forbids a cut.
func (a *Agent) uncuttable(p discover.Process, d *liveDisk) string {
	top := d.top()
	driver := top.Node.Driver
	if top.File != nil {
		driver = top.File.Driver
	}
	switch {
	case top.File == nil || driver != "file" && driver != "host_device":
		return fmt.Sprintf("it is kept by QEMU's %s driver; only image files and block devices can be snapshotted", driver)
	case driver == "host_device" && top.Node.Driver != "raw":
		return fmt.Sprintf("it is a block device that holds a %s image; only raw ones can be snapshotted", top.Node.Driver)
	case driver == "host_device" && p.Root != "":
		return "it is a block device, and QEMU has a file system tree of its own"
	case driver == "host_device" && a.overlayDir(p, d.drive.Device) == "":
		return "it is a block device, beside which there is no place for a new layer: set overlay-dir"
	case top.Node.Driver != "qcow2" && top.Node.Driver != "raw":
		return fmt.Sprintf("its format is %s; only qcow2 and raw can be snapshotted", top.Node.Driver)
	case top.Node.Encrypted:
		return "its image is encrypted, and a layer on top of it would not be"
	case d.launch.Snapshot:
		return "it was started with snapshot=on: its writes are lost when QEMU ends"
	case d.launch.ExplicitBacking:
		return "its launch command names the backing node, so a new layer would be left out at the next start"
	}
	return ""
}

// recognise matches the disk with the catalog by its layer tree: the file that
// is written to must be the active layer of a known disk, or of none.
func (a *Agent) recognise(ctx context.Context, v *vm, r *run, d *liveDisk) error {
	path, err := r.proc.HostPath(d.path)
	if err != nil {
		return fmt.Errorf("its file cannot be found: %w", err)
	}
	file, err := fileAt(path)
	if err != nil {
		return fmt.Errorf("its file cannot be examined: %w", err)
	}
	if open, err := hasOpen(r.proc.PID, file.FileID); err != nil {
		return err
	} else if !open {
		return fmt.Errorf("%s leads to another file than the one that QEMU writes to", d.path)
	}
	v.registering.Lock()
	defer v.registering.Unlock()
	v.mu.Lock()
	disks, layers, vmID := v.disks, v.layers, v.id
	v.mu.Unlock()
	for _, l := range layers {
		if !file.is(l) {
			continue
		}
		for _, disk := range disks {
			if disk.ID == l.DiskID {
				return a.known(ctx, v, r, d, disk, l, layers)
			}
		}
	}
	if strings.HasPrefix(d.top().Node.Name, nodePrefix) {
		return fmt.Errorf("it runs on %s, which no snapshot in the catalog accounts for", d.path)
	}
	disk := catalog.Disk{VMID: vmID, Device: d.drive.Device}
	for _, k := range disks {
		if k.Device != d.drive.Device || k.Removed {
			continue
		}
		if covered(layers, k.ID) {
			return fmt.Errorf("it runs on %s, which is not the layer that was active when it was last seen", d.path)
		}
		disk = k
	}
	return a.firstSight(ctx, v, r, d, disk, file)
}

// known takes in a disk whose active file is a known layer.
func (a *Agent) known(ctx context.Context, v *vm, r *run, d *liveDisk, disk catalog.Disk, l catalog.Layer, layers []catalog.Layer) error {
	if disk.ActiveLayer != l.ID {
		v.strayed(disk.ID)
		return fmt.Errorf("it runs on the layer %s, which others depend on, and not on its newest one", l.Path)
	}
	was, layer := disk, l
	if disk.Device != d.drive.Device {
		if covered(layers, disk.ID) {
			return fmt.Errorf("its layers belong to the disk that was called %s", disk.Device)
		}
		disk.Device = d.drive.Device
	}
	disk.Removed = false
	relaunched(r.proc, d, &disk, &l)
	if disk != was || l != layer {
		if err := a.putLayers(ctx, []catalog.Layer{l}, []catalog.Disk{disk}); err != nil {
			return err
		}
		if err := a.reload(ctx, v); err != nil {
			return err
		}
	}
	d.rec, d.active = disk, l
	return nil
}

// relaunched takes in that the VM's launch command has changed: that its launch
// path is another name of the active layer, or its format another.
func relaunched(p discover.Process, d *liveDisk, disk *catalog.Disk, active *catalog.Layer) {
	if d.launch.File == "" {
		return // it was plugged in later
	}
	disk.Attached = false
	permanent := active.Path
	if permanent == disk.LaunchPath {
		permanent = "" // it has none yet
	}
	path, err := launchPath(p, d, permanent)
	if err != nil {
		return
	}
	host, err := p.HostPath(path)
	if err != nil {
		return
	}
	if file, err := fileAt(host); err != nil || !file.is(*active) {
		return
	}
	if permanent == "" {
		active.Path = path
	}
	disk.LaunchPath, disk.LaunchFormat = path, d.launch.Format
}

// hasOpen reports whether a process has a file open. A name that leads to
// another file than the one that QEMU opened by it must not be followed.
func hasOpen(pid int, file blockdev.FileID) (bool, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	fds, err := os.ReadDir(dir)
	if err != nil {
		return false, fmt.Errorf("what QEMU has open cannot be seen: %w", err)
	}
	for _, fd := range fds {
		if info, err := blockdev.StatPath(filepath.Join(dir, fd.Name())); err == nil && info.FileID == file {
			return true, nil
		}
	}
	return false, nil
}

// covered reports whether the disk has layers that another layer lies on and
// that the agent covered.
func covered(layers []catalog.Layer, diskID string) bool {
	for _, l := range layers {
		if l.DiskID == diskID && l.Covered && !l.Foreign {
			return true
		}
	}
	return false
}

// firstSight records a disk with its layers. Everything below the active layer
// is foreign from now on.
func (a *Agent) firstSight(ctx context.Context, v *vm, r *run, d *liveDisk, disk catalog.Disk, file file) error {
	launchPath, err := launchPath(r.proc, d, "")
	if err != nil {
		return err
	}
	if disk.ID == "" {
		disk.ID = newID()
	}
	v.mu.Lock()
	old := v.layers
	v.mu.Unlock()
	disk.LaunchPath, disk.LaunchFormat, disk.SettleNeeded = launchPath, d.launch.Format, false
	now := time.Now()
	active := catalog.Layer{
		ID: newID(), DiskID: disk.ID, Path: launchPath, Format: d.top().Node.Driver,
		VirtualSize: d.top().Node.VirtualSize, Created: now,
	}
	file.identify(&active)
	disk.ActiveLayer = active.ID
	layers := []catalog.Layer{active}
	for _, b := range d.chain[1:] {
		l := catalog.Layer{
			ID: newID(), DiskID: disk.ID, Path: absolute(r.proc, b.Filename), Format: b.Node.Driver,
			VirtualSize: b.Node.VirtualSize, Foreign: true, Covered: true, Created: now,
		}
		if file, err := fileAt(r.proc.Root + l.Path); err == nil {
			file.identify(&l)
		}
		layers[len(layers)-1].Parent = l.ID
		layers = append(layers, l)
	}
	if err := a.replaceDisk(ctx, disk, layers, old); err != nil {
		return err
	}
	d.rec, d.active = disk, active
	return a.reload(ctx, v)
}

// launchPath returns the file name by which the VM's launch command opens the
// disk, with links resolved but for the one that the agent has made: it is this
// name that comes to lead to the active layer. active is the permanent name of
// that layer, empty when there is none. The name of a block device is the one
// that is given: what it leads to is another one at the next boot.
func launchPath(p discover.Process, d *liveDisk, active string) (string, error) {
	path := d.path
	if d.launch.File != "" {
		path = absolute(p, d.launch.File)
	}
	if info, err := blockdev.StatPath(p.Root + path); err == nil && info.Device {
		return path, nil
	}
	for range maxLinks {
		fi, err := os.Lstat(p.Root + path)
		if err != nil {
			return "", fmt.Errorf("its launch path cannot be examined: %w", err)
		}
		if fi.Mode()&os.ModeSymlink == 0 {
			return path, nil
		}
		to, err := os.Readlink(p.Root + path)
		if err != nil {
			return "", fmt.Errorf("its launch path cannot be examined: %w", err)
		}
		if to == active {
			return path, nil
		}
		if p.Root != "" {
			return "", fmt.Errorf("its launch path %s is a symbolic link in another mount namespace", path)
		}
		dir, err := filepath.EvalSymlinks(filepath.Dir(path))
		if err != nil {
			return "", fmt.Errorf("its launch path cannot be examined: %w", err)
		}
		if path = to; !filepath.IsAbs(path) {
			path = filepath.Join(dir, path)
		}
	}
	return "", fmt.Errorf("its launch path has more than %d symbolic links", maxLinks)
}

// maxLinks bounds the symbolic links of one path, as the kernel does.
const maxLinks = 40

// overlayDir returns the directory in which a disk's overlays are made, empty
// when they stand beside the layer that they cover.
func (a *Agent) overlayDir(p discover.Process, device string) string {
	return cmp.Or(p.OverlayDirs[device], p.OverlayDir, a.cfg.OverlayDir)
}

// nodePrefix begins the name of every node that the agent makes in a QEMU.
const nodePrefix = "vmsnap-"

// overlayOptions are the node properties that an overlay repeats.
func (d *liveDisk) overlayOptions() blockdev.Options {
	return blockdev.Options{
		Cache: d.top().Node.Cache, DetectZeroes: d.top().Node.DetectZeroes,
		Discard: d.launch.Discard, AIO: d.launch.AIO,
	}
}
