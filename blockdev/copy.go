package blockdev

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
)

// Held is a layer that is open for reading until Close. No QEMU can write to it
// meanwhile, and what is read is this file, whatever its name comes to lead to.
type Held struct {
	Format string // "qcow2" or "raw"
	Info   Info
	lock   *Lock
}

// Hold opens a layer for reading. It fails with ErrLocked when a QEMU writes to
// it; those that read it are let be.
func Hold(path, format string) (*Held, error) {
	l, err := LockNoWriters(path)
	if err != nil {
		return nil, err
	}
	fi, err := l.f.Stat()
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return &Held{Format: format, Info: infoOf(fi), lock: l}, nil
}

// Path returns a name by which this process opens the very same file again.
func (h *Held) Path() string { return fmt.Sprintf("/proc/self/fd/%d", h.lock.f.Fd()) }

// Close lets the layer go.
func (h *Held) Close() error { return h.lock.Close() }

// Copy copies what a chain of layers reads as into a file that depends on
// nothing. qemu-img is given descriptors and the order in which the layers lie on
// each other: it follows no name, neither in a header nor in a directory. It is
// killed when this process dies.
type Copy struct {
	From     []*Held                  // the top first, with all below it
	To       *os.File                 // empty, open for reading and writing
	Format   string                   // of To: "qcow2" or "raw"
	Compress bool                     // of qcow2 only
	Progress func(done, total uint64) // in ten-thousandths; may be nil
}

// Run copies. What reads as zeroes takes no space. The copy is durable when Run
// returns nil.
func (c Copy) Run(ctx context.Context) error {
	from, err := c.source()
	if err != nil {
		return err
	}
	args := []string{"convert", "-p", "-O", c.Format}
	if c.Compress {
		args = append(args, "-c")
	}
	if err := runWith(ctx, c.files(), c.Progress, nil, append(args, from, c.descriptor())...); err != nil {
		return err
	}
	return syncWithin(ctx, c.To)
}

// ErrDiffers means that a copy does not read as what it was made of.
var ErrDiffers = errors.New("the copy differs from what it was made of")

// Verify reads the copy and the layers and fails with ErrDiffers unless they hold
// the same.
func (c Copy) Verify(ctx context.Context) error {
	from, err := c.source()
	if err != nil {
		return err
	}
	to, err := imageName([]imageFile{{c.descriptor(), c.Format, false}})
	if err != nil {
		return err
	}
	err = runWith(ctx, c.files(), c.Progress, nil, "compare", "-p", from, to)
	// qemu-img compare ends with 1 when the contents differ, and above when it
	// cannot compare.
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.ExitCode() == 1 {
		return fmt.Errorf("%w: %w", ErrDiffers, err)
	}
	return err
}

// Link makes an empty file a qcow2 that lies on a layer, which is not opened: its
// path is written into the header as it is, with its format.
func Link(ctx context.Context, to *os.File, path, format string, size uint64) error {
	err := runWith(ctx, []*os.File{to}, nil, nil, "create", "-q", "-f", "qcow2", "-u", "-b", path, "-F", format, childPath(0), strconv.FormatUint(size, 10))
	if err != nil {
		return err
	}
	h, err := ReadHeader(to)
	if err != nil {
		return err
	}
	if h.Backing != path || h.BackingFormat != format || h.VirtualSize != size {
		return fmt.Errorf("the new image lies on %q (%s) and has %d bytes, and not on %q (%s) with %d", h.Backing, h.BackingFormat, h.VirtualSize, path, format, size)
	}
	return syncWithin(ctx, to)
}

// files are what qemu-img has open, from the descriptor 3 on.
func (c Copy) files() []*os.File {
	files := []*os.File{c.To}
	for _, h := range c.From {
		files = append(files, h.lock.f)
	}
	return files
}

// descriptor is what qemu-img calls the copy.
func (c Copy) descriptor() string { return childPath(0) }

// childPath names the nth of a child's extra files.
func childPath(n int) string { return fmt.Sprintf("/proc/self/fd/%d", 3+n) }

// source describes the layers to qemu-img.
func (c Copy) source() (string, error) {
	if len(c.From) == 0 {
		return "", errors.New("copy of no layer")
	}
	var files []imageFile
	for i, h := range c.From {
		files = append(files, imageFile{childPath(1 + i), h.Format, h.Info.Device})
	}
	return imageName(files)
}

// imageFile is a layer as QEMU is told to open it.
type imageFile struct {
	path, format string
	device       bool
}

// imageName describes a chain of layers, the top first, as a file name for
// qemu-img. Each layer says what it lies on, the lowest that it lies on nothing,
// so that the names in the headers are not looked at. No locks are taken.
func imageName(chain []imageFile) (string, error) {
	var below any // null for the lowest
	for i := len(chain) - 1; i >= 0; i-- {
		l := chain[i]
		driver := "file"
		if l.device {
			driver = "host_device"
		}
		node := map[string]any{
			"driver": l.format, "read-only": true,
			"file": map[string]any{"driver": driver, "filename": l.path, "locking": "off", "read-only": true},
		}
		if l.format == "qcow2" {
			node["backing"] = below
		} else if below != nil {
			return "", fmt.Errorf("%s: an image of the format %s cannot lie on another one", l.path, l.format)
		}
		below = node
	}
	text, err := json.Marshal(below)
	return "json:" + string(text), err
}
