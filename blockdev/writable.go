package blockdev

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Target is a layer that a merge writes to: its data, or the name of its backing
// in its header. It was opened read-only when it was covered, and QEMU opens it
// again by the name that its node has.
type Target struct {
	Node    string  // format node
	File    FileID  // which file the layer is
	Options Options // to open it with, for a node that this package made
}

// MisnamedError means that QEMU calls a layer by a name that does not lead to
// it any more: opening it for writing would open another file.
type MisnamedError struct {
	Node string
	Name string // QEMU's file name for it
	Err  error  // why the name is of no use; nil when it leads to another file
}

func (e *MisnamedError) Error() string {
	if e.Err != nil {
		return fmt.Sprintf("QEMU calls node %s by the name %s: %v", e.Node, e.Name, e.Err)
	}
	return fmt.Sprintf("QEMU calls node %s by the name %s, which leads to another file now", e.Node, e.Name)
}

func (e *MisnamedError) Unwrap() error { return e.Err }

// verifyName fails with a MisnamedError unless the name by which the process
// knows the layer leads to its file, and the process has that file open.
func (t Target) verifyName(pid int, l Layer) error {
	info, err := StatPath(pathOf(pid, l.Filename))
	if err != nil {
		return &MisnamedError{t.Node, l.Filename, err}
	}
	if info.FileID != t.File {
		return &MisnamedError{t.Node, l.Filename, nil}
	}
	open, err := hasOpen(pid, t.File)
	if err == nil && !open {
		err = errors.New("QEMU does not have the file open that it leads to")
	}
	if err != nil {
		return &MisnamedError{t.Node, l.Filename, err}
	}
	return nil
}

// pathOf is where this process finds what another one calls by a name.
func pathOf(pid int, name string) string {
	if filepath.IsAbs(name) {
		return fmt.Sprintf("/proc/%d/root%s", pid, name)
	}
	return fmt.Sprintf("/proc/%d/cwd/%s", pid, name)
}

// hasOpen reports whether a process has a file open.
func hasOpen(pid int, file FileID) (bool, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	fds, err := os.ReadDir(dir)
	if err != nil {
		return false, fmt.Errorf("what QEMU has open cannot be seen: %w", err)
	}
	for _, fd := range fds {
		info, err := StatPath(filepath.Join(dir, fd.Name()))
		if err == nil && info.FileID == file {
			return true, nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, fmt.Errorf("what QEMU has open cannot be seen: %w", err)
		}
	}
	return false, nil
}

// layer describes a format node as a layer.
func (g *Graph) layer(node string) (Layer, error) {
	n := g.Nodes[node]
	if n == nil {
		return Layer{}, fmt.Errorf("QEMU has no node %s", node)
	}
	l := Layer{Node: n, Filename: n.Filename}
	if f := g.Nodes[n.Child("file")]; f != nil {
		l.File, l.Filename = f, f.Filename
	}
	return l, nil
}

// own reports whether this package opened the layer, with two nodes that have
// names (Overlay). All others were opened as one, and QEMU reopens them as one;
// it cannot be told to reopen a node that it named itself.
func (l Layer) own() bool {
	return l.File != nil && l.File.Name == Overlay{Node: l.Node.Name}.fileNode() && !strings.HasPrefix(l.Node.Name, "#")
}

// reopen makes both nodes of a layer writable or read-only. Layers that QEMU
// reopens by itself are let be.
func (t Target) reopen(ctx context.Context, m Monitor, g *Graph, readOnly bool) error {
	l, err := g.layer(t.Node)
	if err != nil {
		return err
	}
	if !l.own() || l.Node.ReadOnly == readOnly && l.File.ReadOnly == readOnly {
		return nil
	}
	o := Overlay{Node: l.Node.Name, Options: t.Options}
	file := o.fileArgs(l.Filename, l.File.Name, readOnly)
	file["driver"] = l.File.Driver
	format := o.formatArgs(l.Node.Driver, l.Node.Name, l.File.Name, readOnly)
	if l.Node.Driver != "raw" {
		format["backing"] = nil
		if b := l.Node.Child("backing"); b != "" {
			format["backing"] = b
		}
	}
	// In one command: a format node cannot be writable on a file that is not.
	if err := m.Execute(ctx, "blockdev-reopen", map[string]any{"options": []any{format, file}}, nil); err != nil {
		return fmt.Errorf("reopen %s: %w", l.Filename, err)
	}
	return nil
}
