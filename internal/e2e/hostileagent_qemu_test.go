package e2e

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/qga/qgatest"
)

// lies are what a hostile guest agent says to a snapshot that would like to
// freeze, and how long that may hold the snapshot up.
var lies = []struct {
	name   string
	limit  time.Duration
	script func(*qgatest.Server)
}{
	{"a state without end", time.Second, once(qgatest.Status, qgatest.Endless("x"))},
	{"1 GiB of commands", time.Second, once(qgatest.Info, qgatest.Flood(1<<30))},
	{"file systems in file systems", time.Second, once(qgatest.FSInfo, qgatest.Deep(1<<20))},
	{"file systems without end", time.Second, once(qgatest.FSInfo, qgatest.Then(qgatest.Raw(`{"return":[{}`), qgatest.Endless(",{}")))},
	{"forged synchronisations", 6 * time.Second, once(qgatest.Sync, qgatest.Endless("\xff{\"return\":7}\n"))},
	{"more frozen than there is", time.Second, once(qgatest.Freeze, qgatest.Return(1000))},
	{"less than nothing frozen", 2 * time.Second, once(qgatest.Freeze, qgatest.Return(-5))},
	{"a freeze of a byte at a time", 3 * time.Second, once(qgatest.Freeze, qgatest.Drip(time.Second/8))},
	{"a freeze that is never answered", 3 * time.Second, once(qgatest.Freeze, qgatest.Mute)},
	{"thawed, it says", time.Second, func(s *qgatest.Server) {
		s.Once(qgatest.Status, (*qgatest.Turn).Behave, qgatest.Return("thawed")) // the first time it is asked it is
	}},
	{"a thaw of 80 MiB", 4 * time.Second, once(qgatest.Thaw, qgatest.Flood(80<<20))},
}

func once(command string, b qgatest.Behaviour) func(*qgatest.Server) {
	return func(s *qgatest.Server) { s.Once(command, b) }
}

// TestQEMUAHostileGuestAgent takes snapshots of a guest whose agent lies. Each is
// taken, in time, and has lost nothing but its label; the guest is thawed, no
// guard is left, and the daemon has not grown. An honest answer is believed again.
func TestQEMUAHostileGuestAgent(t *testing.T) {
	testvm.OnOneQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "hostile", "root.qcow2")
		vm.kill()
		socket := vm.dir + "/qga"
		vm.args = append(vm.args, "-device", "virtio-serial-pci", "-chardev", "socket,id=qga,path="+socket+",server=on,wait=off",
			"-device", "virtserialport,chardev=qga,name=org.qemu.guest_agent.0")
		vm.start()
		guest := qgatest.New(t)
		if err := os.Remove(socket); err != nil {
			t.Fatal(err)
		}
		if err := os.Link(guest.Path(), socket); err != nil {
			t.Fatal(err)
		}
		h := prepareHost(t)
		h.program = unwatched + "/vmsnapd"
		h.list(vm.name, vm.uuid)
		h.start()
		t.Cleanup(h.end)
		if err := vm.own.Cont(h.ctx()); err != nil {
			t.Fatal(err)
		}
		h.await(vm.name, "running")
		honest := h.lied(guest, vm, "honest", "filesystem")
		before := h.peak(t)
		for i, lie := range lies {
			lie.script(guest)
			if took := h.lied(guest, vm, fmt.Sprint("s", i), "crash"); took > promptly(honest+lie.limit) {
				t.Errorf("%s: the snapshot took %s, and %s of an honest guest", lie.name, took, honest)
			}
		}
		if now := h.peak(t); now > before+32<<20 {
			t.Errorf("the daemon had %d MiB, and %d MiB before", now>>20, before>>20)
		}
		h.lied(guest, vm, "again", "filesystem")
		h.noOrphans(vm, "in the end")
	})
}

// lied takes a snapshot and expects it to have a consistency.
func (h *host) lied(guest *qgatest.Server, vm *still, name, consistency string) (took time.Duration) {
	h.t.Helper()
	began := time.Now()
	h.must("snapshot", "create", vm.name, name, "--quiesce", "prefer", "--freeze-timeout", "1s")
	took = time.Since(began)
	if s := h.snapshot(vm.name + "/" + name); s.Consistency != consistency || len(s.Disks) != 1 {
		h.t.Errorf("snapshot %+v, want %s", s, consistency)
	}
	h.eventually(eventLimit, name+": the guest is thawed, and nobody holds it", func() error {
		left := append(h.guards(), leases(h.t, h)...)
		if guest.Frozen() || len(left) > 0 {
			return fmt.Errorf("frozen: %t, left: %v", guest.Frozen(), left)
		}
		return nil
	})
	return took
}

// peak returns the most memory that the daemon had resident, in bytes, since it
// was last asked.
func (h *host) peak(t *testing.T) uint64 {
	t.Helper()
	_, rest, _ := strings.Cut(h.status(), "VmHWM:")
	kib, err := strconv.ParseUint(strings.TrimSpace(strings.SplitN(rest, "kB", 2)[0]), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", h.daemon.Process.Pid), []byte("5"), 0); err != nil {
		t.Fatal(err)
	}
	return kib << 10
}
