package blockdev

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

// extent is a run of an image's virtual disk, as qemu-img map describes it.
type extent struct {
	Start  uint64 `json:"start"`
	Length uint64 `json:"length"`
	Depth  int    `json:"depth"` // of the layer that it lies in; 0 is the image itself
	Zero   bool   `json:"zero"`
	Data   bool   `json:"data"`
	Offset *int64 `json:"offset"` // in that layer's file; absent when it is not there as it is
}

// copyBuffer is what is copied at a time, in bytes.
const copyBuffer = 1 << 20

// WriteBack writes what the overlays of a chain hold into a raw block device
// with the content that they lie on. overlays are their files, the newest first;
// all are qcow2 and must not change meanwhile. size is theirs and the device's,
// in bytes. It can be done again after it was interrupted. What was written is
// durable when it returns.
//
// qemu-img commit would do it, but not while the caller holds the image locks
// that keep a QEMU away.
func WriteBack(ctx context.Context, overlays []string, device string, size uint64, progress func(done, total uint64)) (err error) {
	to, err := openDevice(device, size)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, to.Close()) }()
	files := make([]*os.File, 0, len(overlays))
	defer func() {
		for _, f := range files {
			_ = f.Close()
		}
	}()
	for _, path := range overlays {
		f, err := openImage(path)
		if err != nil {
			return err
		}
		files = append(files, f)
	}
	buffer := make([]byte, copyBuffer)
	err = mapImage(ctx, overlays[0], func(e extent) error {
		if e.Start > size || e.Length > size-e.Start {
			return fmt.Errorf("%s: an extent of %d bytes at %d is outside of the disk", overlays[0], e.Length, e.Start)
		}
		if e.Depth < len(files) {
			if err := e.copy(ctx, to, files[e.Depth], buffer); err != nil {
				return fmt.Errorf("write %d bytes at %d into %s: %w", e.Length, e.Start, device, err)
			}
		}
		progress(e.Start+e.Length, size)
		return nil
	})
	if err != nil {
		return err
	}
	return to.Sync()
}

// copy writes one extent.
func (e extent) copy(ctx context.Context, to, from *os.File, buffer []byte) error {
	if e.Zero {
		return e.zero(ctx, to, buffer)
	}
	if !e.Data || e.Offset == nil {
		return errors.New("it cannot be read from the layer's file as it is")
	}
	for done := int64(0); done < int64(e.Length); {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		part := buffer[:min(int64(len(buffer)), int64(e.Length)-done)]
		n, err := from.ReadAt(part, *e.Offset+done)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		clear(part[n:]) // QEMU does not write the end of a last cluster
		if _, err := to.WriteAt(part, int64(e.Start)+done); err != nil {
			return err
		}
		done += int64(len(part))
	}
	return nil
}

// zero writes zeroes, which most devices do by themselves.
func (e extent) zero(ctx context.Context, to *os.File, buffer []byte) error {
	err := unix.Fallocate(int(to.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, int64(e.Start), int64(e.Length))
	if !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	clear(buffer)
	for done := int64(0); done < int64(e.Length); {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := to.WriteAt(buffer[:min(int64(len(buffer)), int64(e.Length)-done)], int64(e.Start)+done)
		if err != nil {
			return err
		}
		done += int64(n)
	}
	return nil
}

// mapImage calls visit with each extent of a qcow2 image, in their order. The
// image's locks may be held by the caller (-U).
func mapImage(ctx context.Context, path string, visit func(extent) error) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	cmd := exec.CommandContext(ctx, qemuImg, "map", "-U", "--output=json", "-f", "qcow2", path)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return &ImgError{"map", "", err}
	}
	if err := cmd.Start(); err != nil {
		return &ImgError{"map", "", err}
	}
	visited := visitExtents(out, visit)
	if visited != nil {
		stop(visited) // nobody reads on
	}
	ended := cmd.Wait()
	if exit, ok := errors.AsType[*exec.ExitError](ended); ok && exit.Exited() {
		return &ImgError{"map", strings.TrimSpace(stderr.String()), ended}
	}
	if ctx.Err() != nil { // of the caller, or since what it says is of no use
		return context.Cause(ctx)
	}
	return ended
}

// visitExtents reads what qemu-img map writes, extent by extent.
func visitExtents(r io.Reader, visit func(extent) error) error {
	d := json.NewDecoder(r)
	if t, err := d.Token(); err != nil {
		return fmt.Errorf("qemu-img map: %w", err)
	} else if t != json.Delim('[') {
		return fmt.Errorf("qemu-img map: %v is no list of extents", t)
	}
	for d.More() {
		var e extent
		if err := d.Decode(&e); err != nil {
			return fmt.Errorf("qemu-img map: %w", err)
		}
		if e.Depth < 0 {
			return fmt.Errorf("qemu-img map: an extent at depth %d", e.Depth)
		}
		if err := visit(e); err != nil {
			return err
		}
	}
	if _, err := d.Token(); err != nil {
		return fmt.Errorf("qemu-img map: %w", err)
	}
	return nil
}
