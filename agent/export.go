package agent

import (
	"context"
	"errors"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/blockdev"
)

// ExportRequest asks for a standalone image of what a snapshot holds of a disk.
type ExportRequest struct {
	Snapshot string // VM/NAME or id
	Disk     string // may be empty when the snapshot holds one only
	Format   string // qcow2 or raw
	Compress bool   // of qcow2 only
	Path     string // absolute; must not exist
	Caller   Caller // who may write there, and whose the file is

	RequestID string `json:"-"`
}

// ExportSnapshot starts an export and returns its operation. It holds the VM, so
// that nothing of what is read is merged or deleted meanwhile.
func (a *Agent) ExportSnapshot(ctx context.Context, req ExportRequest) (op.Record, error) {
	s, v, err := a.snapshotOf(ctx, req.Snapshot)
	if err != nil {
		return op.Record{}, err
	}
	if req.Format != "raw" && req.Format != "qcow2" {
		return op.Record{}, fault.New(fault.Usage, "the format %q is neither qcow2 nor raw", req.Format)
	}
	if err := checkPlace(req.Path); err != nil {
		return op.Record{}, err
	}
	spec := op.Spec{Kind: op.KindExport, VMID: v.id, VMName: v.name(), Request: req, RequestID: req.RequestID, UID: req.Caller.UID}
	return a.begin(ctx, spec, func(ctx context.Context, o *op.Op) error { return a.export(ctx, o, v, s, req) })
}

// export is the recipe. It reads layers that nobody writes to, beside a QEMU that
// reads them too, and makes one file, which has its name only when it is whole.
func (a *Agent) export(ctx context.Context, o *op.Op, v *vm, s catalog.Snapshot, req ExportRequest) error {
	o.Plan(4)
	o.SetSnapshot(s.ID)
	c := copying{Agent: a, o: o, vm: v, format: req.Format, compress: req.Compress}
	err := o.Step(ctx, "preflight", func(ctx context.Context) error {
		point, err := a.pointOf(ctx, v, s, req.Disk)
		if err != nil {
			return err
		}
		return c.prepare(ctx, point, req.Path, req.Caller)
	})
	if err != nil {
		return err
	}
	if err := o.Step(ctx, "copy", c.copy); err != nil {
		return err
	}
	if err := o.Step(ctx, "verify", c.verify); err != nil {
		return err
	}
	return o.Step(ctx, "publish", func(ctx context.Context) error { return publishAll(ctx, o, []*outFile{c.out}, nil) })
}

// copying is a full copy of a restore point being made.
type copying struct {
	*Agent
	o        *op.Op
	vm       *vm
	point    catalog.SnapshotDisk
	format   string
	compress bool
	chain    *heldChain
	out      *outFile
	need     uint64 // bytes that it takes at its place; 0 when nobody knows
}

// prepare opens what is read, and the place of what is made, which must have the
// space for it.
func (c *copying) prepare(ctx context.Context, point catalog.SnapshotDisk, path string, who Caller) error {
	if err := c.open(ctx, point, path, who); err != nil {
		return err
	}
	return c.enough(ctx)
}

func (c *copying) open(ctx context.Context, point catalog.SnapshotDisk, path string, who Caller) (err error) {
	c.point = point
	if c.chain, err = c.holdPoint(ctx, c.vm, point); err != nil {
		return err
	}
	c.o.Cleanup(func() { _ = c.chain.close() })
	if c.out, err = planOut(path, c.o.ID(), who); err != nil {
		return err
	}
	c.o.Cleanup(func() { _ = c.out.close() })
	return nil
}

// enough fails when the copy cannot fit. What a compressed one takes is not known
// beforehand.
func (c *copying) enough(ctx context.Context) error {
	if c.compress {
		return nil
	}
	var err error
	if c.need, err = c.chain.data(ctx); err != nil {
		return err
	}
	return c.fits(c.need, "disk "+c.point.Device)
}

// fits fails when what is made of the disks cannot have the bytes that it needs.
func (c *copying) fits(need uint64, disks string) error {
	free, err := c.out.free()
	if err == nil && free < need {
		err = fault.New(fault.NoSpace, "VM %s: %s: %d bytes are needed in %s, and %d are free", c.vm.name(), disks, need, c.out.Dir, free).
			WithHint(hintNoRoom)
	}
	return err
}

const hintNoRoom = "make room there, or choose a place that has it"

// copy makes the file and copies into it.
func (c *copying) copy(ctx context.Context) error {
	if err := c.out.begin(ctx, c.o); err != nil {
		return err
	}
	return c.failure(c.job().Run(ctx))
}

// verify reads both and compares them.
func (c *copying) verify(ctx context.Context) error { return c.failure(c.job().Verify(ctx)) }

func (c *copying) job() blockdev.Copy {
	size := c.point.Size
	return blockdev.Copy{
		From: c.chain.held, To: c.out.file, Format: c.format, Compress: c.compress,
		Progress: func(done, total uint64) { c.o.Progress(done*size/total, size, "bytes") },
	}
}

func (c *copying) failure(err error) error {
	if err == nil || errors.Is(err, context.Canceled) || fault.Of(err) == fault.Cancelled {
		return err
	}
	if kind := kindOf(err); kind != fault.NoSpace || c.need == 0 {
		return fault.New(kind, "VM %s: disk %s: copy it to %s: %w", c.vm.name(), c.point.Device, c.out.path(), err)
	}
	return fault.New(fault.NoSpace, "VM %s: disk %s: copy it to %s, where at least %d bytes are needed: %w", c.vm.name(), c.point.Device, c.out.path(), c.need, err).
		WithHint(hintNoRoom)
}

// publishAll gives files, which are whole, their names, after what has to be
// recorded of them was recorded. From here on they stay.
func publishAll(ctx context.Context, o *op.Op, files []*outFile, record func(context.Context) error) error {
	if err := nameAll(ctx, o, files, record); err != nil {
		return err
	}
	o.DropReverts()
	return nil
}

// nameAll does the same, and leaves the reverts.
func nameAll(ctx context.Context, o *op.Op, files []*outFile, record func(context.Context) error) error {
	if err := o.PointOfNoReturn(); err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	if record != nil { // before recovery would give the files their names
		if err := record(ctx); err != nil {
			return err
		}
	}
	for _, f := range files {
		if err := o.Journal(ctx, entryComplete, f); err != nil {
			return err
		}
	}
	for _, f := range files {
		if err := f.publish(); err != nil {
			return err
		}
	}
	return nil
}

// recoverExport brings an export to its end whose agent is gone.
func (a *Agent) recoverExport(o *op.Op, entries []op.Entry) error {
	whole, err := a.recoverOut(o, entries)
	if err == nil && !whole {
		err = errInterrupted()
	}
	return err
}
