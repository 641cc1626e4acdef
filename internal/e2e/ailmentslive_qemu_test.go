package e2e

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

// ails returns the doctor's finding of a code.
func (h *host) ails(vm, code string, flags ...string) finding {
	h.t.Helper()
	h.eventually(eventLimit, "no operation runs on "+vm, h.idle)
	found := h.findings(vm, flags...)
	i := slices.IndexFunc(found, func(f finding) bool { return f.Code == code })
	if i < 0 {
		h.t.Fatalf("no %s: %+v", code, found)
	}
	return found[i]
}

// TestQEMUDoctorFindsGuestsThatStandStill has a guest whose disk fails when its
// firmware reads it, after QEMU has looked for partitions there, and then one that
// somebody pauses.
func TestQEMUDoctorFindsGuestsThatStandStill(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		m := newMachine(t, q, "still-"+q.Name, "-qmp", qmp("q1"), "-qmp", qmp("q2"),
			"-blockdev", `{"driver":"raw","node-name":"n","file":{"driver":"blkdebug","image":{"driver":"file","filename":"${DIR}/root.raw"},"inject-error":[{"event":"read_aio","once":true},{"event":"read_aio","once":true}]}}`,
			"-device", "virtio-blk-pci,drive=n,id=root,rerror=stop,bootindex=0")
		img(t, q, "create", "-q", "-f", "raw", m.dir+"/root.raw", "8M")
		m.start()
		h := hostOf(t, nil, m)
		own := m.hold("q2")
		state := func(want string) {
			t.Helper()
			h.eventually(20*time.Second, "the guest is "+want, func() error {
				st, err := own.QueryStatus(h.ctx())
				if err == nil && string(st.Status) != want {
					err = fmt.Errorf("it is %s", st.Status)
				}
				return err
			})
		}
		h.await(m.name, "paused")
		if err := own.Cont(h.ctx()); err != nil {
			t.Fatal(err)
		}
		state(string(monitor.RunStateIOError))
		if f := h.ails(m.name, "guest-stopped-by-io-error"); !f.Repairable {
			t.Errorf("%+v", f)
		}
		if f := h.ails(m.name, "guest-stopped-by-io-error", "--repair"); !f.Repaired {
			t.Errorf("%+v", f)
		}
		state("running")
		if err := own.Stop(h.ctx()); err != nil {
			t.Fatal(err)
		}
		if f := h.ails(m.name, "guest-paused", "--repair"); f.Repairable || f.Repaired {
			t.Errorf("a guest that its owner may have paused: %+v", f)
		}
		state("paused")
	})
}

// TestQEMUDoctorFindsForeignLayers has another client lay a layer on a disk, and
// then a disk that cannot be settled while somebody has its image open.
func TestQEMUDoctorFindsForeignLayers(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "layers-"+q.Name, "root.qcow2", "data.raw")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		h.await(vm.name, "paused")
		vm.write(1)
		h.must("snapshot", "create", vm.name, "one", "--quiesce", "none")
		vm.write(2)
		if f := h.findings(vm.name); len(f) != 1 || f[0].Code != "disk-not-settled" || f[0].Repairable {
			t.Errorf("a disk that is launched as raw: %+v", f)
		}
		var overlay string
		for _, path := range vm.images() {
			if one, err := filepath.Match(vm.dir+"/data.*.qcow2", path); err != nil {
				t.Fatal(err)
			} else if one {
				overlay = path
			}
		}
		// Whoever writes to the overlay once QEMU is gone keeps the daemon, which is
		// held up for that long, from converting it.
		h.signal(syscall.SIGSTOP)
		vm.kill()
		holder := exec.Command(q.Tool("qemu-io"), "-f", "qcow2", overlay)
		in, err := holder.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := holder.Start(); err != nil {
			t.Fatal(err)
		}
		h.eventually(10*time.Second, "a process has the overlay open", func() error {
			if used, err := blockdev.InUse(overlay); err != nil || !used {
				return fmt.Errorf("not yet: %w", err)
			}
			return nil
		})
		h.signal(syscall.SIGCONT)
		h.await(vm.name, "stopped")
		h.eventually(20*time.Second, "it could not be settled", func() error {
			if r := h.run("doctor", vm.name); r.code != 1 {
				return fmt.Errorf("%s%s", r.stdout, r.stderr)
			}
			return nil
		})
		if f := h.ails(vm.name, "disk-not-settled", "--repair"); !f.Repairable || f.Repaired {
			t.Errorf("while a process writes to its image: %+v", f)
		}
		if err := in.Close(); err != nil {
			t.Fatal(err)
		}
		_ = holder.Wait()
		if f := h.ails(vm.name, "disk-not-settled", "--repair"); !f.Repaired {
			t.Errorf("%+v", f)
		}
		vm.start()
		vm.holds(2, "after the repair")
		h.await(vm.name, "paused")
		if f := h.findings(vm.name); len(f) != 0 {
			t.Errorf("%+v", f)
		}
		args := map[string]string{"device": "drive-root", "snapshot-file": vm.dir + "/theirs.qcow2", "format": "qcow2"}
		if err := vm.own.Execute(h.ctx(), "blockdev-snapshot-sync", args, nil); err != nil {
			t.Fatal(err)
		}
		if f := h.ails(vm.name, "graph-differs", "--repair"); f.Repairable {
			t.Errorf("%+v", f)
		}
	})
}
