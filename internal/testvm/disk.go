package testvm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
)

// makeDisk makes a disk's image if it is not there.
func makeDisk(ctx context.Context, q QEMU, d Disk) error {
	_, err := os.Stat(d.Path)
	if err == nil {
		return nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if d.Backing != "" {
		args := []string{"create", "-q", "-f", d.Format, "-b", d.Backing, "-F", d.BackingFormat, d.Path}
		if d.Size != 0 {
			args = append(args, strconv.FormatInt(d.Size, 10))
		}
		return runTool(ctx, q.Img, args...)
	}
	if d.NoFilesystem {
		return runTool(ctx, q.Img, "create", "-q", "-f", d.Format, d.Path, strconv.FormatInt(d.Size, 10))
	}
	return makeFilesystem(ctx, q, d)
}

func makeFilesystem(ctx context.Context, q QEMU, d Disk) (err error) {
	raw := d.Path
	if d.Format != Raw {
		f, err := os.CreateTemp(filepath.Dir(d.Path), d.Name+".*.new")
		if err != nil {
			return err
		}
		raw = f.Name()
		defer func() { err = errors.Join(err, os.Remove(raw)) }()
		if err := f.Close(); err != nil {
			return err
		}
	} else if err := os.WriteFile(raw, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(raw, d.Size); err != nil {
		return err
	}
	if err := runTool(ctx, "mkfs.ext4", "-q", "-F", "-L", d.Name, raw); err != nil {
		return err
	}
	if d.Format == Raw {
		return nil
	}
	return runTool(ctx, q.Img, "convert", "-q", "-f", "raw", "-O", d.Format, raw, d.Path)
}

// runTool runs a program and puts what it printed into the error.
func runTool(ctx context.Context, name string, args ...string) error {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", filepath.Base(name), args[0], err, out)
	}
	return nil
}
