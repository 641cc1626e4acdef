package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"connectrpc.com/connect"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

// machine is a QEMU of any command line, whose guest never runs and to which
// the test has no monitor.
type machine struct {
	t       *testing.T
	name    string
	uuid    string
	dir     string // short enough for sockets
	command []string
	files   []*os.File // inherited, from descriptor 3 on
	cmd     *exec.Cmd
	ended   chan struct{}
}

// newMachine describes a VM that is not started yet. DIR in an argument is its
// directory.
func newMachine(t *testing.T, q testvm.QEMU, name string, args ...string) *machine {
	t.Helper()
	dir, err := os.MkdirTemp("", "vs-")
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{t: t, name: name, dir: dir, uuid: newUUID(t)}
	m.command = append([]string{q.Binary}, q.Args...)
	m.command = append(m.command, "-name", name, "-uuid", m.uuid, "-S", "-display", "none", "-nodefaults", "-machine", "pc,accel=tcg", "-m", "16")
	for _, a := range args {
		m.command = append(m.command, os.Expand(a, func(string) string { return dir }))
	}
	t.Cleanup(func() {
		m.kill()
		if out, err := exec.Command("chattr", "-R", "-f", "-i", dir).CombinedOutput(); err != nil {
			t.Logf("chattr: %v\n%s", err, out) // RemoveAll tells whether that matters
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return m
}

// qmp is the argument of a monitor on a socket in the machine's directory.
func qmp(name string) string { return "unix:${DIR}/" + name + ",server=on,wait=off" }

// disk makes an image and returns the arguments of a drive on it.
func (m *machine) disk(q testvm.QEMU, id string) []string {
	m.t.Helper()
	path := filepath.Join(m.dir, id+".qcow2")
	img(m.t, q, "create", "-q", "-f", "qcow2", path, "8M")
	return []string{"-drive", "file=" + path + ",if=none,id=drive-" + id + ",format=qcow2", "-device", "virtio-blk-pci,drive=drive-" + id + ",id=" + id}
}

func (m *machine) start() {
	m.t.Helper()
	m.cmd = exec.Command(m.command[0], m.command[1:]...)
	m.cmd.Stderr = os.Stderr
	m.cmd.ExtraFiles = m.files
	if err := m.cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	cmd, ended := m.cmd, make(chan struct{})
	m.ended = ended
	go func() { _ = cmd.Wait(); close(ended) }()
}

func (m *machine) kill() {
	if m.cmd == nil {
		return
	}
	_ = m.cmd.Process.Kill()
	<-m.ended
	m.cmd = nil
}

// hold takes one of the machine's monitors, once it is there.
func (m *machine) hold(socket string) *monitor.Session {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), eventLimit)
	defer cancel()
	s, err := testvm.Connect(ctx, m.ended, func(ctx context.Context) (*monitor.Session, error) {
		return monitor.Dial(ctx, filepath.Join(m.dir, socket))
	})
	if err != nil {
		m.t.Fatalf("QEMU: %v", err)
	}
	m.t.Cleanup(func() { _ = s.Close() })
	return s
}

// hostOf starts a daemon with flags that manages machines.
func hostOf(t *testing.T, flags []string, machines ...*machine) *host {
	t.Helper()
	h := prepareHost(t, flags...)
	for _, m := range machines {
		h.list(m.name, m.uuid)
	}
	h.start()
	t.Cleanup(h.end)
	return h
}

// shown returns the VMs of a name as the daemon lists them.
func (h *host) shown(name string) ([]*vmsnapv1.VM, error) {
	res, err := h.VMs().ListVMs(h.ctx(), connect.NewRequest(&vmsnapv1.ListVMsRequest{}))
	if err != nil {
		return nil, err
	}
	var found []*vmsnapv1.VM
	for _, vm := range res.Msg.GetVms() {
		if vm.GetName() == name {
			found = append(found, vm)
		}
	}
	return found, nil
}

// sees waits until the daemon lists one VM of a name that fits.
func (h *host) sees(limit time.Duration, name string, fits func(*vmsnapv1.VM) error) *vmsnapv1.VM {
	h.t.Helper()
	var vm *vmsnapv1.VM
	h.eventually(limit, "vm list shows "+name, func() error {
		found, err := h.shown(name)
		if err != nil {
			return err
		}
		if len(found) != 1 {
			return fmt.Errorf("%d VMs are called so", len(found))
		}
		vm = found[0]
		return fits(vm)
	})
	return vm
}

// inState fits VMs in a state.
func inState(state vmsnapv1.VMState) func(*vmsnapv1.VM) error {
	return func(vm *vmsnapv1.VM) error {
		if vm.GetState() != state {
			return fmt.Errorf("it is %s; problems %v", vm.GetState(), vm.GetProblems())
		}
		return nil
	}
}

// hasProblem fits VMs with a problem that comes with advice.
func hasProblem(code string) func(*vmsnapv1.VM) error {
	return func(vm *vmsnapv1.VM) error {
		for _, p := range vm.GetProblems() {
			if p.GetCode() != code {
				continue
			}
			if p.GetMessage() == "" || p.GetHint() == "" {
				return fmt.Errorf("%v lacks words", p)
			}
			return nil
		}
		return errors.New("problems: " + fmt.Sprint(vm.GetProblems()))
	}
}
