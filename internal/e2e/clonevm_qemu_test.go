package e2e

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

const originMAC, originGeneration = "52:54:00:ab:cd:ef", "11111111-2222-3333-4444-555555555555"

// clonedHost is a VM that can be cloned, with a snapshot "golden" of the state 1,
// in the state 2, and a daemon that takes note of clones by these names.
func clonedHost(t *testing.T, q testvm.QEMU, name string, clones ...string) (*still, *host) {
	t.Helper()
	vm := newStill(t, q, name+"-"+q.Name, "root.qcow2", "data.raw")
	vm.kill()
	vm.args = append(vm.args, "-device", "virtio-net-pci,mac="+originMAC, "-device", "vmgenid,guid="+originGeneration)
	vm.start()
	h := prepareHost(t)
	h.list(vm.name, vm.uuid)
	for _, c := range clones {
		text := fmt.Sprintf("match:\n  name: %s\n", c)
		if err := os.WriteFile(h.path("vms.d/"+c+".yaml"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	h.start()
	t.Cleanup(h.end)
	h.await(vm.name, "paused")
	vm.write(1)
	h.must("snapshot", "create", vm.name, "golden", "--quiesce", "none")
	vm.write(2)
	return vm, h
}

// definition is what defines a clone.
type definition struct {
	UUID       string   `json:"uuid"`
	Command    []string `json:"command"`
	MACs       []string `json:"mac_addresses"`
	Generation string   `json:"generation_id"`
	Disks      []string `json:"disks"`
}

func readDefinition(t *testing.T, path string) (d definition) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(text, &d)
	}
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// hashes are those of the restore points of a snapshot.
func (h *host) hashes(snapshot string) string {
	h.t.Helper()
	var all []string
	for _, d := range h.snapshot(snapshot).Disks {
		content, err := os.ReadFile(d.Path)
		if err != nil {
			h.t.Fatal(err)
		}
		all = append(all, fmt.Sprintf("%x", sha256.Sum256(content)))
	}
	return strings.Join(all, " ")
}

// TestQEMUCloneVM starts a clone beside its origin, and both write.
func TestQEMUCloneVM(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		a, b := "vmclone-a-"+q.Name, "vmclone-b-"+q.Name
		vm, h := clonedHost(t, q, "vmclone", a, b)
		golden, full := vm.name+"/golden", t.TempDir()
		before := h.hashes(golden)
		h.cloneRefused(vm, a)
		c, def := h.startsClone(vm, a)
		if def.UUID == vm.uuid || len(def.MACs) != 1 || def.MACs[0] == originMAC || def.Generation == originGeneration {
			t.Errorf("not another VM: %+v", def)
		}
		now, err := h.vm(a)
		if err != nil || now.GetUuid() != def.UUID {
			t.Fatalf("%v, %v", now, err)
		}
		if text := h.must("vm", "show", a); strings.Count(text, "a layer of VM "+vm.name) < 2 {
			t.Errorf("it is not shown that its disks are clones:\n%s", text)
		}
		if mac := strings.Join(def.Command, " "); strings.Contains(mac, originMAC) || !strings.Contains(mac, def.MACs[0]) {
			t.Errorf("the command does not have the address: %s", mac)
		}
		c.holds(1, "the clone")
		for round := range 10 {
			c.write(20 + round)
			vm.write(40 + round)
			c.holds(20+round, "the clone")
		}
		vm.check("with a clone")
		if after := h.hashes(golden); after != before {
			t.Error("the restore points have changed")
		}
		if show := h.must("snapshot", "show", golden); strings.Count(show, a) < 2 {
			t.Errorf("the clone is not shown:\n%s", show)
		}
		h.fails(12, a, "snapshot", "delete", golden)
		h.must("snapshot", "create", a, "of-the-clone", "--quiesce", "none") // it is a VM like others
		c.write(99)
		vm.holds(49, "the origin")

		h.must("snapshot", "clone", golden, b, "--full", "--dir", full)
		h.cloneEnds(c.own, vm, a, def)
		h.must("snapshot", "delete", golden)
		def = readDefinition(t, full+"/"+b+".vm.json")
		h.startedAs(def.Command)
		h.await(b, "paused")
		for _, disk := range def.Disks {
			vm.imageHolds(snapshotDisk{Path: disk, Format: "qcow2"}, 1, "the full clone")
			checkImage(t, q, disk)
		}
		vm.check("in the end")
	})
}

// cloneRefused makes clones that cannot be, of which nothing is left.
func (h *host) cloneRefused(vm *still, name string) {
	h.t.Helper()
	golden, left := vm.name+"/golden", everything(h.t, vm.dir)
	h.fails(13, "already", "snapshot", "clone", golden, vm.name)
	h.fails(4, "no disk", "snapshot", "clone", golden, name, "--disk", "other")
	h.fails(1, "was not started", "snapshot", "clone", golden, name, "--start", "--launcher", "exec", "--replace", vm.dir+"/q1=/no/such/directory/q1")
	for _, file := range []string{"-data.qcow2", ".vm.json", "-q1"} {
		path := vm.dir + "/" + name + file
		if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
			h.t.Fatal(err)
		}
		h.fails(13, name+file, "snapshot", "clone", golden, name)
		if text, err := os.ReadFile(path); err != nil || string(text) != "mine" {
			h.t.Errorf("%s is %q, %v", path, text, err)
		}
		if err := os.Remove(path); err != nil {
			h.t.Fatal(err)
		}
	}
	if now := everything(h.t, vm.dir); !slices.Equal(now, left) {
		h.t.Errorf("left over: %q, and there was %q", now, left)
	}
	if show := h.must("snapshot", "show", golden); strings.Contains(show, name) {
		h.t.Errorf("a clone is recorded that was not made:\n%s", show)
	}
}

// cloneEnds ends a clone that runs, and removes it.
func (h *host) cloneEnds(own *monitor.Session, vm *still, name string, def definition) {
	h.t.Helper()
	_ = own.Execute(h.ctx(), "quit", nil, nil) // it may end before it answers
	_ = own.Close()
	h.await(name, "stopped")
	h.must("vm", "forget", name, "--release")
	for _, file := range everything(h.t, vm.dir) {
		if strings.HasPrefix(file, name) {
			if err := os.Remove(vm.dir + "/" + file); err != nil {
				h.t.Fatal(err)
			}
		}
	}
	for _, disk := range def.Disks {
		h.must("disk", "forget", disk)
	}
}

// TestQEMUCloneVMDies kills the daemon at each change of a file while it makes a
// clone: all of it is there then, or nothing.
func TestQEMUCloneVMDies(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm, h := clonedHost(t, q, "vmclonedies")
		left := everything(t, vm.dir)
		golden := vm.name + "/golden"
		round := func(p killPoint, round int) bool {
			name := fmt.Sprintf("clone%d", round)
			tracer := h.killAt(p)
			h.run("snapshot", "clone", golden, name, "--detach")
			killed := h.diedOr(tracer, h.idle)
			if killed {
				h.start()
				h.eventually(eventLimit, "recovery ends", h.idle)
			}
			made := slices.DeleteFunc(everything(t, vm.dir), func(f string) bool { return slices.Contains(left, f) })
			whole := []string{name + "-data.qcow2", name + "-root.qcow2", name + ".vm.json"}
			show := h.must("snapshot", "show", golden)
			switch {
			case len(made) == 0 && !strings.Contains(show, name+"-"):
			case slices.Equal(made, whole) && strings.Count(show, name+"-") == 2:
				for _, f := range made[:2] {
					vm.imageHolds(snapshotDisk{Path: vm.dir + "/" + f, Format: "qcow2"}, 1, p.String())
				}
			default:
				t.Fatalf("%s: there are %q\n%s\nvmsnapd's log:\n%s", p, made, show, h.log)
			}
			for _, f := range made {
				if err := os.Remove(vm.dir + "/" + f); err != nil {
					t.Fatal(err)
				}
				if strings.HasSuffix(f, ".qcow2") {
					h.must("disk", "forget", vm.dir+"/"+f)
				}
			}
			return killed
		}
		h.killedAtEach(q, []string{"renameat2", "fsync", "fchown"}, nil, round, "renameat2", "fsync")
		h.signal(syscall.SIGTERM)
	})
}
