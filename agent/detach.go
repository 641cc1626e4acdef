package agent

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/blockdev"
)

// DetachRequest asks for a disk to be taken out of a running VM.
type DetachRequest struct {
	VM     string
	Device string

	RequestID string `json:"-"`
	UID       uint32 `json:"-"`
}

// entryDetach announces that a disk is about to be taken out.
const entryDetach = "detach"

// unplugPatience is how long a guest may take to let go of a disk: it flushes what
// it has cached, and a guest under load takes its time.
const unplugPatience = 30 * time.Second

// DetachDisk starts taking a disk out and returns the operation.
func (a *Agent) DetachDisk(ctx context.Context, req DetachRequest) (op.Record, error) {
	v, err := a.find(req.VM)
	if err != nil {
		return op.Record{}, err
	}
	spec := op.Spec{Kind: op.KindDetach, VMID: v.id, VMName: v.name(), Request: req, RequestID: req.RequestID, UID: req.UID}
	return a.changes(ctx, spec, v, func(ctx context.Context, o *op.Op) error { return a.detach(ctx, o, v, req) })
}

// detach is the recipe. What the guest has let go of cannot be put back for it, so
// from there on everything is done to the end.
func (a *Agent) detach(ctx context.Context, o *op.Op, v *vm, req DetachRequest) error {
	o.Plan(3)
	t := &attaching{cut: &cut{Agent: a, o: o, vm: v}, attachment: attachment{Device: req.Device}}
	if err := o.Step(ctx, "preflight", t.removable); err != nil {
		return err
	}
	err := o.Step(ctx, "unplug", func(ctx context.Context) error {
		if err := o.Journal(ctx, entryDetach, t.attachment); err != nil {
			return err
		}
		err := blockdev.Unplug(ctx, t.session, t.Device, unplugPatience)
		if errors.Is(err, blockdev.ErrNotReleased) {
			return fault.New(fault.Unresponsive, "VM %s: disk %s: %w", v.name(), t.Device, err).
				WithHint("unmount it in the guest, see that the guest runs, and detach it again")
		}
		return err
	})
	if err != nil {
		return err
	}
	return o.Step(context.WithoutCancel(ctx), "close", t.closeLayers)
}

// removable finds the disk, which must be one that was plugged in.
func (t *attaching) removable(ctx context.Context) error {
	if err := t.attend(ctx); err != nil {
		return err
	}
	g, err := blockdev.ReadGraph(ctx, t.session)
	if err != nil {
		return fault.New(fault.Unresponsive, "VM %s: %w", t.vm.name(), err)
	}
	for _, d := range t.liveDisks(ctx, t.vm, t.run, g, true) {
		if d.drive.Device != t.Device {
			continue
		}
		if d.launch != (discover.Drive{}) {
			return fault.New(fault.Unsupported, "VM %s: disk %s is in its launch command", t.vm.name(), t.Device).
				WithHint("only what was plugged in while QEMU runs is taken out")
		}
		if job := g.Job(d.drive); job != "" {
			return fault.New(fault.Busy, "VM %s: disk %s: QEMU's block job %s is working on it", t.vm.name(), t.Device, job)
		}
		for _, l := range d.chain {
			t.Files = append(t.Files, l.Filename)
		}
		t.Top = t.Files[:1]
		there, err := blockdev.HasDevice(ctx, t.session, t.Device)
		if err == nil && !there {
			err = fault.New(fault.Unsupported, "VM %s: disk %s is of a device without an id", t.vm.name(), t.Device)
		}
		return err
	}
	return t.leftOpen(ctx)
}

// leftOpen finds a disk that the guest has let go of after nobody waited for it
// any more: its layers are still open in QEMU.
func (t *attaching) leftOpen(ctx context.Context) error {
	t.vm.mu.Lock()
	disks := t.vm.disks
	t.vm.mu.Unlock()
	for _, d := range disks {
		if d.Device != t.Device || !d.Attached {
			continue
		}
		active, err := t.catalog.Layer(ctx, d.ActiveLayer)
		if err != nil {
			return err
		}
		layers, err := t.chain(ctx, active)
		if err != nil {
			return err
		}
		t.Top = []string{d.LaunchPath, active.Path}
		t.Files = slices.Clone(t.Top)
		for _, l := range layers {
			t.Files = append(t.Files, l.Path)
		}
		return nil
	}
	return fault.New(fault.NotFound, "VM %s has no disk %q", t.vm.name(), t.Device).WithHint("vmsnap vm show %s lists its disks", t.vm.name())
}

// closeLayers closes what the disk had open in QEMU, and records that it is none
// of the VM any more.
func (t *attaching) closeLayers(ctx context.Context) error {
	if t.session != nil {
		if err := blockdev.DropReleased(ctx, t.session, t.Files, t.Top); err != nil {
			return fault.New(kindOf(err), "VM %s: disk %s is out, and its layers stay open in QEMU: %w", t.vm.name(), t.Device, err)
		}
	}
	t.vm.mu.Lock()
	disks := t.vm.disks
	t.vm.mu.Unlock()
	for _, d := range disks {
		if d.Device != t.Device || d.Removed {
			continue
		}
		d.Removed, d.Attached = true, true
		if _, err := t.catalog.UpsertDisk(ctx, d); err != nil {
			return err
		}
	}
	return t.reload(ctx, t.vm)
}

// recoverDetach closes the layers of a disk that was taken out.
func (a *Agent) recoverDetach(ctx context.Context, o *op.Op, v *vm, entries []op.Entry) error {
	t, err := a.loadAttachment(ctx, o, v, entries, entryDetach)
	if err != nil || t.Device == "" {
		return errors.Join(err, errInterrupted())
	}
	done := t.run == nil
	err = a.untilRecovered(ctx, o, func(ctx context.Context) error {
		if t.run != nil {
			there, err := blockdev.HasDevice(ctx, t.session, t.Device)
			if err != nil || there {
				return err
			}
			done = true
		}
		return t.closeLayers(ctx)
	})
	if err == nil && !done {
		err = errInterrupted()
	}
	return err
}
