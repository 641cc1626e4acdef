package agent

import (
	"context"
	"encoding/json"
	"errors"
	"regexp"
	"slices"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/monitor"
)

// AttachRequest asks for a disk to be plugged into a running VM.
type AttachRequest struct {
	VM     string
	Path   string // absolute; what the caller may read and write
	Format string // qcow2 or raw
	Device string // id of the new device; chosen when empty
	Bus    string // virtio or scsi; chosen when empty
	Caller Caller

	RequestID string `json:"-"`
}

// entryAttach announces that a disk is about to be opened and plugged in.
const entryAttach = "attach"

// attachment is what the journal keeps of a disk being plugged in or taken out.
type attachment struct {
	PID       int
	StartTime uint64
	Device    string
	Node      string   // of a disk that is plugged in
	Files     []string // of one that is taken out: what its layers are called in QEMU
	Top       []string // the names among these of the active layer, which nobody else has
}

// AttachDisk starts plugging a disk in and returns the operation.
func (a *Agent) AttachDisk(ctx context.Context, req AttachRequest) (op.Record, error) {
	v, err := a.find(req.VM)
	if err != nil {
		return op.Record{}, err
	}
	switch {
	case req.Format != "raw" && req.Format != "qcow2":
		return op.Record{}, fault.New(fault.Usage, "the format %q is neither qcow2 nor raw", req.Format)
	case req.Device != "" && !deviceID.MatchString(req.Device):
		return op.Record{}, fault.New(fault.Usage, "%q is no device id: a letter, then letters, digits and - . _", req.Device)
	case slotDrivers[req.Bus] == nil:
		return op.Record{}, fault.New(fault.Usage, "the bus %q is neither virtio nor scsi", req.Bus)
	}
	spec := op.Spec{Kind: op.KindAttach, VMID: v.id, VMName: v.name(), Request: req, RequestID: req.RequestID, UID: req.Caller.UID}
	return a.changes(ctx, spec, v, func(ctx context.Context, o *op.Op) error { return a.attach(ctx, o, v, req) })
}

// deviceID is what QEMU takes for an id (id_wellformed in util/id.c), of a
// bearable length.
var deviceID = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9._-]{0,63}$`)

// slotDrivers are the devices that a disk can be, by the bus that is asked for.
var slotDrivers = map[string][]string{
	"": {"virtio-blk-pci", "scsi-hd"}, "virtio": {"virtio-blk-pci"}, "scsi": {"scsi-hd"},
}

// attaching is a disk being plugged in or taken out.
type attaching struct {
	*cut // for what it knows of the process
	attachment
	file blockdev.FileID
	plug blockdev.Plug
}

// attach is the recipe.
func (a *Agent) attach(ctx context.Context, o *op.Op, v *vm, req AttachRequest) error {
	o.Plan(4)
	t := &attaching{cut: &cut{Agent: a, o: o, vm: v}}
	var slots []blockdev.Slot
	err := o.Step(ctx, "preflight", func(ctx context.Context) (err error) {
		if err := t.attend(ctx); err != nil {
			return err
		}
		if err := t.image(ctx, req); err != nil {
			return err
		}
		slots, err = t.slots(ctx, req.Bus)
		return err
	})
	if err != nil {
		return err
	}
	if err := o.Step(ctx, "open", t.open); err != nil {
		return err
	}
	err = o.Step(ctx, "plug", func(ctx context.Context) error {
		if err := o.PointOfNoReturn(); err != nil {
			return err
		}
		return t.add(context.WithoutCancel(ctx), slots)
	})
	if err != nil {
		return err
	}
	o.DropReverts()
	return o.Step(context.WithoutCancel(ctx), "register", t.register)
}

// attend finds the VM's process and its monitor.
func (t *attaching) attend(ctx context.Context) error {
	name := t.vm.name()
	r, err := t.vm.alone()
	if err != nil {
		return err
	}
	if r == nil {
		return fault.New(fault.Unsupported, "VM %s is stopped", name).WithHint("change its launch command instead")
	}
	if r.proc.Root != "" {
		return fault.New(fault.Unsupported, "VM %s: QEMU has a file system tree of its own, and would open another file by the path", name)
	}
	if t.session, err = t.vm.monitorOf(r); err != nil {
		return err
	}
	t.run, t.PID, t.StartTime = r, r.proc.PID, r.proc.StartTime
	return notMigrating(ctx, t.vm, t.session)
}

// image looks at the image, and at what it lies on.
func (t *attaching) image(ctx context.Context, req AttachRequest) error {
	f, err := req.Caller.openImage(req.Path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	file, err := fileAt(req.Path)
	if err != nil {
		return err
	}
	t.file = file.FileID
	chain, device, err := t.chainOf(ctx, f.Name(), file, req)
	if err != nil {
		return err
	}
	t.Device = req.Device
	switch {
	case device != "" && t.Device == "":
		t.Device = device
	case device != "" && t.Device != device:
		return fault.New(fault.Unsupported, "VM %s: %s was its disk %s, and has snapshots by that name", t.vm.name(), req.Path, device).
			WithHint("--device %s", device)
	case t.Device == "":
		t.Device = "disk-" + t.o.ID()
	}
	if taken, err := blockdev.HasDevice(ctx, t.session, t.Device); err != nil {
		return err
	} else if taken {
		return fault.New(fault.Exists, "VM %s has a device %s already", t.vm.name(), t.Device)
	}
	t.Node = "disk-" + t.o.ID()
	t.plug = blockdev.Plug{Node: t.Node, Device: t.Device, Chain: chain}
	return nil
}

// chainOf returns the layers of an image, from what the catalog knows of them: no
// name in a header is taken on trust. device is what the disk was called if it
// was one of this VM.
func (t *attaching) chainOf(ctx context.Context, name string, file file, req AttachRequest) (chain []blockdev.Below, device string, err error) {
	top := catalog.Layer{Path: req.Path, Format: req.Format, Device: file.device}
	known, err := t.catalog.LayerByInode(ctx, file.Dev, file.Ino)
	switch {
	case fault.Of(err) == fault.NotFound:
		clone, err := t.catalog.CloneByInode(ctx, file.Dev, file.Ino)
		if err == nil {
			top.Parent = clone.LayerID
		} else if fault.Of(err) != fault.NotFound {
			return nil, "", err
		}
	case err != nil:
		return nil, "", err
	case known.Covered:
		return nil, "", fault.New(fault.HasDependants, "%s is a layer that others lie on", req.Path).
			WithHint("vmsnap snapshot clone makes a disk from a snapshot")
	default:
		top.Parent, top.Format, device = known.Parent, known.Format, t.deviceOf(known.DiskID)
		if device == "" {
			return nil, "", fault.New(fault.Unsupported, "%s is a disk of another VM", req.Path).
				WithHint("vmsnap snapshot clone makes a disk from a snapshot of it")
		}
	}
	layers, err := t.chain(ctx, top)
	if err != nil {
		return nil, "", err
	}
	for i, l := range layers {
		var parent catalog.Layer
		if i+1 < len(layers) {
			parent = layers[i+1]
		}
		if err := verifyBacking("", l, parent); err != nil {
			return nil, "", fault.New(kindOf(err), "VM %s: %s: %w", t.vm.name(), name, err).
				WithHint("only what vmsnap knows may lie below an image: qemu-img rebase -b \"\" gives it a copy of everything")
		}
		chain = append(chain, blockdev.Below{Path: l.Path, Format: l.Format, Device: l.Device != ""})
	}
	return chain, device, nil
}

// deviceOf returns what a disk of the VM is called.
func (t *attaching) deviceOf(diskID string) string {
	t.vm.mu.Lock()
	defer t.vm.mu.Unlock()
	for _, d := range t.vm.disks {
		if d.ID == diskID {
			return d.Device
		}
	}
	return ""
}

// slots returns where the disk can go.
func (t *attaching) slots(ctx context.Context, bus string) ([]blockdev.Slot, error) {
	slots, err := blockdev.FindSlots(ctx, t.session)
	if err != nil {
		return nil, err
	}
	slots = slices.DeleteFunc(slots, func(s blockdev.Slot) bool { return !slices.Contains(slotDrivers[bus], s.Driver) })
	if len(slots) == 0 {
		return nil, fault.New(fault.Unsupported, "VM %s has no place for another disk", t.vm.name()).
			WithHint("start it with free ports (-device pcie-root-port,id=…,chassis=…) or a controller (-device virtio-scsi-pci,id=…)")
	}
	return slots, nil
}

// open opens the image in QEMU, which must find the file that was looked at.
func (t *attaching) open(ctx context.Context) error {
	if err := t.o.Journal(ctx, entryAttach, t.attachment); err != nil {
		return err
	}
	t.o.Revert("close the image", func(ctx context.Context) error {
		if !discover.Same(t.PID, t.StartTime) {
			return nil
		}
		return t.plug.Close(ctx, t.session)
	})
	if err := t.plug.Open(ctx, t.session); err != nil {
		return fault.New(kindOf(err), "VM %s: %w", t.vm.name(), err)
	}
	if t.plug.Chain[0].Device {
		return nil
	}
	if open, err := hasOpen(t.PID, t.file); err != nil {
		return err
	} else if !open {
		return fault.New(fault.Failed, "VM %s: %s is another file than it was a moment ago", t.vm.name(), t.plug.Chain[0].Path)
	}
	return nil
}

// add plugs the disk in, where it can.
func (t *attaching) add(ctx context.Context, slots []blockdev.Slot) error {
	var errs []error
	for _, s := range slots {
		err := t.plug.Add(ctx, t.session, s)
		if err == nil {
			return nil
		}
		errs = append(errs, err)
		if refused := new(monitor.CommandError); errors.As(err, &refused) {
			continue
		}
		there, look := blockdev.HasDevice(ctx, t.session, t.Device)
		if look == nil && there {
			return nil
		}
		return fault.New(kindOf(err), "VM %s: plug in %s: %w", t.vm.name(), t.plug.Chain[0].Path, errors.Join(err, look))
	}
	return fault.New(fault.Unsupported, "VM %s: plug in %s: %w", t.vm.name(), t.plug.Chain[0].Path, errors.Join(errs...))
}

// register enters the disk into the catalog, as one that ends with this QEMU.
func (t *attaching) register(ctx context.Context) error {
	t.o.Warn(op.Warning{Code: warnAttached, Disk: t.Device, Message: "the launch command does not name the disk: it is there until this QEMU ends"})
	g, err := blockdev.ReadGraph(ctx, t.session)
	if err != nil {
		return fault.New(fault.Unresponsive, "VM %s: %w", t.vm.name(), err)
	}
	for _, d := range t.liveDisks(ctx, t.vm, t.run, g, true) {
		if d.drive.Device != t.Device {
			continue
		}
		if d.rec.ID == "" {
			return fault.New(fault.Failed, "VM %s: disk %s is plugged in, and cannot be snapshotted: %s", t.vm.name(), t.Device, d.reason)
		}
		d.rec.Attached, d.rec.Removed = true, false
		if _, err := t.catalog.UpsertDisk(ctx, d.rec); err != nil {
			return err
		}
		return t.reload(ctx, t.vm)
	}
	return fault.New(fault.Failed, "VM %s: QEMU does not show the disk %s that was plugged in", t.vm.name(), t.Device)
}

// dropDetached records that disks are none of the VM any more that were plugged in
// and are not among those that QEMU has, of which a stopped VM has none. Their
// layers and restore points stay.
func (a *Agent) dropDetached(ctx context.Context, v *vm, live []liveDisk) {
	v.mu.Lock()
	disks := slices.Clone(v.disks)
	v.mu.Unlock()
	dropped := false
	for _, d := range disks {
		if !d.Attached || d.Removed || slices.ContainsFunc(live, func(l liveDisk) bool { return l.drive.Device == d.Device }) {
			continue
		}
		d.Removed = true
		if _, err := a.catalog.UpsertDisk(ctx, d); err != nil {
			a.log.Error("that a disk was taken out cannot be recorded", "vm", v.name(), "disk", d.Device, "error", err)
			continue
		}
		a.log.Info("a disk is none of the VM any more", "vm", v.name(), "disk", d.Device)
		dropped = true
	}
	if !dropped {
		return
	}
	if err := a.reload(ctx, v); err != nil {
		a.log.Error("the catalog cannot be read", "vm", v.name(), "error", err)
	}
}

// loadAttachment brings an operation back whose agent is gone, with its process
// if that still runs.
func (a *Agent) loadAttachment(ctx context.Context, o *op.Op, v *vm, entries []op.Entry, kind string) (*attaching, error) {
	t := &attaching{cut: &cut{Agent: a, o: o, vm: v}}
	for _, e := range entries {
		if e.Kind != kind {
			continue
		}
		if err := json.Unmarshal(e.Data, &t.attachment); err != nil {
			return nil, err
		}
	}
	err := a.untilRecovered(ctx, o, func(ctx context.Context) error {
		return t.findProcess(ctx, prepared{PID: t.PID, StartTime: t.StartTime})
	})
	return t, err
}

// recoverAttach registers a disk that was plugged in, and closes one that was not.
func (a *Agent) recoverAttach(ctx context.Context, o *op.Op, v *vm, entries []op.Entry) error {
	t, err := a.loadAttachment(ctx, o, v, entries, entryAttach)
	if err != nil || t.run == nil {
		return errors.Join(err, errInterrupted())
	}
	t.plug = blockdev.Plug{Node: t.Node, Device: t.Device}
	done := false
	err = a.untilRecovered(ctx, o, func(ctx context.Context) error {
		there, err := blockdev.HasDevice(ctx, t.session, t.Device)
		if err != nil {
			return err
		}
		if done = there; there {
			return t.register(ctx)
		}
		return t.plug.Close(ctx, t.session)
	})
	if err == nil && !done {
		err = errInterrupted()
	}
	return err
}
