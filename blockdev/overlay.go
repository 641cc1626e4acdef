package blockdev

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/vmsnap/vmsnap/monitor"
)

// Options are the properties of a layer's nodes that a new layer must repeat,
// since QEMU does not inherit them.
type Options struct {
	Cache        Cache
	DetectZeroes string // "", "off", "on" or "unmap"
	Discard      string // "", "ignore" or "unmap"
	AIO          string // "", "threads", "native" or "io_uring"
}

// Overlay is a qcow2 layer to be put on a drive.
type Overlay struct {
	Path       string // as QEMU opens it
	Node       string // name of its format node; the protocol node is Node + "-file"
	Size       uint64 // virtual size in bytes; must equal the base's
	BasePath   string // permanent name of the layer below, written into the header
	BaseFormat string // "qcow2" or "raw"
	Options    Options
}

func (o Overlay) fileNode() string { return o.Node + "-file" }

// Format writes the overlay's header into its file, which Dir.CreateFile has made in
// dir, and flushes it. The base is not opened, so that the caller can hold its locks;
// its format and size are given, never probed.
//
// QEMU could do this too, and would die of it: while blockdev-create opens what it
// has formatted, QEMU 7.2 fails an assertion (qcow2_get_specific_info) at the
// query-named-block-nodes of anybody.
func (o Overlay) Format(ctx context.Context, dir *Dir) error {
	f, err := dir.openEmpty(filepath.Base(o.Path))
	if err == nil {
		err = errors.Join(Link(ctx, f, o.BasePath, o.BaseFormat, o.Size), f.Close())
	}
	if err != nil {
		return fmt.Errorf("format overlay %s: %w", o.Path, err)
	}
	return nil
}

// Open opens the overlay, which is formatted, in QEMU, attached to nothing. When it
// fails it leaves no node behind; the file is the caller's.
func (o Overlay) Open(ctx context.Context, m Monitor) (err error) {
	if err := m.Execute(ctx, "blockdev-add", o.fileArgs(o.Path, o.fileNode(), false), nil); err != nil {
		return fmt.Errorf("open overlay %s: %w", o.Path, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, o.Remove(context.WithoutCancel(ctx), m))
		}
	}()
	args := o.formatArgs("qcow2", o.Node, o.fileNode(), false)
	args["backing"] = nil // absent would open the backing file now, a second time
	if err := m.Execute(ctx, "blockdev-add", args, nil); err != nil {
		return fmt.Errorf("open overlay %s: %w", o.Path, err)
	}
	return nil
}

// Remove deletes the overlay's nodes. What does not exist is no error, so it can
// follow any step of Open.
func (o Overlay) Remove(ctx context.Context, m Monitor) error {
	var errs []error
	for _, n := range []string{o.Node, o.fileNode()} {
		if err := deleteNode(ctx, m, n); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// deleteNode deletes a node and is content when there is none.
func deleteNode(ctx context.Context, m Monitor, name string) error {
	err := m.Execute(ctx, "blockdev-del", map[string]any{"node-name": name}, nil)
	var ce *monitor.CommandError
	if errors.As(err, &ce) {
		exists, qerr := nodeExists(ctx, m, name)
		if qerr == nil && !exists {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("delete node %s: %w", name, err)
	}
	return nil
}

func nodeExists(ctx context.Context, m Monitor, name string) (bool, error) {
	var nodes []namedNode
	if err := m.Execute(ctx, "query-named-block-nodes", map[string]any{"flat": true}, &nodes); err != nil {
		return false, err
	}
	for _, n := range nodes {
		if n.NodeName == name {
			return true, nil
		}
	}
	return false, nil
}

func (o Overlay) fileArgs(path, node string, readOnly bool) map[string]any {
	args := map[string]any{
		"driver": "file", "filename": path, "node-name": node, "cache": o.Options.Cache,
		"read-only": readOnly, "auto-read-only": false,
	}
	setIf(args, "discard", o.Options.Discard)
	setIf(args, "aio", o.Options.AIO)
	return args
}

func (o Overlay) formatArgs(driver, node, file string, readOnly bool) map[string]any {
	args := map[string]any{
		"driver": driver, "node-name": node, "file": file, "cache": o.Options.Cache, "read-only": readOnly,
	}
	setIf(args, "discard", o.Options.Discard)
	if !readOnly {
		setIf(args, "detect-zeroes", o.Options.DetectZeroes)
	}
	return args
}

func setIf(args map[string]any, key, value string) {
	if value != "" {
		args[key] = value
	}
}

// Pair puts an overlay on a node.
type Pair struct {
	Base    string // node that is covered
	Overlay string // node that covers it
}

// Cut puts all overlays on their bases in one transaction: all or none. A
// *monitor.CommandError means that nothing changed; monitor.ErrOutcomeUnknown
// that QEMU has to be asked.
func Cut(ctx context.Context, m Monitor, pairs []Pair) error {
	type action struct {
		Type string            `json:"type"`
		Data map[string]string `json:"data"`
	}
	actions := make([]action, len(pairs))
	for i, p := range pairs {
		actions[i] = action{"blockdev-snapshot", map[string]string{"node": p.Base, "overlay": p.Overlay}}
	}
	return m.Execute(ctx, "transaction", map[string]any{"actions": actions}, nil)
}

// ReopenBacking makes the overlay's backing a node that is opened by the base's
// permanent name, read-only, and deletes the nodes that were opened by another
// name of it and are not used any more. deeper is the node below the base, empty
// when there is none. It can be done again after it was interrupted.
//
// QEMU reopens files by the name they were opened with, so as long as a node is
// called by the launch path, a reopen after the launch path has moved on would
// open the wrong layer.
func (o Overlay) ReopenBacking(ctx context.Context, m Monitor, node, deeper string, otherNames ...string) error {
	g, err := ReadGraph(ctx, m)
	if err != nil {
		return err
	}
	top := g.Nodes[o.Node]
	if top == nil {
		return fmt.Errorf("reopen the backing of %s: QEMU has no node %s", o.Path, o.Node)
	}
	if top.Child("backing") != node {
		base := Overlay{Path: o.BasePath, Node: node, Options: o.Options}
		if g.Nodes[base.Node] != nil || g.Nodes[base.fileNode()] != nil {
			if err := base.Remove(ctx, m); err != nil {
				return err
			}
		}
		if err := o.reopenOn(ctx, m, base, deeper); err != nil {
			return err
		}
	}
	return DropUnused(context.WithoutCancel(ctx), m, otherNames)
}

// reopenOn opens the base anew and makes it the overlay's backing.
func (o Overlay) reopenOn(ctx context.Context, m Monitor, base Overlay, deeper string) (err error) {
	if err := m.Execute(ctx, "blockdev-add", base.fileArgs(base.Path, base.fileNode(), true), nil); err != nil {
		return fmt.Errorf("open %s by its permanent name: %w", base.Path, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, base.Remove(context.WithoutCancel(ctx), m))
		}
	}()
	args := base.formatArgs(o.BaseFormat, base.Node, base.fileNode(), true)
	if o.BaseFormat != "raw" {
		args["backing"] = nil
		if deeper != "" {
			args["backing"] = deeper
		}
	}
	if err := m.Execute(ctx, "blockdev-add", args, nil); err != nil {
		return fmt.Errorf("open %s by its permanent name: %w", base.Path, err)
	}
	reopen := o.formatArgs("qcow2", o.Node, o.fileNode(), false)
	reopen["backing"] = base.Node
	if err := m.Execute(ctx, "blockdev-reopen", map[string]any{"options": []any{reopen}}, nil); err != nil {
		return fmt.Errorf("reopen the backing of %s: %w", o.Path, err)
	}
	return nil
}

// DropUnused deletes the nodes that were opened by one of the names and that
// nothing uses any more. Those of -drive end with their last user, so there may
// be none.
func DropUnused(ctx context.Context, m Monitor, names []string) error {
	for {
		g, err := ReadGraph(ctx, m)
		if err != nil {
			return err
		}
		dropped := false
		for _, n := range g.Nodes {
			if len(n.parents) > 0 || !slices.Contains(names, n.Filename) {
				continue
			}
			if err := deleteNode(ctx, m, n.Name); err != nil {
				return err
			}
			dropped = true // a format node frees its protocol node
		}
		if !dropped {
			return nil
		}
	}
}
