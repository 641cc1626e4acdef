package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"connectrpc.com/connect"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/internal/daemon"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

const vmName = "web"

// vmsnapdPath is what `make build` builds, seen from the module's root.
const vmsnapdPath = "bin/vmsnapd"

// scene is a guest that writes to two disks all the time, and a vmsnapd that
// manages it.
type scene struct {
	dir     string
	qemu    testvm.QEMU
	version string // as QEMU tells it
	guest   *testvm.Guest
	writers *testvm.Writers
	daemon  *daemon.Daemon
}

// newScene sets a scene with a guest of so much memory; 0 is the usual little.
func newScene(ctx context.Context, q testvm.QEMU, memoryMiB int) (*scene, error) {
	dir, err := os.MkdirTemp("", "vmsnap-bench-")
	if err != nil {
		return nil, err
	}
	s := &scene{dir: dir, qemu: q}
	if err := s.set(ctx, memoryMiB); err != nil {
		return nil, errors.Join(err, s.end())
	}
	return s, nil
}

func (s *scene) set(ctx context.Context, memoryMiB int) error {
	// The second QMP socket is for the rival.
	g, err := testvm.Launch(ctx, testvm.Config{
		QEMU: s.qemu, Name: vmName, Dir: filepath.Join(s.dir, vmName), Disks: testvm.TwoDisks(), MemoryMiB: memoryMiB, ExtraQMP: 1,
	})
	if err != nil {
		return err
	}
	s.guest = g
	if err := s.startDaemon(ctx); err != nil {
		return err
	}
	res, err := s.daemon.VMs().GetVM(ctx, connect.NewRequest(&vmsnapv1.GetVMRequest{Vm: vmName}))
	if err != nil {
		return err
	}
	s.version = res.Msg.GetVm().GetProcess().GetQemuVersion()
	s.writers, err = g.StartWriters(ctx)
	return err
}

func (s *scene) startDaemon(ctx context.Context) error {
	d, err := daemon.Start(ctx, daemon.Config{
		Binary: vmsnapdPath, Dir: filepath.Join(s.dir, "host"), VMs: map[string]string{vmName: s.guest.UUID},
	})
	if err != nil {
		return err
	}
	s.daemon = d
	return d.AwaitRunning(ctx, vmName)
}

func (s *scene) stopDaemon() error {
	d := s.daemon
	s.daemon = nil
	return d.Stop()
}

// end takes everything away.
func (s *scene) end() error {
	var errs []error
	if s.daemon != nil {
		errs = append(errs, s.stopDaemon())
	}
	if s.guest != nil {
		s.guest.Kill()
	}
	return errors.Join(append(errs, testvm.RemoveAll(s.dir))...)
}
