package blockdev

import (
	"context"
	"errors"
	"fmt"
)

// Below is a layer that an overlay is to lie on, opened read-only by a node of
// its own.
type Below struct {
	Node   string // name of its format node; the protocol node is Node + "-file"
	Path   string // permanent name, as QEMU opens it
	Format string // "qcow2" or "raw"
	Device bool   // it is a block device
}

// Laying is an overlay of a drive together with the layers that it is to lie on.
type Laying struct {
	Overlay Overlay
	Chain   []Below // the newest first
}

// Lay makes overlays that are part of drives lie on other layers than they were
// put on, whose nodes Open has made: all of them in one blockdev-reopen
// (qapi/block-core.json, QEMU 6.1), so that none or all have moved. The overlays
// must be empty, and the guest must stand still: what it reads changes at once.
//
// It can be done again. A *monitor.CommandError means that nothing has moved;
// monitor.ErrOutcomeUnknown that QEMU has to be asked.
//
// A QEMU before 9.0 aborts at it when a drive runs in an iothread (tried on 7.2).
func Lay(ctx context.Context, m Monitor, layings []Laying) error {
	if len(layings) == 0 {
		return nil
	}
	var reopen []any
	for _, l := range layings {
		args := l.Overlay.formatArgs("qcow2", l.Overlay.Node, l.Overlay.fileNode(), false)
		args["backing"] = l.Chain[0].Node
		reopen = append(reopen, args)
	}
	if err := m.Execute(ctx, "blockdev-reopen", map[string]any{"options": reopen}, nil); err != nil {
		return fmt.Errorf("lay overlays on other layers: %w", err)
	}
	return nil
}

// Open opens the layers of the chain, the lowest first, attached to nothing. What
// an interrupted attempt has left is opened anew. When it fails it leaves no node
// behind.
func (l Laying) Open(ctx context.Context, m Monitor) (err error) {
	g, err := ReadGraph(ctx, m)
	if err != nil {
		return err
	}
	if g.Nodes[l.Chain[0].Node] != nil && len(g.Nodes[l.Chain[0].Node].parents) > 0 {
		return nil // it is in use by now
	}
	for _, b := range l.Chain {
		if o := (Overlay{Node: b.Node}); g.Nodes[o.Node] != nil || g.Nodes[o.fileNode()] != nil {
			if err := l.Close(ctx, m); err != nil {
				return err
			}
			break
		}
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close(context.WithoutCancel(ctx), m))
		}
	}()
	var backing any
	for i := len(l.Chain) - 1; i >= 0; i-- {
		b := l.Chain[i]
		o := Overlay{Path: b.Path, Node: b.Node, Options: l.Overlay.Options}
		file := o.fileArgs(b.Path, o.fileNode(), true)
		if b.Device {
			file["driver"] = "host_device"
		}
		if err := m.Execute(ctx, "blockdev-add", file, nil); err != nil {
			return fmt.Errorf("open %s: %w", b.Path, err)
		}
		args := o.formatArgs(b.Format, o.Node, o.fileNode(), true)
		if b.Format != "raw" {
			args["backing"] = backing
		}
		if err := m.Execute(ctx, "blockdev-add", args, nil); err != nil {
			return fmt.Errorf("open %s: %w", b.Path, err)
		}
		backing = b.Node
	}
	return nil
}

// Close deletes the nodes of the chain. What does not exist is no error.
func (l Laying) Close(ctx context.Context, m Monitor) error {
	var errs []error
	for _, b := range l.Chain {
		o := Overlay{Node: b.Node}
		for _, n := range []string{o.Node, o.fileNode()} {
			errs = append(errs, deleteNode(ctx, m, n))
		}
	}
	return errors.Join(errs...)
}
