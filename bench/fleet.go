package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"github.com/prometheus/procfs"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// fleet is many idle QEMU processes. The first of them have a disk, so that
// there is something to take a snapshot of; the others have no machine at all,
// which a host can have hundreds of.
type fleet struct {
	dir     string
	qemu    testvm.QEMU
	members []*member
	starts  chan *member // to the thread that all are children of
}

// member is one QEMU of a fleet.
type member struct {
	name, uuid string
	cmd        *exec.Cmd
	started    chan error
}

// withDisk is how many of a fleet have a disk.
const withDisk = 100

func newFleet(q testvm.QEMU) (*fleet, error) {
	dir, err := os.MkdirTemp("", "vmsnap-bench-")
	if err != nil {
		return nil, err
	}
	f := &fleet{dir: dir, qemu: q, starts: make(chan *member)}
	go func() {
		// The kernel takes the thread that started a process for its parent,
		// whose end is the process's: none is left behind.
		runtime.LockOSThread()
		for m := range f.starts {
			m.started <- m.cmd.Start()
		}
	}()
	return f, nil
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
	m := &member{name: fmt.Sprintf("vm%04d", i), uuid: fmt.Sprintf("00000000-0000-4000-8000-%012d", i), started: make(chan error)}
	args := append([]string{}, f.qemu.Args...)
	args = append(args, "-name", m.name, "-uuid", m.uuid, "-S", "-display", "none", "-nodefaults",
		"-qmp", "unix:"+f.socket(m)+",server=on,wait=off")
	if i < withDisk {
		image := filepath.Join(f.dir, m.name+".qcow2")
		if out, err := exec.CommandContext(ctx, f.qemu.Img, "create", "-q", "-f", "qcow2", image, "8M").CombinedOutput(); err != nil {
			return fmt.Errorf("qemu-img create: %w: %s", err, out)
		}
		args = append(args, "-machine", "pc,accel=tcg", "-m", "16",
			"-drive", "file="+image+",if=none,id=drive-root,format=qcow2", "-device", "virtio-blk-pci,drive=drive-root,id=root")
	} else {
		args = append(args, "-machine", "none")
	}
	m.cmd = exec.Command(f.qemu.Binary, args...)
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	f.starts <- m
	if err := <-m.started; err != nil {
		return err
	}
	f.members = append(f.members, m)
	return nil
}

// end kills all of them and takes their files away.
func (f *fleet) end() error {
	for _, m := range f.members {
		_ = m.cmd.Process.Kill() // fails only if it has ended
	}
	for _, m := range f.members {
		_ = m.cmd.Wait() // it was killed
	}
	close(f.starts)
	return testvm.RemoveAll(f.dir)
}

// uuids returns the UUIDs by name.
func (f *fleet) uuids() map[string]string {
	all := map[string]string{}
	for _, m := range f.members {
		all[m.name] = m.uuid
	}
	return all
}

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

// usage is what a process has used and uses.
type usage struct {
	cpu      time.Duration // of user and system, since its start
	resident int64         // bytes
	files    int           // descriptors
	threads  int
}

func usageOf(pid int) (usage, error) {
	p, err := procfs.NewProc(pid)
	if err != nil {
		return usage{}, err
	}
	stat, err := p.Stat()
	if err != nil {
		return usage{}, err
	}
	files, err := p.FileDescriptorsLen()
	return usage{
		cpu: time.Duration(stat.CPUTime() * float64(time.Second)), resident: int64(stat.ResidentMemory()), files: files, threads: stat.NumThreads,
	}, err
}
