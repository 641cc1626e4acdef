package e2e

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

// TestQEMUGuestOutOfSpace lets the file system of a disk run full: it is told before
// the guest is stopped, whatever layer the disk grows in, and after a restart of
// the daemon. The guest that was stopped goes on once there is space if the settings
// say so, with all that it wrote; one that somebody paused does not.
func TestQEMUGuestOutOfSpace(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "outofspace-"+q.Name, "root.qcow2")
		vm.small("32m")
		h := prepareHost(t, "--low-space", "2")
		h.list(vm.name, vm.uuid)
		h.start()
		t.Cleanup(h.end)
		h.await(vm.name, "paused")
		f := &filling{host: h, vm: vm}
		f.announces("at first")
		vm.do("write -s " + writerGuest(t) + " 0 512")
		h.must("snapshot", "create", vm.name, "one", "--quiesce", "none")
		f.announces("after a cut")
		h.must("snapshot", "restore", vm.name+"/one", "--no-safety-snapshot")
		f.announces("after a restore")
		h.must("snapshot", "delete", vm.name+"/one")
		f.announces("after a pivot")

		free := fill(t, vm.dir, 5<<20)
		h.signal(syscall.SIGKILL)
		h.start()
		h.await(vm.name, "paused")
		f.announces("by another daemon")
		if at, size := f.threshold(), fileSize(t, vm.dir+"/root.qcow2"); at > size+3<<20 {
			t.Errorf("QEMU would tell at %d that a file of %d bytes grows that has 5 MiB left", at, size)
		}
		vm.do("write -P 1 1M 3584k")
		low := f.told("disk-space-low", 0)
		f.shows("space-low", `vmsnap_disk_space_low{disk="root",vm="`+vm.name+`"} 1`)
		f.status(monitor.RunStatePrelaunch)

		f.cont()
		full := f.told("guest-out-of-space", low)
		f.status(monitor.RunStateIOError)
		f.shows("out-of-space", `vmsnap_guest_out_of_space{vm="`+vm.name+`"} 1`)
		free()
		back := f.looksTwice(full)
		f.status(monitor.RunStateIOError)

		h.signal(syscall.SIGKILL)
		h.flags = append(h.flags, "--resume-guests")
		h.start()
		f.told("guest-resumed", back)
		h.eventually(eventLimit, "the guest has written everything", func() error {
			return vm.readsAt("-P 0x5a 1M 7M")
		})
		free = fill(t, vm.dir, 0)
		if err := vm.own.Stop(h.ctx()); err != nil {
			t.Fatal(err)
		}
		h.signal(syscall.SIGKILL) // so that it is looked at once
		h.start()
		low = f.told("disk-space-low", back)
		free()
		f.told("disk-space-back", low)
		<-time.After(time.Second) // far longer than the rest of that look; that it does nothing is no event
		f.status(monitor.RunStatePaused)
		vm.check("at the end")
	})
}

// looksTwice returns when the daemon has seen that there is space again, and has
// looked once more after it has done what it then does. It returns the last event.
func (f *filling) looksTwice(after uint64) uint64 {
	f.t.Helper()
	back := f.told("disk-space-back", after)
	free := fill(f.t, f.vm.dir, 0)
	low := f.told("disk-space-low", back)
	free()
	return f.told("disk-space-back", low)
}

// filling is a VM whose disk runs out of space.
type filling struct {
	*host
	vm *still
}

// root returns the node of the file that the disk grows in.
func (f *filling) root() *blockdev.Node {
	f.t.Helper()
	g, err := blockdev.ReadGraph(f.ctx(), f.vm.own)
	if err != nil {
		f.t.Fatal(err)
	}
	chain, err := g.Chain(g.Drives()[0])
	if err != nil {
		f.t.Fatal(err)
	}
	return chain[0].File
}

func (f *filling) threshold() uint64 { f.t.Helper(); return f.root().WriteThreshold }

// announces waits until QEMU watches how far the disk's active layer grows.
func (f *filling) announces(when string) {
	f.t.Helper()
	f.eventually(promptly(0), when+" QEMU watches the active layer", func() error {
		if n := f.root(); n.WriteThreshold == 0 {
			return fmt.Errorf("it does not watch %s", n.Filename)
		}
		return nil
	})
}

// told waits until an event of a kind is on record behind another, and returns its
// number.
func (f *filling) told(kind string, after uint64) (seq uint64) {
	f.t.Helper()
	f.eventually(promptly(0), "the event "+kind, func() error {
		res, err := f.Events().ListEvents(f.ctx(), connect.NewRequest(&vmsnapv1.ListEventsRequest{
			Filter: &vmsnapv1.EventFilter{Vm: f.vm.name, Kinds: []string{kind}}, Since: &after,
		}))
		if err == nil && len(res.Msg.GetEvents()) == 0 {
			err = errors.New("it is not on record")
		}
		if err == nil {
			seq = res.Msg.GetEvents()[0].GetSeq()
		}
		return err
	})
	return seq
}

// shows fails unless the VM has a problem, and the metrics a line.
func (f *filling) shows(problem, line string) {
	f.t.Helper()
	if text := f.must("vm", "show", f.vm.name); !strings.Contains(text, problem) {
		f.t.Errorf("no %s:\n%s", problem, text)
	}
	if text := f.scrape(); !strings.Contains(text, line) {
		f.t.Errorf("no %s", line)
	}
}

// status fails unless the guest stands still as it should.
func (f *filling) status(want monitor.RunState) {
	f.t.Helper()
	if st, err := f.vm.own.QueryStatus(f.ctx()); err != nil || st.Status != want {
		f.t.Errorf("the guest is %q, %v; want %q", st.Status, err, want)
	}
}

func (f *filling) cont() {
	f.t.Helper()
	if err := f.vm.own.Cont(f.ctx()); err != nil {
		f.t.Fatal(err)
	}
}

// do has qemu-io do something to the first disk, in QEMU.
func (s *still) do(command string) {
	s.t.Helper()
	line := fmt.Sprintf(`qemu-io -d /machine/peripheral/%s/virtio-backend "%s"`, s.disks[0], command)
	if err := s.own.Execute(s.t.Context(), "human-monitor-command", map[string]any{"command-line": line}, nil); err != nil {
		s.t.Fatal(err)
	}
}

// readsAt fails unless qemu-io reads what it should from the launch path of the
// first disk, beside QEMU.
func (s *still) readsAt(what string) error {
	out, err := exec.Command(s.q.Tool("qemu-io"), "-U", "-r", "-f", "qcow2", "-c", "read "+what, s.dir+"/"+s.disks[0]+".qcow2").CombinedOutput()
	if err != nil || strings.Contains(string(out), "failed") {
		return fmt.Errorf("read %s: %v\n%s", what, err, out)
	}
	return nil
}

func fileSize(t *testing.T, path string) uint64 {
	t.Helper()
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return uint64(fi.Size())
}

// writerGuest makes the boot sector of a guest that writes 0x5a to its disk from
// 1 MiB to 8 MiB, 32 KiB at a time, and then does nothing.
//
//	      ljmp  $0x7c0, $1f
//	1:    cli;  mov %cs, %ax;  mov %ax, %ds;  xor %ax, %ax;  mov %ax, %ss
//	      mov   $0x7c00, %sp;  mov $0x2000, %ax;  mov %ax, %es;  sti;  cld
//	      mov   $0x5a5a, %ax;  xor %di, %di;  mov $0x4000, %cx;  rep stosw
//	next: mov   $dap, %si
//	      mov   $0x4300, %ax    # extended write to the drive in %dl
//	      int   $0x13
//	      jc    next
//	      addw  $64, dap+8
//	      cmpw  $16384, dap+8
//	      jb    next
//	done: hlt;  jmp done
//	dap:  .byte 16, 0;  .word 64, 0, 0x2000;  .long 2048, 0
func writerGuest(t *testing.T) string {
	t.Helper()
	code, err := hex.DecodeString("ea0500c007fa8cc88ed831c08ed0bc007cb800208ec0fbfcb85a5a31ffb90040f3ab" +
		"be3c00b80043cd1372f683064400" + "40813e4400004072e9f4ebfd" + "10004000000000200008000000000000")
	if err != nil {
		t.Fatal(err)
	}
	sector := make([]byte, 512)
	copy(sector, code)
	sector[510], sector[511] = 0x55, 0xaa
	path := t.TempDir() + "/boot"
	if err := os.WriteFile(path, sector, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
