package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// TestQEMUCloneDisk makes linked and full clones of a disk, which write, as their
// origin does, without touching each other.
func TestQEMUCloneDisk(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "clonedisk-"+q.Name, "root.qcow2")
		h, gate := gatedHost(t, q, vm)
		vm.write(1)
		h.must("snapshot", "create", vm.name, "golden", "--quiesce", "none")
		vm.write(2)
		out := t.TempDir()
		golden := h.snapshot(vm.name + "/golden").Disks[0]
		h.must("snapshot", "clone", vm.name+"/golden", out+"/linked.qcow2", "--disk", "root")
		h.must("snapshot", "clone", vm.name+"/golden", out+"/full.qcow2", "--full")
		vm.isStandalone(out+"/full.qcow2", "qcow2", 1)
		before, err := os.ReadFile(golden.Path)
		if err != nil {
			t.Fatal(err)
		}
		for i, name := range []string{"linked", "full"} {
			clone := snapshotDisk{Path: out + "/" + name + ".qcow2", Format: "qcow2"}
			vm.imageHolds(clone, 1, name)
			for round := range 5 { // the clone and its origin write in turn
				value := 10 + 10*i + round
				line := fmt.Sprintf("write -P %d 0 64k", value)
				if text, err := exec.Command(q.Tool("qemu-io"), "-f", "qcow2", "-c", line, clone.Path).CombinedOutput(); err != nil {
					t.Fatalf("qemu-io: %v\n%s", err, text)
				}
				vm.write(100 + value)
				vm.imageHolds(clone, value, name)
				vm.imageHolds(golden, 1, "the origin of "+name)
			}
			checkImage(t, q, clone.Path)
		}
		if after, err := os.ReadFile(golden.Path); err != nil || string(after) != string(before) {
			t.Errorf("the restore point has changed, %v", err)
		}
		vm.check("in the end")

		show := h.must("snapshot", "show", vm.name+"/golden")
		if !strings.Contains(show, out+"/linked.qcow2") || strings.Contains(show, "full.qcow2") {
			t.Errorf("the linked clone is not shown, or the full one is:\n%s", show)
		}
		h.fails(12, "the clone", "disk", "forget", out+"/linked.qcow2")
		if err := os.Remove(out + "/linked.qcow2"); err != nil {
			t.Fatal(err)
		}
		h.eventually(eventLimit, "it is missing", func() error {
			if show := h.must("snapshot", "show", vm.name+"/golden"); !strings.Contains(show, "missing") {
				return fmt.Errorf("%s", show)
			}
			return nil
		})
		h.fails(13, "is missing", "snapshot", "clone", vm.name+"/golden", out+"/linked.qcow2")
		h.must("disk", "forget", out+"/linked.qcow2")
		h.must("snapshot", "template", vm.name+"/golden")
		if list := h.must("snapshot", "list", vm.name); !strings.Contains(list, "template") {
			t.Errorf("not shown as a template:\n%s", list)
		}
		h.cloneDies(vm, gate, out)
	})
}

// cloneDies kills the daemon in the middle of making clones.
func (h *host) cloneDies(vm *still, gate imgGate, out string) {
	h.t.Helper()
	left := len(everything(h.t, out))
	for command, flags := range map[string][]string{"create": nil, "convert": {"--full"}, "compare": {"--full"}} {
		gate.hold(command)
		c := h.meanwhile(append([]string{"snapshot", "clone", vm.name + "/golden", out + "/new.qcow2"}, flags...)...)
		gate.await(h, command)
		h.signal(syscall.SIGKILL)
		gate.release(command)
		h.start()
		h.eventually(eventLimit, "recovery ends", h.idle)
		c.end()
		if now := everything(h.t, out); c.code != 1 || len(now) != left {
			h.t.Errorf("killed at %s: exit code %d: %s; there are %v\nvmsnapd's log:\n%s", command, c.code, c.stderr, now, h.log)
		}
		if show := h.must("snapshot", "show", vm.name+"/golden"); strings.Contains(show, "new.qcow2") {
			h.t.Errorf("killed at %s: it is recorded:\n%s", command, show)
		}
	}
}
