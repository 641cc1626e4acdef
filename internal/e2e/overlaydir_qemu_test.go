package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// fileSystem mounts an ext4 of its own, which hard links do not lead out of.
func fileSystem(t *testing.T) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "ext4")
	sh(t, "truncate", "-s", "256M", image)
	sh(t, "mkfs.ext4", "-q", image)
	dir, err := os.MkdirTemp("", "vs-")
	if err != nil {
		t.Fatal(err)
	}
	sh(t, "mount", "-o", "loop", image, dir)
	t.Cleanup(func() {
		if out, err := exec.Command("chattr", "-R", "-f", "-i", dir).CombinedOutput(); err != nil {
			t.Logf("chattr: %v\n%s", err, out) // what matters fails later
		}
		sh(t, "umount", dir)
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// overlays is a still VM whose overlays are made on another file system.
func overlays(t *testing.T, q testvm.QEMU, name string, files ...string) (vm *still, h *host, dir string) {
	t.Helper()
	dir = fileSystem(t)
	vm = newStill(t, q, name, files...)
	vm.further = []string{dir}
	h = prepareHost(t, "--overlay-dir", dir)
	h.list(vm.name, vm.uuid)
	h.start()
	t.Cleanup(h.end)
	return vm, h, dir
}

// leadsTo verifies that a launch path is a symbolic link into a directory.
func leadsTo(t *testing.T, launch, dir, when string) {
	t.Helper()
	to, err := os.Readlink(launch)
	if err != nil || filepath.Dir(to) != dir {
		t.Errorf("%s: %s leads to %q, %v", when, launch, to, err)
	}
}

// TestQEMUOverlaysOnAnotherFileSystem snapshots, writes, kills and starts again
// by the unchanged command line. The launch paths lead across.
func TestQEMUOverlaysOnAnotherFileSystem(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm, h, dir := overlays(t, q, "across-"+q.Name, "root.qcow2", "data.raw")
		covered := ledger{}
		for round := 1; round <= 4; round++ {
			when, name := fmt.Sprint("round ", round), fmt.Sprint("s", round)
			h.await(vm.name, "paused")
			vm.write(3 * round)
			if round%2 == 0 { // of the stopped VM
				vm.kill()
				h.await(vm.name, "stopped")
				h.settledRaw(vm, when)
			}
			h.must("snapshot", "create", vm.name, name, "--quiesce", "none")
			s := h.snapshot(vm.name + "/" + name)
			covered.cover(t, s)
			for _, d := range s.Disks {
				if round > 1 && filepath.Dir(d.Path) != dir {
					t.Errorf("%s: the layer %s is not in %s", when, d.Path, dir)
				}
			}
			if round%2 == 0 {
				h.settledRaw(vm, when)
				vm.start()
				h.await(vm.name, "paused")
			}
			vm.write(3*round + 1)
			if round == 3 { // another daemon goes on where this one was
				h.signal(syscall.SIGTERM)
				h.start()
			}
			vm.kill()
			if round%2 == 1 {
				h.settledRaw(vm, when)
			}
			leadsTo(t, vm.dir+"/root.qcow2", dir, when)
			vm.start()
			vm.holds(3*round+1, when)
		}
		h.await(vm.name, "paused")
		covered.verify(t, q)
		for round := 1; round <= 4; round++ {
			for _, d := range h.snapshot(fmt.Sprintf("%s/s%d", vm.name, round)).Disks {
				vm.imageHolds(d, 3*round, fmt.Sprint("snapshot ", round))
			}
		}
		vm.check("in the end")
		h.accounted(vm, "in the end")
		vm.kill()
		h.await(vm.name, "stopped")
		h.settledRaw(vm, "in the end")
		for _, path := range strings.Fields(h.must("vm", "forget", vm.name, "--release", "-o", "name")) {
			if _, immutable := fileOf(t, path); immutable {
				t.Errorf("%s was not released", path)
			}
		}
		vm.start()
		vm.holds(13, "forgotten")
		h.await(vm.name, "paused")
		h.must("snapshot", "create", vm.name, "again", "--quiesce", "none", "--disk", "root")
		vm.write(14)
		vm.kill()
		h.settledRaw(vm, "snapshotted again")
		vm.start()
		vm.holds(14, "snapshotted again")
	})
}

// TestQEMUAnEarlyStartAcrossFileSystems comes up with the newest content, or
// not at all.
func TestQEMUAnEarlyStartAcrossFileSystems(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		for _, file := range []string{"root.qcow2", "root.raw"} {
			vm, h, _ := overlays(t, q, "acrossearly-"+q.Name, file)
			h.await(vm.name, "paused")
			covered := ledger{}
			for value := 2; value < 8; value += 2 {
				when := fmt.Sprint(file, ", ", value)
				vm.write(value)
				h.must("snapshot", "create", vm.name, fmt.Sprint("s", value), "--quiesce", "none")
				covered.cover(t, h.snapshot(fmt.Sprintf("%s/s%d", vm.name, value)))
				vm.write(value + 1)
				h.signal(syscall.SIGSTOP)
				vm.kill()
				if came := vm.tooEarly(value+1, when); came != (file == "root.qcow2") {
					t.Errorf("%s: the VM has started: %v", when, came)
				}
				h.signal(syscall.SIGCONT)
				h.settledRaw(vm, when)
				if vm.cmd == nil {
					vm.start()
				}
				vm.holds(value+1, when)
				h.await(vm.name, "paused")
			}
			covered.verify(t, q)
		}
	})
}

// TestQEMUDaemonKilledAcrossFileSystems kills the daemon at the changes that a
// snapshot makes to files.
func TestQEMUDaemonKilledAcrossFileSystems(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm, h, _ := overlays(t, q, "acrosskill-"+q.Name, "root.qcow2")
		calls := append([]string{"symlinkat"}, effects...)
		h.killedAtEach(q, calls, nil, func(p killPoint, round int) bool { return h.killRound(vm, p, round) }, "symlinkat", "renameat", "fsync", "ioctl")
	})
}

// TestQEMUDaemonKilledInAConversionAcross does so in a conversion.
func TestQEMUDaemonKilledInAConversionAcross(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm, h, _ := overlays(t, q, "acrossconvert-"+q.Name, "root.raw")
		h.killedInConversions(vm, append([]string{"symlinkat"}, effects...), nil, "symlinkat", "renameat", "fsync", "unlinkat")
	})
}

// TestQEMURecoveryWaitsForAFileSystem that is not mounted when the daemon comes
// back.
func TestQEMURecoveryWaitsForAFileSystem(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm, h, dir := overlays(t, q, "unmounted-"+q.Name, "root.qcow2")
		h.await(vm.name, "paused")
		vm.write(1)
		before := h.world(vm.own, vm.dir)
		h.stopAtCall("fchown", func() { h.must("snapshot", "create", vm.name, "x", "--quiesce", "none", "--detach") })
		h.signal(syscall.SIGKILL)
		kept := listing(t, dir)
		if len(kept) != 1 {
			t.Errorf("there is no overlay to be taken back: %v", kept)
		}
		sh(t, "mount", "--bind", vm.dir, dir) // something else stands there
		h.start()
		id := h.operation(vm.name)
		h.eventually(eventLimit, "it waits", func() error {
			if out := h.must("operation", "show", id); !strings.Contains(out, "recovery-waits") || !strings.Contains(out, "another one than it was") {
				return errors.New(out)
			}
			return nil
		})
		h.fails(11, "busy", "snapshot", "create", vm.name, "y", "--quiesce", "none")
		sh(t, "umount", dir)
		h.eventually(eventLimit, "it is taken back", h.idle)
		h.unchanged(vm, "x", before, "mounted again")
		if left := listing(t, dir); len(left) != 0 {
			t.Errorf("%v is left", left)
		}
		h.must("snapshot", "create", vm.name, "y", "--quiesce", "none")
		vm.holds(1, "in the end")
	})
}

// TestQEMUWithoutHardLinks gives an image as many names as its file system
// allows.
func TestQEMUWithoutHardLinks(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		links := t.TempDir() // removed when the VM's cleanup has lifted the flags
		vm := newStill(t, q, "nolinks-"+q.Name, "root.qcow2")
		for i := 0; ; i++ {
			if err := os.Link(vm.dir+"/root.qcow2", fmt.Sprint(links, "/", i)); errors.Is(err, unix.EMLINK) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		before := listing(t, vm.dir)
		h.await(vm.name, "paused")
		vm.write(1)
		for i, call := range []string{"symlinkat", "renameat2", "fchown"} {
			h.stopAtCall(call, func() {
				h.must("snapshot", "create", vm.name, fmt.Sprint("x", i), "--quiesce", "none", "--detach")
			})
			h.signal(syscall.SIGKILL)
			h.start()
			h.eventually(eventLimit, "it is taken back", h.idle)
			if after := listing(t, vm.dir); fmt.Sprint(after) != fmt.Sprint(before) {
				t.Errorf("taken back at %s:\n%v\nand before:\n%v", call, after, before)
			}
		}
		covered := ledger{}
		for i := 1; i < 6; i += 2 {
			when := fmt.Sprint("snapshot ", i)
			h.await(vm.name, "paused")
			vm.write(i)
			h.must("snapshot", "create", vm.name, fmt.Sprint("s", i), "--quiesce", "none")
			covered.cover(t, h.snapshot(fmt.Sprintf("%s/s%d", vm.name, i)))
			vm.write(i + 1)
			vm.kill()
			vm.start()
			vm.holds(i+1, when)
		}
		h.await(vm.name, "paused")
		covered.verify(t, q)
		vm.check("in the end")
		h.noOrphans(vm, "in the end")
	})
}
