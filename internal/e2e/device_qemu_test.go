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

	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// blockDevice makes a file a block device.
func blockDevice(t *testing.T, size string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "device")
	sh(t, "truncate", "-s", size, file)
	out, err := exec.Command("losetup", "-f", "--show", file).Output()
	if err != nil {
		t.Fatalf("losetup: %v", err)
	}
	device := strings.TrimSpace(string(out))
	sh(t, "blockdev", "--setrw", device) // the flag outlives what the device was before
	t.Cleanup(func() { sh(t, "losetup", "-d", device) })
	return device
}

// onDevice is a still VM with a disk on a block device, to which a link in dir
// leads, as /dev/VG/LV does.
func onDevice(t *testing.T, q testvm.QEMU, name string) (vm *still, h *host, launch, dir string) {
	t.Helper()
	device := blockDevice(t, "8M")
	vm = newStill(t, q, name, "root.raw")
	vm.kill()
	dir = t.TempDir()
	launch = vm.dir + "/root.raw"
	if err := errors.Join(os.Remove(launch), os.Symlink(device, launch)); err != nil {
		t.Fatal(err)
	}
	vm.further = []string{dir}
	t.Cleanup(func() {
		vm.kill()
		if out, err := exec.Command("chattr", "-R", "-f", "-i", dir).CombinedOutput(); err != nil {
			t.Logf("chattr: %v\n%s", err, out) // what matters fails later
		}
	})
	vm.start()
	h = newHostOf(t, map[string]string{})
	h.listWith(vm, "overlay-dir: "+dir)
	h.signal(syscall.SIGTERM)
	h.start()
	return vm, h, launch, dir
}

// listWith names a VM in the daemon's configuration, with settings.
func (h *host) listWith(vm *still, settings string) {
	h.t.Helper()
	text := fmt.Sprintf("match:\n  uuid: %s\n%s\n", vm.uuid, settings)
	if err := os.WriteFile(h.path("vms.d/"+vm.name+".yaml"), []byte(text), 0o644); err != nil {
		h.t.Fatal(err)
	}
}

// readOnly verifies whether a block device is read-only.
func readOnly(t *testing.T, device string, want bool, when string) {
	t.Helper()
	if is, err := blockdev.ReadOnly(device); err != nil || is != want {
		t.Errorf("%s: the device is read-only: %v, %v", when, is, err)
	}
}

// TestQEMUADiskOnABlockDevice runs on overlays until it stops.
func TestQEMUADiskOnABlockDevice(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm, h, launch, dir := onDevice(t, q, "device-"+q.Name)
		value := 1
		at := map[string]int{}
		for round := 1; round <= 3; round++ {
			when := fmt.Sprint("round ", round)
			h.await(vm.name, "paused")
			for i := range round { // several snapshots before it stops
				value++
				vm.write(value)
				name := fmt.Sprintf("s%d-%d", round, i)
				h.must("snapshot", "create", vm.name, name, "--quiesce", "none")
				at[name] = value
				s := h.snapshot(vm.name + "/" + name)
				if len(s.Warnings) != 1 || s.Warnings[0].Code != "settles-when-stopped" {
					t.Errorf("%s: warnings %+v", when, s.Warnings)
				}
				for _, d := range s.Disks {
					vm.imageHolds(d, value, when+", "+name)
				}
			}
			readOnly(t, launch, true, when)
			value++
			vm.write(value)
			if round == 2 {
				h.signal(syscall.SIGTERM)
				sh(t, "blockdev", "--setrw", launch) // as after a restart of the host
				h.start()
				readOnly(t, launch, true, "another daemon")
				h.await(vm.name, "paused")
			}
			h.signal(syscall.SIGSTOP)
			vm.kill()
			if vm.tooEarly(value, when) {
				t.Errorf("%s: the VM started before its disk was settled", when)
			}
			h.signal(syscall.SIGCONT)
			h.settledRaw(vm, when)
			readOnly(t, launch, false, when)
			if round == 3 { // of the stopped VM
				h.must("snapshot", "create", vm.name, "stopped")
				at["stopped"] = value
				readOnly(t, launch, false, "snapshotted when stopped")
			}
			vm.start()
			vm.holds(value, when)
			readOnly(t, launch, false, when+", started")
		}
		h.await(vm.name, "paused")
		value++
		vm.write(value)
		for name, want := range at {
			for _, d := range h.snapshot(vm.name + "/" + name).Disks {
				vm.imageHolds(d, want, name)
				if _, immutable := fileOf(t, d.Path); !immutable || filepath.Dir(d.Path) != dir {
					t.Errorf("%s: the layer %s is immutable: %v", name, d.Path, immutable)
				}
			}
		}
		vm.check("in the end")
		h.accounted(vm, "in the end")
		if manifests, err := filepath.Glob(dir + "/.vmsnap/*.json"); err != nil || len(manifests) != len(at)+1 { // and one of the VM
			t.Errorf("%d manifests, %v", len(manifests), err)
		}
		vm.kill()
		h.await(vm.name, "stopped")
		for _, path := range strings.Fields(h.must("vm", "forget", vm.name, "--release", "-o", "name")) {
			if path == launch {
				continue
			}
			if _, immutable := fileOf(t, path); immutable {
				t.Errorf("%s was not released", path)
			}
		}
		vm.start()
		vm.holds(value, "forgotten")
	})
}

// TestQEMUABlockDeviceNeedsADirectory is told what to set.
func TestQEMUABlockDeviceNeedsADirectory(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm, h, launch, _ := onDevice(t, q, "deviceplain-"+q.Name)
		h.await(vm.name, "paused")
		h.listWith(vm, "")
		h.signal(syscall.SIGTERM)
		h.start()
		h.await(vm.name, "paused")
		before := h.world(vm.own, vm.dir)
		h.fails(14, "set overlay-dir", "snapshot", "create", vm.name, "x", "--quiesce", "none")
		h.unchanged(vm, "x", before, "no directory")
		vm.kill()
		h.await(vm.name, "stopped")
		before = h.world(nil, vm.dir)
		h.fails(14, "block device", "snapshot", "create", vm.name, "x")
		h.unchanged(vm, "x", before, "no directory, stopped")
		readOnly(t, launch, false, "refused")
	})
}

// TestQEMUADeviceThatIsAnother is not written to.
func TestQEMUADeviceThatIsAnother(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm, h, launch, _ := onDevice(t, q, "devother-"+q.Name)
		other := blockDevice(t, "8M")
		was, err := os.Readlink(launch)
		if err != nil {
			t.Fatal(err)
		}
		h.await(vm.name, "paused")
		vm.write(1)
		h.must("snapshot", "create", vm.name, "one", "--quiesce", "none")
		vm.write(2)
		h.signal(syscall.SIGTERM)
		vm.kill()
		hash := sha256sum(t, other)
		sh(t, "ln", "-sfn", other, launch)
		h.start()
		h.eventually(eventLimit, "it is refused", func() error {
			if out := h.must("operation", "list", "-o", "json"); !strings.Contains(out, "leads to the block device") && !strings.Contains(out, "not what it lay on") {
				return errors.New(out)
			}
			return h.idle()
		})
		if sha256sum(t, other) != hash {
			t.Error("the other device was written to")
		}
		readOnly(t, other, false, "another device")
		sh(t, "ln", "-sfn", was, launch)
		h.signal(syscall.SIGTERM)
		h.start()
		h.settledRaw(vm, "put back")
		vm.start()
		vm.holds(2, "put back")
	})
}

// TestQEMUAVMThatWasFasterThanTheDaemon runs on its device after a restart of
// the host, and nobody can say what is its newest state.
func TestQEMUAVMThatWasFasterThanTheDaemon(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm, h, launch, dir := onDevice(t, q, "devfast-"+q.Name)
		h.await(vm.name, "paused")
		vm.write(1)
		h.must("snapshot", "create", vm.name, "one", "--quiesce", "none")
		vm.write(2)
		overlay := h.disksOf(vm.name)["root"].Layers[0]
		h.signal(syscall.SIGKILL)
		vm.kill()
		sh(t, "blockdev", "--setrw", launch) // as after a restart of the host
		vm.start()
		vm.write(3)
		h.start()
		h.await(vm.name, "paused")
		readOnly(t, launch, false, "in use")
		h.fails(14, "not on its newest one", "snapshot", "create", vm.name, "x", "--quiesce", "none")
		vm.write(4)
		vm.kill()
		h.eventually(eventLimit, "it is not settled", func() error {
			if out := h.must("operation", "list", "-o", "json"); !strings.Contains(out, "others depend on") {
				return errors.New(out)
			}
			return h.idle()
		})
		vm.imageHolds(snapshotDisk{Path: launch, Format: "raw"}, 4, "the device")
		if filepath.Dir(overlay.Path) != dir || sha256sum(t, overlay.Path) == "" {
			t.Errorf("the overlay %+v", overlay)
		}
		vm.imageHolds(snapshotDisk{Path: overlay.Path, Format: "qcow2"}, 2, "the overlay")
	})
}

// TestQEMUMemoryOfAVMOnABlockDevice is saved beside the overlays.
func TestQEMUMemoryOfAVMOnABlockDevice(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm, h, launch, dir := onDevice(t, q, "devmem-"+q.Name)
		h.await(vm.name, "paused")
		vm.write(1)
		h.must("snapshot", "create", vm.name, "one", "--memory")
		if out := h.must("snapshot", "show", vm.name+"/one", "-o", "json"); !strings.Contains(out, dir+"/.vmsnap/") {
			t.Errorf("the memory is not in %s: %s", dir, out)
		}
		vm.kill() // QEMU writes to no disk any more, since the VM was paused when its memory was saved
		h.settledRaw(vm, "stopped")
		vm.start()
		vm.holds(1, "started")
		readOnly(t, launch, false, "started")
		vm.imageHolds(h.snapshot(vm.name + "/one").Disks[0], 1, "the snapshot")
	})
}

// TestQEMUDaemonKilledSettlingADevice kills the daemon at the changes that it
// makes to files, and starts the VM before it is back.
func TestQEMUDaemonKilledSettlingADevice(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm, h, _, _ := onDevice(t, q, "devicekill-"+q.Name)
		calls := []string{"fallocate", "renameat", "fsync", "ioctl", "unlinkat", "fchown"}
		if thorough() { // most are the catalog's
			calls = append(calls, "pwrite64")
		}
		h.killedInConversions(vm, calls, nil, "fsync", "ioctl", "unlinkat")
	})
}

// TestQEMUDaemonKilledWritingToADevice kills the daemon at each thing that it
// does to the device. An early start never finds what was half done.
func TestQEMUDaemonKilledWritingToADevice(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm, h, launch, _ := onDevice(t, q, "devicewrite-"+q.Name)
		device, err := os.Readlink(launch)
		if err != nil {
			t.Fatal(err)
		}
		h.killedInConversions(vm, []string{"pwrite64", "fsync", "ioctl"}, []string{device, launch}, "pwrite64", "fsync", "ioctl")
	})
}
