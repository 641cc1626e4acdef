package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// effects are the system calls by which a snapshot changes files: the layers'
// and the catalog's. The tracer counts them for each thread of the daemon.
var effects = []string{"linkat", "renameat", "fsync", "ioctl", "fchown", "fchmod", "unlinkat", "mkdirat"}

// killAt arranges that the daemon is killed as it enters a system call for the
// n-th time, on one of some files if they are given. The processes that the
// daemon starts are let go as they begin.
func (h *host) killAt(call string, n int, files ...string) *exec.Cmd {
	h.t.Helper()
	args := []string{"-f", "-b", "execve", "-q", "-o", "/dev/null", "-e", "trace=" + call,
		"-e", fmt.Sprintf("inject=%s:signal=SIGKILL:when=%d", call, n), "-p", fmt.Sprint(h.daemon.Process.Pid)}
	for _, f := range files {
		args = append(args, "-P", f)
	}
	tracer := exec.Command("strace", args...)
	if err := tracer.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.eventually(10*time.Second, "the tracer is attached", func() error {
		if strings.Contains(h.status(), "TracerPid:\t0\n") {
			return errors.New("not traced")
		}
		return nil
	})
	return tracer
}

// TestQEMUDaemonKilledAtEveryChange kills the daemon at the changes that a
// snapshot makes to files, lets the VM write on, kills QEMU too, and starts the
// VM by its unchanged command line, half the time before the daemon is back.
func TestQEMUDaemonKilledAtEveryChange(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "still-"+q.Name, "root.qcow2", "data.qcow2")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		round, killed := 0, map[string]int{}
		for _, call := range effects {
			for n := 1; ; n++ {
				round++
				if !h.killRound(vm, call, n, round) {
					break
				}
				killed[call]++
			}
		}
		t.Logf("killed at %v", killed)
		for _, call := range []string{"linkat", "renameat", "fsync", "ioctl"} {
			if killed[call] == 0 {
				t.Errorf("the daemon was never killed at %s: the tracer does not see it", call)
			}
		}
	})
}

// killRound is one snapshot under the tracer. It says whether the daemon was
// killed in it.
func (h *host) killRound(vm *still, call string, n, round int) bool {
	h.t.Helper()
	when := fmt.Sprintf("killed at %s %d", call, n)
	name := fmt.Sprintf("s%d", round)
	atCut := round*2%250 + 1
	newest := atCut + 1
	h.await(vm.name, "paused")
	vm.write(atCut)
	tracer := h.killAt(call, n)
	h.run("snapshot", "create", vm.name, name, "--quiesce", "none", "--detach")
	killed := h.died(tracer)
	vm.write(newest) // the VM outlives the daemon, and writes on
	vm.kill()
	if killed && round%2 == 0 {
		h.start()
	}
	vm.start()
	if killed && round%2 == 1 {
		h.start()
	}
	vm.holds(newest, when)
	h.await(vm.name, "paused")
	h.settled(vm, name, atCut, newest, when)
	if h.t.Failed() {
		h.t.FailNow()
	}
	return killed
}

// died waits until the daemon was killed or the VM's operation has ended, and
// says which. It takes the tracer off.
func (h *host) died(tracer *exec.Cmd) (killed bool) {
	h.t.Helper()
	defer func() {
		_ = tracer.Process.Signal(syscall.SIGINT)
		_ = tracer.Wait()
	}()
	h.eventually(30*time.Second, "the daemon is killed, or the snapshot taken", func() error {
		select {
		case <-h.exited:
			killed = true
			return nil
		default:
		}
		return h.idle()
	})
	return killed
}

// idle fails while an operation runs.
func (h *host) idle() error {
	h.t.Helper()
	var list struct {
		Operations []map[string]any `json:"operations"`
	}
	r := h.run("operation", "list", "-o", "json")
	if r.code != 0 {
		return errors.New(r.stderr)
	}
	if err := json.Unmarshal([]byte(r.stdout), &list); err != nil {
		return err
	}
	for _, o := range list.Operations {
		if s := o["state"]; s != "succeeded" && s != "failed" && s != "cancelled" {
			return fmt.Errorf("operation %v is %v", o["id"], s)
		}
	}
	return nil
}

// settled verifies that no operation is left unfinished, that a snapshot which
// exists holds what was there at the cut, that the running VM holds what came
// after, and that nothing is left over.
func (h *host) settled(vm *still, name string, atCut, newest int, when string) {
	h.t.Helper()
	h.eventually(20*time.Second, when+": recovery ends", h.idle)
	vm.holds(newest, when+", after recovery")
	vm.check(when)
	if r := h.run("snapshot", "show", vm.name+"/"+name, "-o", "json"); r.code == 0 {
		// A cut that may have been sent is adopted: when QEMU died before it
		// took the cut, the instant is that of its death. And the test's second
		// write may come before the cut.
		for _, d := range h.snapshot(vm.name + "/" + name).Disks {
			if vm.reads(d, newest) != nil {
				vm.imageHolds(d, atCut, when)
			}
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
	h.eventually(10*time.Second, when+": nothing is left over", func() error {
		var shown struct {
			Disks []struct {
				LaunchPath  string `json:"launch_path"`
				NotCuttable string `json:"not_cuttable"`
				Layers      []struct {
					Path string `json:"path"`
				} `json:"layers"`
			} `json:"disks"`
		}
		if err := json.Unmarshal([]byte(h.must("vm", "show", vm.name, "-o", "json")), &shown); err != nil {
			return err
		}
		known := map[string]bool{}
		for _, d := range shown.Disks {
			if d.NotCuttable != "" {
				return errors.New(d.NotCuttable)
			}
			known[d.LaunchPath] = true
			for _, l := range d.Layers {
				known[l.Path] = true
			}
		}
		for _, f := range vm.images() {
			if !known[f] {
				return fmt.Errorf("%s is left over", f)
			}
		}
		return nil
	})
}
