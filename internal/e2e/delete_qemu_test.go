package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// remove deletes snapshots, and verifies what is left.
func (k *tree) remove(when string, names ...string) {
	k.h.t.Helper()
	args := []string{"snapshot", "delete"}
	for _, name := range names {
		if !strings.HasPrefix(name, "--") {
			name = k.vm.name + "/" + name
			k.gone(name)
		}
		args = append(args, name)
	}
	k.h.must(args...)
	k.verify(when)
}

// TestQEMUDelete deletes snapshots at each position of a chain, while the VM runs,
// after it was started again, and when it is stopped. Everything else reads as
// before, and nothing is left over.
func TestQEMUDelete(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "delete-"+q.Name, "root.qcow2", "data.qcow2")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		h.await(vm.name, "paused")
		k := newTree(h, vm)
		k.grow("one", "two", "three", "four", "five", "six", "seven")
		k.writeAt("7M 64k") // less than what lies below holds

		plan := h.must("snapshot", "delete", vm.name+"/three", "--dry-run", "-o", "wide")
		for _, want := range []string{"root", "data", "QEMU", "would copy"} {
			if !strings.Contains(plan, want) {
				t.Errorf("the plan does not say %q:\n%s", want, plan)
			}
		}
		k.remove("a middle one, live", "three", "--request-id=again")
		h.must("snapshot", "delete", vm.name+"/three", "--request-id=again") // a repeated request
		k.remove("the first, live", "one")
		if plan := h.must("snapshot", "delete", vm.name+"/seven", "--dry-run"); !strings.Contains(plan, "commit") {
			t.Errorf("the active layer is not committed:\n%s", plan)
		}
		k.remove("the newest, live", "seven")
		h.launchesActive(vm, "live")
		k.write()
		vm.kill()
		h.await(vm.name, "stopped")
		k.remove("the first, stopped", "two")
		k.remove("the newest, stopped", "six")
		vm.start()
		h.await(vm.name, "paused")
		k.verify("started after deletions")
		k.write()
		k.remove("all that are left, after a start", "four", "five")
		h.launchesActive(vm, "after a start")
		if n := h.layers(vm.name); !slices.Equal(n, []int{1, 1}) {
			t.Errorf("the disks have %d layers without a snapshot", n)
		}
		k.grow("again")
		h.launchesActive(vm, "in the end")
		if f := h.findings(vm.name); len(f) != 0 {
			t.Errorf("the doctor finds %+v", f)
		}
	})
}

// TestQEMUDeleteDependants deletes snapshots from which branches begin, on which
// clones lie, and that are templates.
func TestQEMUDeleteDependants(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "dependants-"+q.Name, "root.qcow2")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		h.await(vm.name, "paused")
		k := newTree(h, vm)
		name := func(s string) string { return vm.name + "/" + s }
		k.grow("base", "point", "left")
		h.must("snapshot", "restore", name("point"), "--no-safety-snapshot")
		k.look()
		k.grow("right")
		k.write()

		for _, dry := range [][]string{nil, {"--dry-run"}} {
			r := h.fails(12, "lie on", append([]string{"snapshot", "delete", name("point")}, dry...)...)
			for _, want := range []string{name("left"), name("right")} {
				if !strings.Contains(r.stderr, want) {
					t.Errorf("%v: the refusal does not name %s: %s", dry, want, r.stderr)
				}
			}
		}
		k.verify("refused")
		k.remove("the branch point, flattened", "point", "--flatten")

		h.must("snapshot", "template", name("base"))
		h.fails(7, "template", "snapshot", "delete", name("base"))
		h.must("snapshot", "template", name("base"), "--off")

		clone := t.TempDir() + "/clone.qcow2"
		h.must("snapshot", "clone", name("left"), clone)
		k.want[clone] = k.want[name("left")+" root"]
		h.fails(12, clone, "snapshot", "delete", name("left"))
		k.verify("refused for a clone")

		// One that the catalog does not know, found by its header.
		stranger := vm.dir + "/stranger.qcow2"
		img(t, q, "create", "-q", "-f", "qcow2", "-b", h.snapshot(name("right")).Disks[0].Path, "-F", "qcow2", stranger)
		h.fails(12, stranger, "snapshot", "delete", name("right"))
		if err := os.Remove(stranger); err != nil {
			t.Fatal(err)
		}
		k.verify("refused for a stranger")

		h.must("snapshot", "delete", name("left"), "--keep-layers")
		k.gone(name("left"))
		k.want["now root"] = k.now()["now root"]
		if out, err := exec.Command(q.Tool("qemu-img"), "rebase", "-f", "qcow2", "-b", "", clone).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		k.verify("a layer is kept for a clone")
		k.remove("all, when nothing is in the way", "base", "right")
	})
}

// TestQEMUDeleteStops cancels and pauses deletions that copy slowly, live and when
// the VM is stopped. What is left can be restored, or says that it cannot.
func TestQEMUDeleteStops(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "deletestops-"+q.Name, "root.qcow2")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		h.await(vm.name, "paused")
		k := newTree(h, vm)
		name := func(s string) string { return vm.name + "/" + s }
		for i, where := range []string{"1M 2M", "3M 3M", "0 3M", "7M 1M"} {
			k.writeAt(where)
			k.take([]string{"one", "two", "three", "four"}[i])
		}
		for i, way := range []string{"commit", "stream"} {
			snapshot, stopped := []string{"two", "one"}[i], way == "stream"
			when := fmt.Sprintf("%s, stopped %v", way, stopped)
			if stopped {
				vm.kill()
				h.await(vm.name, "stopped")
			}
			if plan := h.must("snapshot", "delete", name(snapshot), "--dry-run"); !strings.Contains(plan, way) {
				t.Errorf("%s: the plan is\n%s", when, plan)
			}
			id := strings.TrimSpace(h.must("snapshot", "delete", name(snapshot), "--speed", "1KiB", "--detach", "-o", "name"))
			h.awaitStep(id, way+" root")
			if s := h.object("snapshot", "show", name(snapshot))["state"]; s != "deleting" {
				t.Errorf("%s: the snapshot is %v", when, s)
			}
			h.fails(11, "operation", "snapshot", "create", vm.name, "x", "--quiesce", "none")
			h.must("operation", "pause", id)
			if got := h.must("operation", "show", id); !strings.Contains(got, "running,paused") {
				t.Errorf("%s: a paused operation is shown as\n%s", when, got)
			}
			h.must("operation", "resume", id)
			if err := h.cancel(id); err != nil {
				t.Errorf("%s: %v", when, err)
			}
			h.eventually(eventLimit, when+": it ends", h.idle)
			if got := h.object("operation", "show", id)["state"]; got != "cancelled" {
				t.Errorf("%s: it is %v:\n%s", when, got, h.must("operation", "show", id))
			}
			state := h.object("snapshot", "show", name(snapshot))["state"]
			if want := map[string]string{"commit": "invalid", "stream": "valid"}[way]; state != want {
				t.Errorf("%s: the snapshot is %v after a cancel", when, state)
			}
			if state == "invalid" {
				h.fails(14, "invalid", "snapshot", "restore", name(snapshot), "--dry-run")
				h.fails(14, "invalid", "snapshot", "export", name(snapshot), t.TempDir()+"/x.qcow2")
				// Nobody promises anything of it but that the others are whole.
				k.want[name(snapshot)+" root"] = hash(h, q, h.snapshot(name(snapshot)).Disks[0])
			}
			k.verify(when + ", cancelled")
		}
		k.remove("deleted at last, stopped", "one")
		vm.start()
		h.await(vm.name, "paused")
		k.remove("deleted at last", "two")
	})
}

// TestQEMUDeleteMemory deletes a snapshot with memory: its file and its manifests
// go with it, and those of others stay.
func TestQEMUDeleteMemory(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "deletememory-"+q.Name, "root.qcow2")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		vm.run()
		h.await(vm.name, "running")
		k := newTree(h, vm)
		k.write()
		for _, name := range []string{"one", "two"} {
			h.must("snapshot", "create", vm.name, name, "--memory")
			k.taken(name)
		}
		gone, stays := h.memoryOf(vm.name+"/one"), h.memoryOf(vm.name+"/two")
		k.remove("with memory", "one")
		if _, err := os.Stat(gone); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the memory is there still: %v", err)
		}
		if _, err := os.Stat(stays); err != nil {
			t.Errorf("the memory of another snapshot: %v", err)
		}
		k.remove("the other", "two")
		if left := files(t, vm.dir+"/.vmsnap"); len(left) > 0 {
			t.Errorf("left over: %v", left)
		}
	})
}

// TestQEMULongChain takes snapshots until as many layers lie on each other as may,
// running and stopped.
func TestQEMULongChain(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "chain-"+q.Name, "root.qcow2")
		h := prepareHost(t, "--max-chain", "3")
		h.list(vm.name, vm.uuid)
		h.start()
		t.Cleanup(h.end)
		h.await(vm.name, "paused")
		k := newTree(h, vm)
		k.grow("one", "two")
		h.fails(14, "max-chain", "snapshot", "create", vm.name, "three", "--quiesce", "none")
		vm.kill()
		h.await(vm.name, "stopped")
		h.fails(14, "max-chain", "snapshot", "create", vm.name, "three", "--dry-run")
		k.verify("refused")
		k.remove("shortened", "one")
		k.take("three")
		k.verify("taken after a deletion")
	})
}
