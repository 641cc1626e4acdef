package blockdev

import (
	"context"
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// BackedImage is a file whose qcow2 header names a backing file.
type BackedImage struct {
	Path    string // as QEMU names it
	File    FileID
	Backing FileID // what the name of its backing leads to now
}

// BackedImages reads the headers of all files in a directory, and returns those
// that lie on a file which is there. Files that are no images, and headers that
// ReadHeader refuses, are passed over; nothing that a header names is opened.
// What another process makes meanwhile may be missed.
func (d *Dir) BackedImages(ctx context.Context) ([]BackedImage, error) {
	entries, err := fs.ReadDir(d.root.FS(), ".")
	if err != nil {
		return nil, err
	}
	var images []BackedImage
	for _, e := range entries {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if !e.Type().IsRegular() {
			continue
		}
		image, ok, err := d.backed(e.Name())
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		if ok {
			images = append(images, image)
		}
	}
	return images, nil
}

// backed reads the header of one file.
func (d *Dir) backed(name string) (image BackedImage, ok bool, err error) {
	f, err := d.root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0) // it may be a FIFO by now
	if err != nil {
		return image, false, err
	}
	defer func() { _ = f.Close() }()
	fi, err := f.Stat()
	if err != nil {
		return image, false, err
	}
	h, err := ReadHeader(f)
	switch {
	case errors.Is(err, ErrNotQcow2), errors.Is(err, ErrRefusedImage):
		return image, false, nil
	case err != nil:
		return image, false, err
	case h.Backing == "":
		return image, false, nil
	}
	image.Path, image.File = d.Path(name), infoOf(fi).FileID
	backing, err := StatPath(d.prefix + h.BackingPath(image.Path))
	if err != nil {
		return image, false, nil //nolint:nilerr // it leads nowhere that this process can see
	}
	image.Backing = backing.FileID
	return image, true, nil
}
