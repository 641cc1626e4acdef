package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// scripted is many VMs without a QEMU, of which a host can have thousands. Of
// each there is what vmsnapd finds: a process under QEMU's name and with a
// QEMU's command line, which does nothing (idleprogram.go); the image of its
// disk; and its QMP socket and that of its guest agent, which this process
// serves (scriptedserver.go).
//
// What they answer is what a real QEMU answers with the same command line: the
// model, which is asked when one of them is asked something for the first time.
type scripted struct {
	dir     string
	qemu    testvm.QEMU
	program string
	image   []byte // of an empty disk
	model   *model
	members []*member
	servers []*server
	parent  *parent
}

func newScripted(ctx context.Context, q testvm.QEMU) (*scripted, error) {
	dir, err := os.MkdirTemp("", "vmsnap-bench-")
	if err != nil {
		return nil, err
	}
	s := &scripted{dir: dir, qemu: q, program: filepath.Join(dir, filepath.Base(q.Binary)), parent: newParent()}
	if err := s.prepare(ctx); err != nil {
		return nil, errors.Join(err, s.end())
	}
	return s, nil
}

func (s *scripted) prepare(ctx context.Context) error {
	if err := os.WriteFile(s.program, idleProgram(), 0o700); err != nil {
		return err
	}
	first := s.file(modelMember(), "qcow2")
	if err := createImage(ctx, s.qemu, first); err != nil {
		return err
	}
	var err error
	if s.image, err = os.ReadFile(first); err != nil {
		return err
	}
	s.model, err = startModel(ctx, s)
	return err
}

// arguments returns the command line of a VM, without the program.
func (s *scripted) arguments(m *member) []string {
	args := append([]string{}, s.qemu.Args...)
	args = append(args, "-name", m.name, "-uuid", m.uuid, "-S", "-display", "none", "-nodefaults",
		"-qmp", "unix:"+s.file(m, "qmp")+",server=on,wait=off",
		"-chardev", "socket,id=agent,path="+s.file(m, "agent")+",server=on,wait=off",
		"-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,id=agent-port,name=org.qemu.guest_agent.0")
	return append(args, smallMachine(s.file(m, "qcow2"))...)
}

func (s *scripted) file(m *member, kind string) string {
	return filepath.Join(s.dir, m.name+"."+kind)
}

// grow has there be so many.
func (s *scripted) grow(_ context.Context, n int) error {
	for len(s.members) < n {
		if err := s.add(); err != nil {
			return err
		}
	}
	return nil
}

func (s *scripted) add() error {
	m := newMember("scripted", len(s.members)+1) // the model is the first
	if err := os.WriteFile(s.file(m, "qcow2"), s.image, 0o600); err != nil {
		return err
	}
	for kind, serve := range map[string]conversation{"qmp": s.model.speakQMP(m), "agent": speakAgent} {
		one, err := listen(s.file(m, kind), serve)
		if err != nil {
			return err
		}
		s.servers = append(s.servers, one)
	}
	image, err := os.OpenFile(s.file(m, "qcow2"), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	m.cmd = exec.Command(s.program, s.arguments(m)...)
	m.cmd.ExtraFiles = []*os.File{image} // which it has open, as QEMU would
	if err := errors.Join(s.parent.start(m.cmd), image.Close()); err != nil {
		return fmt.Errorf("process of %s: %w", m.name, err)
	}
	s.members = append(s.members, m)
	return nil
}

// end takes all of them away.
func (s *scripted) end() error {
	endAll(s.members)
	for _, one := range s.servers {
		one.close()
	}
	if s.model != nil {
		s.model.end()
	}
	s.parent.end()
	return testvm.RemoveAll(s.dir)
}

func (s *scripted) vms() map[string]string { return uuidsOf(s.members) }

func (s *scripted) home() string { return s.dir }
