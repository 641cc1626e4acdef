package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"connectrpc.com/connect"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/internal/daemon"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// mergeVM is a VM of vmsnapd's. It has no guest: its firmware finds nothing to boot
// and waits. What a guest would write qemu-io writes, in QEMU.
type mergeVM struct {
	dir, uuid string
	qemu      testvm.QEMU
	version   string
	file      mergeFile // by the launch path
	daemon    *daemon.Daemon
	cmd       *exec.Cmd
	qmp       *wire
}

func newMergeVM(ctx context.Context, q testvm.QEMU, dir string, plan mergePlan) (*mergeVM, error) {
	m := &mergeVM{dir: dir, uuid: newUUID(), qemu: q, file: mergeFile{filepath.Join(dir, "root.qcow2"), q, plan}}
	if err := m.set(ctx); err != nil {
		return nil, errors.Join(err, m.end())
	}
	return m, nil
}

func (m *mergeVM) set(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, mergeDeadline)
	defer cancel()
	if err := m.file.make(ctx); err != nil {
		return err
	}
	d, err := daemon.Start(ctx, daemon.Config{
		Binary: vmsnapdPath, Dir: filepath.Join(m.dir, "host"), VMs: map[string]string{vmName: m.uuid}, Tools: filepath.Dir(m.qemu.Img),
	})
	if err != nil {
		return err
	}
	m.daemon = d
	if err := m.start(ctx); err != nil {
		return err
	}
	res, err := d.VMs().GetVM(ctx, connect.NewRequest(&vmsnapv1.GetVMRequest{Vm: vmName}))
	m.version = res.Msg.GetVm().GetProcess().GetQemuVersion()
	return err
}

// mergeArguments are QEMU's, but for those of the monitors. libvirt is told the same.
func mergeArguments(name, id, disk string) []string {
	return []string{
		"-name", name, "-uuid", id, "-machine", "pc", "-cpu", "qemu64", "-m", "64",
		"-drive", "if=none,id=drive-root,format=qcow2,file=" + disk, "-device", "virtio-blk-pci,drive=drive-root,id=root",
	}
}

// start starts QEMU, and returns when vmsnapd has it too.
func (m *mergeVM) start(ctx context.Context) error {
	args := append(append([]string{}, m.qemu.Args...), mergeArguments(vmName, m.uuid, m.file.path)...)
	args = append(args, "-display", "none", "-nodefaults", "-accel", "tcg")
	for _, name := range []string{"vmsnapd", "bench"} {
		args = append(args, "-qmp", "unix:"+m.socket(name)+",server=on,wait=off")
	}
	cmd := exec.Command(m.qemu.Binary, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	m.cmd = cmd
	var err error
	if m.qmp, err = testvm.Connect(ctx, nil, func(ctx context.Context) (*wire, error) { return dialQMP(ctx, m.socket("bench")) }); err != nil {
		return err
	}
	return m.daemon.AwaitRunning(ctx, vmName)
}

func (m *mergeVM) socket(name string) string { return filepath.Join(m.dir, name+".qmp") }

// kill ends QEMU.
func (m *mergeVM) kill() error {
	if m.cmd == nil {
		return nil
	}
	if m.qmp != nil {
		m.qmp.close()
	}
	err := m.cmd.Process.Kill()
	_ = m.cmd.Wait() // it was killed
	m.cmd, m.qmp = nil, nil
	return errors.Join(err, removeIfThere(m.socket("vmsnapd")), removeIfThere(m.socket("bench")))
}

func removeIfThere(path string) error {
	if err := os.Remove(path); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// stop ends QEMU, and returns when vmsnapd knows.
func (m *mergeVM) stop(ctx context.Context) error {
	if err := m.kill(); err != nil {
		return err
	}
	return m.daemon.AwaitStopped(ctx, vmName)
}

func (m *mergeVM) end() error {
	err := m.kill()
	if m.daemon != nil {
		err = errors.Join(err, m.daemon.Stop())
	}
	return err
}

// cover takes a snapshot and fills the new layer.
func (m *mergeVM) cover(ctx context.Context) (snapshot string, err error) {
	created, err := m.daemon.Snapshots().CreateSnapshot(ctx, connect.NewRequest(&vmsnapv1.CreateSnapshotRequest{Vm: vmName, Quiesce: vmsnapv1.Quiesce_QUIESCE_NONE}))
	if err != nil {
		return "", err
	}
	operation, err := m.daemon.Wait(ctx, created.Msg.GetOperation().GetId())
	if err != nil {
		return "", err
	}
	if err := m.qmp.limit(ctx); err != nil {
		return "", err
	}
	for _, command := range fillCommands(2, m.file.plan.bytes) {
		line := fmt.Sprintf(`qemu-io -d /machine/peripheral/root/virtio-backend "%s"`, command)
		if err := m.qmp.call("human-monitor-command", object{"command-line": line}, nil); err != nil {
			return "", err
		}
	}
	snapshot = operation.GetSnapshotId()
	taken, err := m.daemon.Snapshots().GetSnapshot(ctx, connect.NewRequest(&vmsnapv1.GetSnapshotRequest{Snapshot: snapshot}))
	if err != nil {
		return "", err
	}
	return snapshot, ready(m.file.path, taken.Msg.GetSnapshot().GetDisks()[0].GetPath(), m.file.plan.bytes)
}

// mergeLive merges the active layer down, while QEMU runs.
func (m *mergeVM) mergeLive(ctx context.Context) (merged, error) {
	snapshot, err := m.cover(ctx)
	if err != nil {
		return merged{}, err
	}
	return m.deleteSnapshot(ctx, snapshot)
}

// mergeStopped merges it when QEMU has ended, and starts QEMU again.
func (m *mergeVM) mergeStopped(ctx context.Context) (merged, error) {
	snapshot, err := m.cover(ctx)
	if err != nil {
		return merged{}, err
	}
	if err := m.qmp.call("human-monitor-command", object{"command-line": `qemu-io -d /machine/peripheral/root/virtio-backend "flush"`}, nil); err != nil {
		return merged{}, err
	}
	if err := m.stop(ctx); err != nil {
		return merged{}, err
	}
	one, err := m.deleteSnapshot(ctx, snapshot)
	if err != nil {
		return merged{}, err
	}
	return one, m.start(ctx)
}

// mergeDomain is an equal VM of libvirt's.
type mergeDomain struct {
	libvirt *libvirt
	name    string
	file    mergeFile
	rounds  int
}

func newMergeDomain(ctx context.Context, l *libvirt, q testvm.QEMU, plan mergePlan) (*mergeDomain, error) {
	ctx, cancel := context.WithTimeout(ctx, mergeDeadline)
	defer cancel()
	d := &mergeDomain{libvirt: l, name: "merges", file: mergeFile{filepath.Join(l.dir, "merges", "root.qcow2"), q, plan}}
	if err := d.file.make(ctx); err != nil {
		return nil, err
	}
	id := newUUID()
	args := append([]string{q.Binary}, mergeArguments(d.name, id, d.file.path)...)
	_, err := l.create(ctx, testvm.Config{QEMU: q, Name: d.name, UUID: id}, args)
	return d, err
}

// merge has libvirt merge the active layer down.
func (d *mergeDomain) merge(ctx context.Context) (merged, error) {
	d.rounds++
	snapshot := fmt.Sprintf("s%d", d.rounds)
	if _, err := d.libvirt.virsh(ctx, "snapshot-create-as", d.name, snapshot, "--disk-only", "--no-metadata"); err != nil {
		return merged{}, err
	}
	for _, command := range fillCommands(2, d.file.plan.bytes) {
		line := fmt.Sprintf(`qemu-io -d /machine/peripheral/virtio-disk0/virtio-backend "%s"`, command)
		if _, err := d.libvirt.virsh(ctx, "qemu-monitor-command", d.name, "--hmp", line); err != nil {
			return merged{}, err
		}
	}
	overlay := filepath.Join(filepath.Dir(d.file.path), "root."+snapshot)
	if err := ready(overlay, d.file.path, d.file.plan.bytes); err != nil {
		return merged{}, err
	}
	began := time.Now()
	_, err := d.libvirt.virsh(ctx, "blockcommit", d.name, "vda", "--active", "--pivot", "--wait")
	err = errors.Join(err, os.Remove(overlay)) // which vmsnap does too
	return merged{took: time.Since(began)}, err
}

// stop ends the domain, so that its image is whole.
func (d *mergeDomain) stop(ctx context.Context) error {
	_, err := d.libvirt.virsh(ctx, "destroy", d.name)
	return err
}
