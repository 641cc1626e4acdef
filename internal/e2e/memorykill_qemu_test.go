package e2e

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// resumed waits until a VM that stood still runs.
func (h *host) resumed(vm *still, since time.Time, when string) {
	h.t.Helper()
	h.eventually(eventLimit, when+": the VM runs", func() error {
		if s := vm.status(); !s.Running {
			return fmt.Errorf("it is %s", s.Status)
		}
		return nil
	})
	if after := time.Since(since); after > promptly(2*time.Second) {
		h.t.Errorf("%s: the VM ran again only after %s", when, after)
	}
	h.goesOn(vm, when)
}

// TestQEMUDaemonStopsInThePause has the daemon stopped, and killed, when the
// disks are cut and the memory is not saved yet: the guard lets the VM run.
func TestQEMUDaemonStopsInThePause(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "inpause-"+q.Name, "root.qcow2", "data.qcow2")
		vm.run()
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		settings := vm.settings()
		for i, strategy := range strategies(q) {
			for j, kills := range []bool{false, true} {
				when := fmt.Sprintf("%s, killed: %v", strategy, kills)
				h.await(vm.name, "running")
				vm.write(2*i + j + 1)
				// The launch paths are renamed between stop and cont, and nothing else is.
				resume := h.stopAtCall("renameat", func() {
					h.must("snapshot", "create", vm.name, "x", "--memory", "--memory-strategy", strategy, "--detach")
				})
				h.resumed(vm, time.Now(), when)
				if kills {
					h.signal(syscall.SIGKILL)
					h.start()
				} else {
					resume()
				}
				h.takenBack(vm, "x", 1, when)
				h.goesOn(vm, when+", in the end")
				vm.holds(2*i+j+1, when)
				if now := vm.settings(); now != settings {
					t.Errorf("%s: the owner's settings were\n%s\nand are\n%s", when, settings, now)
				}
			}
		}
		h.must("snapshot", "create", vm.name, "y", "--memory")
		h.must("snapshot", "verify", vm.name+"/y")
	})
}

// TestQEMUDaemonStopsInTheSave has the daemon stopped while QEMU writes: nothing
// waits for it, and when it continues the snapshot is whole.
func TestQEMUDaemonStopsInTheSave(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "insave-"+q.Name, "root.qcow2")
		vm.run()
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		h.await(vm.name, "running")
		vm.write(1)
		resume := h.stopAtCall("fdatasync", func() { // of the memory's file
			h.must("snapshot", "create", vm.name, "s", "--memory", "--detach")
		})
		h.goesOn(vm, "stopped")
		vm.write(2)
		resume()
		h.eventually(eventLimit, "the snapshot is taken", h.idle)
		h.must("snapshot", "verify", vm.name+"/s")
		h.whole(vm, "s", 1, 2, "continued")
	})
}

// TestQEMUDaemonKilledAtEveryChangeWithMemory kills the daemon at the changes
// that a snapshot with memory makes to files, and every other time QEMU with it.
// The VM runs on, or comes up with its newest state; the snapshot is whole, or
// has left nothing.
func TestQEMUDaemonKilledAtEveryChangeWithMemory(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "memkill-"+q.Name, "root.qcow2", "data.qcow2")
		vm.run()
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		m := &memoryKills{host: h, vm: vm, settings: vm.settings()}
		calls := append([]string{"fallocate", "fdatasync", "pwrite64"}, effects...)
		if !thorough() { // most of the writes are the catalog's
			calls = append(calls[:2:2], effects...)
		}
		h.killedAtEach(q, calls, nil, m.round, "fallocate", "fdatasync", "renameat", "fsync", "ioctl")
		t.Logf("%d of the snapshots came about", m.whole)
	})
}

// memoryKills are the rounds of a loop that kills the daemon in snapshots with
// memory.
type memoryKills struct {
	*host
	vm       *still
	settings string // of the VM's owner
	whole    int    // snapshots that came about
}

// round is one snapshot with memory under the tracer.
func (m *memoryKills) round(p killPoint, round int) bool {
	h, vm := m.host, m.vm
	h.t.Helper()
	when, name := p.String(), fmt.Sprint("s", round)
	atCut := round*2%250 + 1
	newest := atCut + 1
	h.await(vm.name, "running")
	layers := h.layers(vm.name)[0]
	vm.write(atCut)
	tracer := h.killAt(p)
	h.run("snapshot", "create", vm.name, name, "--memory", "--detach")
	killed := h.diedOr(tracer, h.idle)
	h.resumed(vm, time.Now(), when)
	vm.write(newest)
	if killed {
		if round%2 == 0 {
			vm.kill()
			vm.start()
			vm.run()
			m.settings = vm.settings()
		}
		h.start()
	}
	h.eventually(eventLimit, when+": recovery ends", h.idle)
	h.await(vm.name, "running")
	h.goesOn(vm, when+", after recovery")
	vm.holds(newest, when+", after recovery")
	if now := vm.settings(); now != m.settings {
		h.t.Errorf("%s: the owner's settings were\n%s\nand are\n%s", when, m.settings, now)
	}
	if r := h.run("snapshot", "show", vm.name+"/"+name); r.code == 0 {
		m.whole++
		h.must("snapshot", "verify", vm.name+"/"+name)
		for _, d := range h.snapshot(vm.name + "/" + name).Disks {
			// An operation that was killed before it ran is run by the next daemon: then
			// the second write comes before the cut.
			if vm.reads(d, newest) != nil {
				vm.imageHolds(d, atCut, when)
			}
		}
	} else if now := h.layers(vm.name)[0]; r.code != 4 || now > layers && !strings.Contains(h.log.String(), "layers-kept") {
		h.t.Errorf("%s: snapshot show: %d %s; %d layers, and %d before", when, r.code, r.stderr, now, layers)
	}
	if left := memoryFiles(h.t, vm.dir); len(left) != m.whole {
		h.t.Errorf("%s: %d snapshots, and the memory files %v", when, m.whole, left)
	}
	vm.check(when)
	h.noOrphans(vm, when)
	if h.t.Failed() {
		h.t.FailNow()
	}
	return killed
}

// TestQEMUKilledWhileItSaves kills QEMU while its memory is being saved, and
// when the disks are cut and that has not begun: no snapshot is left, the
// overlays are merged back, and the VM comes up with its newest state.
func TestQEMUKilledWhileItSaves(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "dies-"+q.Name, "root.qcow2", "data.qcow2")
		vm.run()
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		h.await(vm.name, "running")
		value := 0
		steps := map[string]string{"background": "memory", "precopy": "cut", "stopped": "cut"}
		for _, strategy := range strategies(q) {
			for _, begun := range []bool{true, false} {
				when := fmt.Sprintf("%s, begun: %v", strategy, begun)
				value += 2
				vm.write(value)
				create := func() string {
					return strings.TrimSpace(h.must("snapshot", "create", vm.name, "x", "--memory", "--memory-strategy", strategy, "--detach", "-o", "name"))
				}
				var resume func()
				if begun {
					resume = h.tamper(vm.cmd.Process.Pid, "writev", "delay_enter=500000") // microseconds
					h.awaitStep(create(), steps[strategy])
				} else {
					resume = h.stopAtCall("renameat", func() { create() })
					h.resumed(vm, time.Now(), when)
				}
				vm.write(value + 1) // on the overlays, unless they are cut only now
				vm.kill()
				resume()
				h.await(vm.name, "stopped")
				h.takenBack(vm, "x", 1, when)
				vm.start()
				vm.holds(value+1, when+", started again")
				vm.run()
				h.await(vm.name, "running")
			}
		}
		h.must("snapshot", "create", vm.name, "y", "--memory")
		h.must("snapshot", "verify", vm.name+"/y")
	})
}

// TestQEMUMergedBackElsewhere takes a cut with memory back whose overlay is not
// beside the disk: the disk is on another file system, or on a block device.
func TestQEMUMergedBackElsewhere(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm, h, dir := overlays(t, q, "memacross-"+q.Name, "root.qcow2")
		h.mergedBack(vm, "renameat")
		if to, err := os.Readlink(vm.dir + "/root.qcow2"); err == nil {
			t.Errorf("the launch path leads to %s, with nothing in %s", to, dir)
		}
		vm, h, launch, _ := onDevice(t, q, "memdevice-"+q.Name)
		h.mergedBack(vm, "ioctl")
		readOnly(t, launch, false, "merged back")
	})
}

// mergedBack has a save fail after the cut, and the daemon killed in the cut, at
// the call that covers the launch path.
func (h *host) mergedBack(vm *still, cover string) {
	h.t.Helper()
	vm.run()
	h.await(vm.name, "running")
	vm.write(1)
	end := h.failing(h.daemon.Process.Pid, "fdatasync", "EIO", 1)
	h.fails(1, "input/output error", "snapshot", "create", vm.name, "x", "--memory")
	end()
	when := vm.name + ", the save has failed"
	vm.holds(1, when)
	h.takenBack(vm, "x", 1, when)

	vm.write(2)
	h.stopAtCall(cover, func() { h.must("snapshot", "create", vm.name, "x", "--memory", "--detach") })
	when = vm.name + ", killed at " + cover
	h.resumed(vm, time.Now(), when)
	vm.write(3)
	h.signal(syscall.SIGKILL)
	h.start()
	h.takenBack(vm, "x", 1, when)
	vm.holds(3, when)
	h.goesOn(vm, when)
	vm.kill()
	vm.start()
	vm.holds(3, when+", started again")
}
