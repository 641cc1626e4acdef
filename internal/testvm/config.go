package testvm

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Buses, styles and formats of disks.
const (
	Virtio = "virtio"
	SCSI   = "scsi"
	IDE    = "ide"

	StyleDrive    = "drive"    // -drive with -device
	StyleBlockdev = "blockdev" // -blockdev nodes with -device

	Raw   = "raw"
	Qcow2 = "qcow2"
)

// Defaults of a Config.
const (
	DefaultMemoryMiB = 192
	DefaultDiskSize  = 64 << 20
)

// maxSocketPath is what fits into sun_path with its final zero byte.
const maxSocketPath = 107

// Disk describes a disk of a guest. Only Name has to be given.
type Disk struct {
	Name   string // id of the device, label of the file system, and where it is mounted under /mnt
	Size   int64  // bytes; DefaultDiskSize if 0
	Format string // Qcow2 (default) or Raw
	Bus    string // Virtio (default), SCSI or IDE
	Style  string // StyleDrive (default) or StyleBlockdev

	// Path is an image that exists already, instead of a new one that Launch
	// makes in the guest's directory. Backing makes the new image an overlay of
	// an image in BackingFormat (Qcow2 by default), of Size if that is given.
	Path          string
	Backing       string
	BackingFormat string

	NoFilesystem     bool // nothing is made on it or mounted from it
	NoDeclaredFormat bool // the command line does not say the format (StyleDrive only)
	Throttle         bool // with I/O limits, too high to be felt
	IOThread         bool // in an I/O thread of its own (not on IDE)
}

// Config describes a guest. The zero value but for QEMU is a guest with the
// disks of TwoDisks, one QMP socket and a guest agent.
type Config struct {
	QEMU QEMU
	Name string // unique if empty
	UUID string // random if empty
	// Dir holds everything of the guest: images, sockets, logs. It is made if it
	// is not there. Its path must leave room for the name of a socket (108 bytes
	// in all). If it is empty, a new one with a short path is made.
	Dir       string
	Disks     []Disk // TwoDisks if nil; no disk if empty
	MemoryMiB int    // DefaultMemoryMiB if 0

	NoGuestAgent bool
	NoQMP        bool
	ExtraQMP     int    // additional QMP sockets, in the -chardev and -mon form
	FreezeHook   string // a shell script that qemu-ga calls with "freeze" and "thaw"
	NoReboot     bool   // -no-reboot
	ExtraArgs    []string
}

// TwoDisks returns the disks "root" and "data": qcow2 on virtio.
func TwoDisks() []Disk {
	return []Disk{{Name: "root"}, {Name: "data"}}
}

// withDefaults fills in what was left out and refuses what cannot work.
func (c Config) withDefaults() (Config, error) {
	if c.QEMU.Binary == "" {
		return c, errors.New("no QEMU given")
	}
	if c.UUID == "" {
		c.UUID = newUUID()
	}
	if c.Name == "" {
		c.Name = "testvm-" + c.UUID[:8]
	}
	if c.MemoryMiB == 0 {
		c.MemoryMiB = DefaultMemoryMiB
	}
	if c.Disks == nil {
		c.Disks = TwoDisks()
	}
	dir, err := filepath.Abs(c.Dir)
	if err != nil {
		return c, err
	}
	c.Dir = dir
	if longest := filepath.Join(dir, heartbeatSocket); len(longest) > maxSocketPath {
		return c, fmt.Errorf("%s is longer than %d bytes", longest, maxSocketPath)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return c, err
	}
	c.Disks = slices.Clone(c.Disks)
	for i := range c.Disks {
		if err := c.Disks[i].setDefaults(dir); err != nil {
			return c, fmt.Errorf("disk %q: %w", c.Disks[i].Name, err)
		}
	}
	return c, nil
}

func (d *Disk) setDefaults(dir string) error {
	setDefault(&d.Format, Qcow2)
	setDefault(&d.Bus, Virtio)
	setDefault(&d.Style, StyleDrive)
	if d.Backing != "" {
		setDefault(&d.BackingFormat, Qcow2)
	} else if d.Size == 0 {
		d.Size = DefaultDiskSize
	}
	switch {
	case d.Name == "" || strings.ContainsAny(d.Name, ",= /"):
		return errors.New("a disk needs a name that can be an id")
	case !slices.Contains([]string{Raw, Qcow2}, d.Format):
		return fmt.Errorf("unknown format %q", d.Format)
	case !slices.Contains([]string{Virtio, SCSI, IDE}, d.Bus):
		return fmt.Errorf("unknown bus %q", d.Bus)
	case !slices.Contains([]string{StyleDrive, StyleBlockdev}, d.Style):
		return fmt.Errorf("unknown style %q", d.Style)
	case d.Style == StyleBlockdev && d.NoDeclaredFormat:
		return errors.New("a blockdev always has a format")
	case d.Bus == IDE && d.IOThread:
		return errors.New("an IDE disk has no I/O thread")
	case len(d.Name) > 16 && !d.NoFilesystem:
		return errors.New("a label has at most 16 bytes")
	}
	if d.Path == "" {
		d.Path = filepath.Join(dir, d.Name+"."+d.Format)
	}
	return nil
}

func setDefault(s *string, value string) {
	if *s == "" {
		*s = value
	}
}

// newUUID returns a random (version 4) UUID.
func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	h := hex.EncodeToString(b[:])
	return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-")
}
