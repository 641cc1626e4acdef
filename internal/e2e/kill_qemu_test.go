package e2e

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// effects are the system calls by which a snapshot changes files: the layers'
// and the catalog's. The tracer kills the daemon as it enters one of them.
const effects = "fsync,fdatasync,linkat,renameat,renameat2,unlinkat,fchown,fchmod,mkdirat"

// killAt arranges that the daemon is killed when it makes its n-th change.
func (h *host) killAt(n int) *exec.Cmd {
	h.t.Helper()
	tracer := exec.Command("strace", "-f", "-q", "-o", "/dev/null", "-e", "trace="+effects,
		"-e", fmt.Sprintf("inject=%s:signal=SIGKILL:when=%d", effects, n), "-p", fmt.Sprint(h.daemon.Process.Pid))
	if err := tracer.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.eventually(10*time.Second, "the tracer is attached", func() error {
		status := h.status()
		if strings.Contains(status, "TracerPid:\t0\n") {
			return fmt.Errorf("not traced")
		}
		return nil
	})
	return tracer
}

// TestQEMUDaemonKilledAtEveryChange kills the daemon at each change that a
// snapshot makes to a file, lets the VM write on, kills QEMU too, and starts
// the VM by its unchanged command line before the daemon comes back.
func TestQEMUDaemonKilledAtEveryChange(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "still-"+q.Name, "root.qcow2", "data.qcow2")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		value, killed := 1, 0
		for n := 1; ; n++ {
			when := fmt.Sprintf("killed at change %d", n)
			h.await(vm.name, "paused")
			vm.write(value)
			name := fmt.Sprintf("s%d", n)
			tracer := h.killAt(n)
			h.run("snapshot", "create", vm.name, name, "--quiesce", "none")
			died := h.died(tracer)
			atCut := value
			value++
			vm.write(value) // the VM outlives the daemon, and writes on
			vm.kill()
			if n%2 == 0 && died { // the daemon is back before the VM
				h.start()
				vm.start()
			} else {
				vm.start()
				if died {
					h.start()
				}
			}
			vm.holds(value, when)
			h.await(vm.name, "paused")
			h.settled(vm, name, atCut, value, when)
			if t.Failed() {
				return
			}
			if !died {
				break
			}
			killed++
			value = value%200 + 1
		}
		if killed < 8 {
			t.Errorf("the daemon was killed at %d changes only: the tracer does not see them", killed)
		}
		t.Logf("killed at each of %d changes", killed)
	})
}

// died waits for the end of the snapshot under the tracer, and says whether
// the daemon was killed.
func (h *host) died(tracer *exec.Cmd) bool {
	h.t.Helper()
	select {
	case <-h.exited:
		_ = tracer.Wait()
		return true
	default:
	}
	_ = tracer.Process.Signal(syscall.SIGINT)
	_ = tracer.Wait()
	select {
	case <-h.exited:
		return true
	default:
		return false
	}
}

// settled verifies that no operation is left unfinished, that a snapshot which
// exists holds what was there at the cut, that the running VM holds what came
// after, and that nothing is left over.
func (h *host) settled(vm *still, name string, atCut, newest int, when string) {
	h.t.Helper()
	h.eventually(20*time.Second, when+": recovery ends", func() error {
		var list struct {
			Operations []map[string]any `json:"operations"`
		}
		if err := json.Unmarshal([]byte(h.must("operation", "list", "-o", "json")), &list); err != nil {
			return err
		}
		for _, o := range list.Operations {
			if s := o["state"]; s != "succeeded" && s != "failed" && s != "cancelled" {
				return fmt.Errorf("operation %v is %v", o["id"], s)
			}
		}
		return nil
	})
	vm.holds(newest, when+", after recovery")
	vm.check(when)
	if r := h.run("snapshot", "show", vm.name+"/"+name, "-o", "json"); r.code == 0 {
		for _, d := range h.snapshot(vm.name + "/" + name).Disks {
			vm.imageHolds(d, atCut, when)
		}
	} else if r.code != 4 {
		h.t.Errorf("%s: snapshot show: %d %s", when, r.code, r.stderr)
	}
	h.noOrphans(vm, when)
}

// noOrphans verifies that every image beside the VM's disks is a layer of a
// disk, or the launch path.
func (h *host) noOrphans(vm *still, when string) {
	h.t.Helper()
	var shown struct {
		Disks []struct {
			LaunchPath string `json:"launch_path"`
			Layers     []struct {
				Path string `json:"path"`
			} `json:"layers"`
		} `json:"disks"`
	}
	if err := json.Unmarshal([]byte(h.must("vm", "show", vm.name, "-o", "json")), &shown); err != nil {
		h.t.Fatal(err)
	}
	known := map[string]bool{}
	for _, d := range shown.Disks {
		known[d.LaunchPath] = true
		for _, l := range d.Layers {
			known[l.Path] = true
		}
	}
	for _, f := range files(h.t, vm.dir) {
		if !known[vm.dir+"/"+f] && f != ".vmsnap" {
			h.t.Errorf("%s: %s is left over", when, f)
		}
	}
}
