package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/blockdev"
)

// heldChain is a restore point with all layers below it, open for reading.
type heldChain struct {
	layers []catalog.Layer // the restore point first
	held   []*blockdev.Held
	prefix string // where the process that has them open has its file system tree
}

func (c *heldChain) close() error {
	var errs []error
	for _, h := range c.held {
		errs = append(errs, h.Close())
	}
	c.held = nil
	return errors.Join(errs...)
}

// top returns the restore point.
func (c *heldChain) top() catalog.Layer { return c.layers[0] }

// data returns how many bytes of data the chain reads as, without its holes.
func (c *heldChain) data(ctx context.Context) (uint64, error) {
	var images []blockdev.Image
	for i := range slices.Backward(c.held) {
		images = append(images, blockdev.Image{Path: c.held[i].Path(), Format: c.layers[i].Format})
	}
	return blockdev.MergedBytes(ctx, images)
}

// holdPoint opens what a snapshot has of a disk. Every file must be the one that
// the catalog knows, name the next one as the catalog has it, and have nobody who
// writes to it.
func (a *Agent) holdPoint(ctx context.Context, v *vm, d catalog.SnapshotDisk) (_ *heldChain, err error) {
	r, err := v.alone()
	if err != nil {
		return nil, err
	}
	c := &heldChain{}
	if r != nil {
		c.prefix = r.proc.Root
	}
	defer func() {
		if err != nil {
			err = errors.Join(fault.New(kindOf(err), "VM %s: disk %s: %w", v.name(), d.Device, err), c.close())
		}
	}()
	point, err := a.catalog.Layer(ctx, d.LayerID)
	if err != nil {
		return nil, err
	}
	if c.layers, err = a.chain(ctx, point); err != nil {
		return nil, err
	}
	for i, l := range c.layers {
		h, err := blockdev.Hold(c.prefix+l.Path, l.Format)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fault.New(fault.Failed, "its layer %s is gone", l.Path).WithHint("vmsnap doctor %s tells more", v.name())
		}
		if err != nil {
			return nil, lockError(l.Path, err)
		}
		c.held = append(c.held, h)
		file, err := fileAt(h.Path())
		if err != nil {
			return nil, fmt.Errorf("layer %s: %w", l.Path, err)
		}
		if !file.is(l) {
			return nil, fault.New(fault.Unsupported, "layer %s is another file than it was", l.Path).WithHint("vmsnap doctor %s tells more", v.name())
		}
		var parent catalog.Layer
		if i+1 < len(c.layers) {
			parent = c.layers[i+1]
		}
		if err := verifyBacking(c.prefix, l, parent); err != nil {
			return nil, err
		}
	}
	return c, c.sized(d.Size)
}

// sized fails when the restore point has another size than its snapshot says.
func (c *heldChain) sized(want uint64) error {
	if c.top().Format != "qcow2" {
		return nil
	}
	h, err := blockdev.ReadHeaderFile(c.held[0].Path())
	if err == nil && h.VirtualSize != want {
		err = fault.New(fault.Unsupported, "layer %s has %d bytes, and had %d when the snapshot was taken", c.top().Path, h.VirtualSize, want)
	}
	return err
}

// checkValid fails for a snapshot whose layers do not hold any more what they
// held.
func checkValid(s catalog.Snapshot) error {
	if s.State == catalog.PointValid || s.State == "" {
		return nil
	}
	return fault.New(fault.Unsupported, "snapshot %s/%s is %s: what its layers hold is not what it was taken of", s.VMName, s.Name, s.State).
		WithHint("vmsnap snapshot delete %s/%s deletes the rest of it", s.VMName, s.Name)
}

// pointsOf returns what a snapshot holds of the disks that are named, of all when
// none is, by what they are called now.
func (a *Agent) pointsOf(ctx context.Context, v *vm, s catalog.Snapshot, names []string) ([]catalog.SnapshotDisk, error) {
	if err := checkValid(s); err != nil {
		return nil, err
	}
	disks, err := a.catalog.Disks(ctx, v.id)
	if err != nil {
		return nil, err
	}
	var points []catalog.SnapshotDisk
	var has []string
	for _, d := range s.Disks {
		d.Device = nameNow(disks, d)
		if d.Excluded {
			if slices.Contains(names, d.Device) {
				return nil, fault.New(fault.NotFound, "snapshot %s/%s was taken without disk %s", v.name(), s.Name, d.Device).
					WithHint("choose another snapshot for it")
			}
			continue
		}
		has = append(has, d.Device)
		if len(names) == 0 || slices.Contains(names, d.Device) {
			points = append(points, d)
		}
	}
	for _, n := range names {
		if !slices.Contains(has, n) {
			return nil, fault.New(fault.NotFound, "snapshot %s/%s holds no disk %q; its disks are %s", v.name(), s.Name, n, strings.Join(has, ", "))
		}
	}
	return points, nil
}

// pointOf returns what a snapshot holds of one disk, which need not be named when
// it is the only one.
func (a *Agent) pointOf(ctx context.Context, v *vm, s catalog.Snapshot, name string) (catalog.SnapshotDisk, error) {
	var names []string
	if name != "" {
		names = []string{name}
	}
	points, err := a.pointsOf(ctx, v, s, names)
	switch {
	case err != nil:
		return catalog.SnapshotDisk{}, err
	case len(points) == 1:
		return points[0], nil
	}
	var has []string
	for _, d := range points {
		has = append(has, d.Device)
	}
	return catalog.SnapshotDisk{}, fault.New(fault.Usage, "snapshot %s/%s holds %d disks: %s", v.name(), s.Name, len(has), strings.Join(has, ", ")).
		WithHint("--disk chooses one")
}
