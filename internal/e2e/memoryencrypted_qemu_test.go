package e2e

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/memdump"
)

// newKeyFile makes the file of a key, and returns its recipient.
func newKeyFile(t *testing.T, path string) (recipient string) {
	t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(id.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return id.Recipient().String()
}

// sealedHost is a daemon that encrypts the memory of a VM, which runs.
func sealedHost(t *testing.T, q testvm.QEMU, name string) (h *host, vm *still, key, recipient string) {
	t.Helper()
	vm = newStill(t, q, name, "root.qcow2", "data.qcow2")
	key = filepath.Join(t.TempDir(), "key")
	recipient = newKeyFile(t, key)
	h = prepareHost(t, "--memory-key", key)
	h.list(vm.name, vm.uuid)
	h.start()
	t.Cleanup(h.end)
	t.Cleanup(func() { h.followLast(vm) })
	vm.run()
	h.await(vm.name, "running")
	return h, vm, key, recipient
}

// allEncrypted fails unless there are so many memory files, and nothing is in plain
// in any of them.
func (h *host) allEncrypted(vm *still, want int, when string) {
	h.t.Helper()
	files := memoryFiles(h.t, vm.dir)
	if len(files) != want {
		h.t.Errorf("%s: %d memory files are wanted, and there are %v", when, want, files)
	}
	for _, f := range files {
		stored, err := os.ReadFile(f)
		if err != nil {
			h.t.Fatal(err)
		}
		// Each stream of QEMU's begins with these four bytes, and names its devices.
		if !bytes.HasPrefix(stored[memdump.HeaderSize:], []byte("age-encryption.org/v1\n")) || bytes.Contains(stored, []byte("QEVM")) ||
			bytes.Contains(stored, []byte("virtio-blk")) {
			h.t.Errorf("%s: %s is not encrypted", when, f)
		}
	}
}

// TestQEMUMemoryIsEncrypted saves memory with a key and restores it, that of the
// state before included. Without the key, or with another, nothing is done to the
// VM, and nothing is saved in plain.
func TestQEMUMemoryIsEncrypted(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		h, vm, key, recipient := sealedHost(t, q, "sealed-"+q.Name)
		vm.write(1)
		if plan := h.must("snapshot", "create", vm.name, "x", "--memory", "--dry-run"); !strings.Contains(plan, recipient) {
			t.Errorf("the plan does not say to whom:\n%s", plan)
		}
		h.must("snapshot", "create", vm.name, "one", "--memory", "--compress")
		h.allEncrypted(vm, 1, "saved")
		if s := h.must("snapshot", "show", vm.name+"/one"); !strings.Contains(s, recipient) {
			t.Errorf("it is not shown to whom:\n%s", s)
		}
		h.must("snapshot", "verify", vm.name+"/one")
		vm.write(2)
		back := h.restored(vm.name+"/one", "--memory")
		h.followStill(vm, "restored")
		vm.holds(1, "restored")
		h.goesOn(vm, "restored")
		h.allEncrypted(vm, 2, "restored")
		h.must("snapshot", "restore", back, "--memory", "--no-safety-snapshot")
		h.followStill(vm, "and back")
		vm.holds(2, "and back")
		h.goesOn(vm, "and back")
		h.withoutTheKey(vm, key, recipient)
		h.spoilt(vm)
	})
}

// withoutTheKey has the key be another one, none, and not configured.
func (h *host) withoutTheKey(vm *still, key, recipient string) {
	h.t.Helper()
	one, pid := vm.name+"/one", vm.cmd.Process.Pid
	refused := func(what, words string) {
		h.t.Helper()
		for _, args := range [][]string{{"restore", one, "--memory"}, {"restore", one, "--memory", "--dry-run"}, {"verify", one}} {
			r := h.fails(1, words, append([]string{"snapshot"}, args...)...)
			for _, part := range []string{recipient, "memory-key", h.memoryOf(one)} {
				if !strings.Contains(r.stderr, part) {
					h.t.Errorf("%s: %v does not name %s:\n%s", what, args, part, r.stderr)
				}
			}
		}
		if !strings.Contains(h.run("doctor", vm.name).stdout, "memory-locked") {
			h.t.Errorf("%s: the doctor does not see it", what)
		}
		if h.followStill(vm, what); vm.cmd.Process.Pid != pid {
			h.t.Errorf("%s: the VM has another QEMU", what)
		}
		h.goesOn(vm, what)
	}
	right, err := os.ReadFile(key)
	if err != nil {
		h.t.Fatal(err)
	}
	newKeyFile(h.t, key)
	refused("another key", "the key is that of")

	if err := os.Remove(key); err != nil {
		h.t.Fatal(err)
	}
	refused("no key", "no such file")
	files := len(memoryFiles(h.t, vm.dir))
	h.fails(1, "memory-key: "+key, "snapshot", "create", vm.name, "plain", "--memory")
	h.fails(1, "memory-key: "+key, "snapshot", "create", vm.name, "plain", "--memory", "--dry-run")
	if now := len(memoryFiles(h.t, vm.dir)); now != files {
		h.t.Errorf("without a key there are %d memory files, and were %d", now, files)
	}
	h.must("snapshot", "create", vm.name, "disks")
	if r := h.run("doctor", "--host"); r.code != 1 || !strings.Contains(r.stdout, "snapshots with memory are refused") {
		h.t.Errorf("the host's doctor: exit code %d\n%s", r.code, r.stdout)
	}
	h.end()
	h.start()
	h.await(vm.name, "running")
	if !strings.Contains(h.log.String(), "snapshots with memory are refused") {
		h.t.Error("the daemon says nothing when it starts")
	}

	h.end()
	h.flags = nil
	h.start()
	h.await(vm.name, "running")
	refused("not configured", "memory-key is not set")

	h.end()
	h.flags = []string{"--memory-key", key}
	if err := os.WriteFile(key, right, 0o600); err != nil {
		h.t.Fatal(err)
	}
	h.start()
	h.await(vm.name, "running")
	h.must("snapshot", "verify", one)
}

// spoilt has a bit of the file flipped, and its end cut off.
func (h *host) spoilt(vm *still) {
	h.t.Helper()
	one, pid := vm.name+"/one", vm.cmd.Process.Pid
	path := h.memoryOf(one)
	alter(h.t, path)
	h.fails(1, "altered", "snapshot", "verify", one)
	h.fails(1, "altered", "snapshot", "restore", one, "--memory")
	alter(h.t, path) // as it was
	h.must("snapshot", "verify", one)
	info, err := os.Stat(path)
	if err == nil {
		err = os.Truncate(path, info.Size()-1)
	}
	if err != nil {
		h.t.Fatal(err)
	}
	h.fails(1, "lost its end", "snapshot", "verify", one)
	h.fails(1, "lost its end", "snapshot", "restore", one, "--memory")
	if h.followStill(vm, "spoilt"); vm.cmd.Process.Pid != pid {
		h.t.Error("the VM has another QEMU")
	}
	h.goesOn(vm, "spoilt")
}

// TestQEMUDaemonKilledWhileItEncrypts kills the daemon at the changes that a
// snapshot with memory makes to files, with a key. Whatever is left, no memory is
// there in plain.
func TestQEMUDaemonKilledWhileItEncrypts(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		h, vm, _, _ := sealedHost(t, q, "sealkill-"+q.Name)
		m := &memoryKills{host: h, vm: vm, settings: vm.settings()}
		h.killedAtEach(q, []string{"renameat", "fdatasync", "unlinkat"}, nil, func(p killPoint, round int) bool {
			killed := m.round(p, round)
			h.allEncrypted(vm, m.whole, p.String())
			return killed
		}, "renameat", "fdatasync", "unlinkat")
		t.Logf("%d of the snapshots came about", m.whole)
	})
}
