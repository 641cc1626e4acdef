package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"connectrpc.com/connect"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// runningStill is a VM whose guest has nothing to boot from and runs, with a
// snapshot "one" with memory of the state 1, in the state 2.
func runningStill(t *testing.T, q testvm.QEMU, name string) (*still, *host) {
	t.Helper()
	vm := newStill(t, q, name+"-"+q.Name, "root.qcow2", "data.qcow2")
	h := newHostOf(t, map[string]string{vm.name: vm.uuid})
	t.Cleanup(func() { h.followLast(vm) })
	h.await(vm.name, "paused")
	vm.write(1)
	if err := vm.own.Cont(h.ctx()); err != nil {
		t.Fatal(err)
	}
	h.await(vm.name, "running")
	h.must("snapshot", "create", vm.name, "one", "--memory", "--quiesce", "none")
	vm.write(2)
	return vm, h
}

// wanted waits until the n-th launch of an operation is to be done by the VM's
// own launcher, and returns the command line.
func (h *host) wanted(id string, n int) (command []string) {
	h.t.Helper()
	h.eventually(eventLimit, "the operation says what is to be started", func() error {
		res, err := h.Operations().GetOperation(h.ctx(), connect.NewRequest(&vmsnapv1.GetOperationRequest{Id: id}))
		if err != nil {
			return err
		}
		var outputs []string
		for _, s := range res.Msg.GetOperation().GetSteps() {
			if s.GetOutput() != "" {
				outputs = append(outputs, s.GetOutput())
			}
		}
		if len(outputs) < n {
			return fmt.Errorf("%d launches of %v", len(outputs), res.Msg.GetOperation())
		}
		var spec struct {
			Launcher string   `json:"launcher"`
			Command  []string `json:"command"`
		}
		if err := json.Unmarshal([]byte(outputs[n-1]), &spec); err != nil {
			return err
		}
		if command = spec.Command; spec.Launcher != "external" || len(command) == 0 {
			return errors.New(outputs[n-1])
		}
		return nil
	})
	return command
}

// startedAs starts QEMU as a launcher would.
func (h *host) startedAs(command []string) {
	h.t.Helper()
	cmd := exec.Command(command[0], command[1:]...)
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	h.t.Cleanup(func() { _ = cmd.Process.Kill(); <-ended })
}

// TestQEMULauncherExternal restores memory into QEMUs that somebody else starts:
// into one that is another machine, so that the state before comes back, and into
// the right one.
func TestQEMULauncherExternal(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm, h := runningStill(t, q, "external")
		b := &bench{host: h, vm: vm}
		restore := func() string {
			return strings.TrimSpace(h.must("snapshot", "restore", vm.name+"/one", "--memory", "--launcher", "external", "--detach", "-o", "name"))
		}
		id := restore()
		wrong := h.wanted(id, 1)
		wrong = slices.Clone(wrong)
		wrong[slices.Index(wrong, "-m")+1] = "32"
		h.startedAs(wrong)
		h.startedAs(h.wanted(id, 2))
		h.eventually(eventLimit, "the state before is back", h.idle)
		h.fails(1, "could not load the memory", "operation", "watch", id)
		if !h.followStill(vm, "the state before") || b.oneOf("the state before", 1, 2) != 2 {
			t.Error("the guest of the state before does not run")
		}

		id = restore()
		h.startedAs(h.wanted(id, 1))
		h.eventually(eventLimit, "it is restored", h.idle)
		h.must("operation", "watch", id)
		if !h.followStill(vm, "restored") || b.oneOf("restored", 1, 2) != 1 {
			t.Error("the restored guest does not run")
		}
		h.launchesActive(vm, "restored")
	})
}

// TestQEMURestoreMemoryOfAStoppedVM loads memory for VMs that do not run, or whose
// state is given up.
func TestQEMURestoreMemoryOfAStoppedVM(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm, h := runningStill(t, q, "memstopped")
		b := &bench{host: h, vm: vm}
		vm.kill()
		h.await(vm.name, "stopped")
		back := h.restored(vm.name+"/one", "--memory")
		if !h.followStill(vm, "restored when stopped") || b.oneOf("restored when stopped", 1, 2) != 1 {
			t.Error("the restored guest does not run")
		}
		if s := h.snapshot(back); s.Consistency == "memory" {
			t.Errorf("the state of a stopped VM: %+v", s)
		}
		h.fails(14, "has no memory", "snapshot", "restore", back, "--memory")

		vm.write(3)
		if err := vm.own.Stop(h.ctx()); err != nil {
			t.Fatal(err)
		}
		h.await(vm.name, "paused")
		h.must("snapshot", "create", vm.name, "paused", "--memory")
		if err := vm.own.Cont(h.ctx()); err != nil {
			t.Fatal(err)
		}
		h.await(vm.name, "running")
		vm.write(4)
		files := len(memoryFiles(t, vm.dir))
		h.must("snapshot", "restore", vm.name+"/paused", "--memory", "--no-safety-snapshot")
		if h.followStill(vm, "paused") || b.oneOf("paused", 3, 4) != 3 {
			t.Error("a VM that was paused runs, or has other disks")
		}
		if n := len(memoryFiles(t, vm.dir)); n != files {
			t.Errorf("%d memory files, were %d", n, files)
		}
		h.launchesActive(vm, "in the end")
		h.noOrphans(vm, "in the end")
		vm.check("in the end")
	})
}

// TestQEMULauncherExternalDies kills the daemon while it waits for somebody else
// to start the QEMU of a restore: the one that comes back says what is to be
// started for the state before.
func TestQEMULauncherExternalDies(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm, h := runningStill(t, q, "extdies")
		b := &bench{host: h, vm: vm}
		for _, started := range []bool{false, true} {
			id := strings.TrimSpace(h.must("snapshot", "restore", vm.name+"/one", "--memory", "--launcher", "external", "--detach", "-o", "name"))
			command := h.wanted(id, 1)
			h.signal(syscall.SIGKILL)
			if started {
				h.startedAs(command)
			}
			h.start()
			h.startedAs(h.wanted(id, 1)) // its steps are new
			h.eventually(eventLimit, "the state before is back", h.idle)
			if !h.followStill(vm, "the state before") || b.oneOf("the state before", 1, 2) != 2 {
				t.Errorf("started %t: the guest of the state before does not run", started)
			}
			if n := len(processes(t, vm.uuid)); n != 1 {
				t.Errorf("started %t: %d QEMU processes", started, n)
			}
			h.launchesActive(vm, "taken back")
			h.noOrphans(vm, "taken back")
		}
	})
}
