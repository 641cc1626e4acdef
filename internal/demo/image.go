package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// inspectDisk proves what one disk of the snapshot holds, without vmsnap's help:
// the layer is read into a raw image as anybody could read it.
func (d *demo) inspectDisk(ctx context.Context, disk *vmsnapv1.SnapshotDisk) error {
	image := d.path(disk.GetDevice() + ".raw")
	// -U: QEMU has the layer open, read-only.
	if _, err := output(ctx, d.qemu.Img, "convert", "-U", "-f", disk.GetFormat(), "-O", "raw", disk.GetPath(), image); err != nil {
		return err
	}
	d.prove(clean(ctx, image), "e2fsck -fn finds no fault, and there is no journal to replay")
	was, err := content(ctx, image, releaseFile)
	d.prove(errors.Join(err, holds(was, oldRelease)), "%s holds %s, as before the change", releaseFile, oldRelease)
	later, err := content(ctx, image, addedFile)
	d.prove(errors.Join(err, holds(later, "")), "%s, written after the snapshot, is not there", addedFile)
	return nil
}

// clean fails unless an ext4 has no fault and needs no journal recovery.
func clean(ctx context.Context, image string) error {
	head, err := output(ctx, "dumpe2fs", "-h", image)
	if err != nil {
		return err
	}
	if strings.Contains(head, "needs_recovery") {
		err = errors.New("its journal has to be replayed")
	}
	_, fault := output(ctx, "e2fsck", "-fn", image)
	return errors.Join(err, fault)
}

// content returns what a file in an ext4 image holds, "" if there is none.
func content(ctx context.Context, image, file string) (string, error) {
	text, err := output(ctx, "debugfs", "-R", "cat /"+file, image)
	return strings.TrimSpace(text), err
}

// output runs a program and returns its standard output; an error has all that
// it said.
func output(ctx context.Context, name string, args ...string) (string, error) {
	var stdout, stderr strings.Builder
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w\n%s%s", name, err, stdout.String(), stderr.String())
	}
	return stdout.String(), nil
}
