package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/internal/testvm/wire"
)

// Where an ext4 file system keeps its magic number and its label, in bytes from
// the start of the device.
const (
	ext4Magic       = 0xef53
	ext4MagicOffset = 1024 + 0x38
	ext4LabelOffset = 1024 + 0x78
	ext4LabelSize   = 16
)

// mountLabels waits for the file systems with these labels and mounts each at
// wire.MountRoot/label.
func mountLabels(events uevents, labels []string) error {
	mounted := map[string]bool{}
	return events.until(func() (bool, error) {
		devices, err := filepath.Glob("/sys/block/[vsh]d*")
		if err != nil {
			return false, err
		}
		for _, device := range devices {
			device = "/dev/" + filepath.Base(device)
			label, err := readLabel(device)
			if err != nil {
				return false, err
			}
			if label == "" || mounted[label] || !slices.Contains(labels, label) {
				continue
			}
			if err := mountDisk(device, label); err != nil {
				return false, err
			}
			mounted[label] = true
		}
		return len(mounted) == len(labels), nil
	})
}

func mountDisk(device, label string) error {
	target := filepath.Join(wire.MountRoot, label)
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(device, target, "ext4", 0, ""); err != nil {
		return fmt.Errorf("mount %s at %s: %w", device, target, err)
	}
	return nil
}

// readLabel returns the label of the ext4 file system on a device, "" if there
// is none.
func readLabel(device string) (string, error) {
	f, err := os.Open(device)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENOMEDIUM) {
		return "", nil // announced, but not there yet; its own event follows
	}
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }()
	b := make([]byte, 2048)
	if n, err := f.ReadAt(b, 0); n < len(b) {
		if err != nil && errors.Is(err, unix.EIO) {
			return "", fmt.Errorf("read %s: %w", device, err)
		}
		return "", nil
	}
	if binary.LittleEndian.Uint16(b[ext4MagicOffset:]) != ext4Magic {
		return "", nil
	}
	label := b[ext4LabelOffset:][:ext4LabelSize]
	return string(bytes.TrimRight(label, "\x00")), nil
}
