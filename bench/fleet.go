package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// fleet is many idle QEMU processes. The first of them have a disk, so that
// there is something to take a snapshot of; the others have no machine at all,
// which a host can have hundreds of.
type fleet struct {
	dir     string
	qemu    testvm.QEMU
	members []*member
	parent  *parent
}

// member is one VM of a fleet, and its process.
type member struct {
	name, uuid string
	cmd        *exec.Cmd
}

// newMember names the i-th VM of those that are called so.
func newMember(kind string, i int) *member {
	return &member{name: fmt.Sprintf("%s%04d", kind, i), uuid: fmt.Sprintf("00000000-0000-4000-8000-%012d", i)}
}

// uuidsOf returns the UUIDs by name.
func uuidsOf(members []*member) map[string]string {
	all := map[string]string{}
	for _, m := range members {
		all[m.name] = m.uuid
	}
	return all
}

// endAll kills the processes of VMs.
func endAll(members []*member) {
	for _, m := range members {
		_ = m.cmd.Process.Kill() // fails only if it has ended
	}
	for _, m := range members {
		_ = m.cmd.Wait() // it was killed
	}
}

// withDisk is how many of a fleet have a disk.
const withDisk = atOnce

func newFleet(q testvm.QEMU) (*fleet, error) {
	dir, err := os.MkdirTemp("", "vmsnap-bench-")
	if err != nil {
		return nil, err
	}
	return &fleet{dir: dir, qemu: q, parent: newParent()}, nil
}

// grow has the fleet be so many, and returns when the last has a monitor.
func (f *fleet) grow(ctx context.Context, n int) error {
	for len(f.members) < n {
		if err := f.add(ctx); err != nil {
			return err
		}
	}
	for _, m := range f.members {
		if err := awaitFile(ctx, f.socket(m)); err != nil {
			return fmt.Errorf("QEMU of %s: %w", m.name, err)
		}
	}
	return nil
}

func (f *fleet) socket(m *member) string { return filepath.Join(f.dir, m.name+".qmp") }

func (f *fleet) add(ctx context.Context) error {
	i := len(f.members)
	m := newMember("vm", i)
	args := append([]string{}, f.qemu.Args...)
	args = append(args, "-name", m.name, "-uuid", m.uuid, "-S", "-display", "none", "-nodefaults",
		"-qmp", "unix:"+f.socket(m)+",server=on,wait=off")
	if i < withDisk {
		image := filepath.Join(f.dir, m.name+".qcow2")
		if err := createImage(ctx, f.qemu, image); err != nil {
			return err
		}
		args = append(args, smallMachine(image)...)
	} else {
		args = append(args, "-machine", "none")
	}
	m.cmd = exec.Command(f.qemu.Binary, args...)
	if err := f.parent.start(m.cmd); err != nil {
		return err
	}
	f.members = append(f.members, m)
	return nil
}

// createImage makes an empty image of a small disk.
func createImage(ctx context.Context, q testvm.QEMU, path string) error {
	if out, err := exec.CommandContext(ctx, q.Img, "create", "-q", "-f", "qcow2", path, "8M").CombinedOutput(); err != nil {
		return fmt.Errorf("qemu-img create: %w: %s", err, out)
	}
	return nil
}

// smallMachine returns the arguments of a machine with one disk.
func smallMachine(image string) []string {
	return []string{
		"-machine", "pc,accel=tcg", "-m", "16",
		"-drive", "file=" + image + ",if=none,id=drive-root,format=qcow2", "-device", "virtio-blk-pci,drive=drive-root,id=root",
	}
}

// end kills all of them and takes their files away.
func (f *fleet) end() error {
	endAll(f.members)
	f.parent.end()
	return testvm.RemoveAll(f.dir)
}

func (f *fleet) vms() map[string]string { return uuidsOf(f.members) }

func (f *fleet) home() string { return f.dir }

// fleetInterval is the time between two looks at what announces nothing.
const fleetInterval = 20 * time.Millisecond

func awaitFile(ctx context.Context, path string) error {
	for {
		if _, err := os.Stat(path); err == nil || !errors.Is(err, os.ErrNotExist) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s does not appear: %w", path, ctx.Err())
		case <-time.After(fleetInterval):
		}
	}
}
