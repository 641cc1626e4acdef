package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

// follow takes over a QEMU that the daemon, or a launcher, has started for the VM.
func (s *still) follow(pid int) {
	s.t.Helper()
	p, err := os.FindProcess(pid)
	if err != nil {
		s.t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1); err != unix.EINTR {
				break
			}
		}
		_ = unix.Close(fd)
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	own, err := monitor.Dial(ctx, s.dir+"/q2")
	if err != nil {
		s.t.Fatal(err)
	}
	if s.own != nil {
		_ = s.own.Close()
	}
	s.cmd, s.ended, s.own = &exec.Cmd{Process: p}, ended, own
}

// followStill follows whatever QEMU the VM has now, and says whether its guest
// runs.
func (h *host) followStill(vm *still, when string) (runs bool) {
	h.t.Helper()
	var pid int
	h.eventually(eventLimit, when+": a QEMU of the VM is there", func() error {
		shown, err := h.vm(vm.name)
		if err != nil {
			return err
		}
		pid = int(shown.GetProcess().GetPid())
		if pid == 0 || shown.GetRunState() == "" {
			return fmt.Errorf("process %d is %q", pid, shown.GetRunState())
		}
		return nil
	})
	if vm.cmd == nil || vm.cmd.Process.Pid != pid {
		vm.follow(pid)
	}
	st, err := vm.own.QueryStatus(h.ctx())
	if err != nil {
		h.t.Fatal(err)
	}
	return st.Status == monitor.RunStateRunning
}

// TestQEMURestoreMemoryDies kills the daemon at the changes that a restore with
// memory makes to files. A daemon that comes back brings the guest to the state
// before or to the restored one, where it runs, in the only QEMU process of the
// VM, and leaves nothing behind.
func TestQEMURestoreMemoryDies(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "memdies-"+q.Name, "root.qcow2", "data.qcow2")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		t.Cleanup(func() { h.followLast(vm) })
		h.await(vm.name, "paused")
		vm.write(1)
		if err := vm.own.Cont(h.ctx()); err != nil {
			t.Fatal(err)
		}
		h.await(vm.name, "running")
		h.must("snapshot", "create", vm.name, "one", "--memory", "--quiesce", "none")
		states, round := map[int]int{}, 1
		kill := func(p killPoint) bool {
			round++
			killed, state := h.memoryDies(vm, p, round%250+2)
			if killed {
				states[state]++
			}
			if t.Failed() {
				t.FailNow()
			}
			return killed
		}
		kill(killPoint{calls: []string{"fsync", "unlinkat"}}) // counts them
		counts := h.called()
		first, _ := share(t, q)
		for _, call := range []string{"fsync", "unlinkat"} {
			stride := 1
			if !thorough() {
				stride = max(counts[call]/2, 1)
			}
			for n := first; n <= counts[call]; n += stride {
				kill(killPoint{calls: []string{call}, n: n})
			}
		}
		for i, step := range []string{"save", "end", "point", "launch", "load", "resume", "settle", "commit"} {
			for j, how := range []string{"the daemon dies", "QEMU dies", "both die"} {
				if !thorough() && (i+j)%2 == first%2 {
					continue // it is the other version's
				}
				round++
				states[h.memoryDiesIn(vm, step, how, round%250+2)]++
				if t.Failed() {
					t.FailNow()
				}
			}
		}
		t.Logf("of %v: %d times to the restored state, to the others %v", counts, states[1], states)
		if len(states) < 2 || states[1] == 0 {
			t.Error("not both states came about")
		}
	})
}

// followLast finds the VM's last QEMU, so that it is ended with the test.
func (h *host) followLast(vm *still) {
	shown, err := h.vm(vm.name)
	if pid := int(shown.GetProcess().GetPid()); err == nil && pid != 0 && (vm.cmd == nil || vm.cmd.Process.Pid != pid) {
		vm.follow(pid)
	}
}

// memoryDies is one restore, which the daemon may not live through.
func (h *host) memoryDies(vm *still, p killPoint, old int) (killed bool, state int) {
	h.t.Helper()
	when := fmt.Sprintf("state %d, %s", old, p)
	vm.write(old)
	tracer := h.killAt(p)
	h.run("snapshot", "restore", vm.name+"/one", "--memory", "--detach")
	if killed = h.diedOr(tracer, h.idle); killed {
		h.start()
	}
	h.eventually(eventLimit, when+": recovery ends", h.idle)
	return killed, h.wholeWithMemory(vm, old, when)
}

// memoryDiesIn is one restore in which something dies in a step.
func (h *host) memoryDiesIn(vm *still, step, how string, old int) (state int) {
	h.t.Helper()
	when := fmt.Sprintf("state %d, %s in step %s", old, how, step)
	vm.write(old)
	id := strings.TrimSpace(h.must("snapshot", "restore", vm.name+"/one", "--memory", "--detach", "-o", "name"))
	ctx, cancel := context.WithCancel(h.ctx())
	_, _ = h.Follow(ctx, id, func(o *vmsnapv1.Operation) {
		for _, s := range o.GetSteps() {
			if s.GetName() == step {
				cancel()
			}
		}
	})
	cancel()
	if how != "QEMU dies" {
		h.signal(syscall.SIGKILL)
	}
	if how != "the daemon dies" {
		for _, pid := range processes(h.t, vm.uuid) {
			if n, err := strconv.Atoi(pid); err == nil {
				_ = syscall.Kill(n, syscall.SIGKILL)
			}
		}
	}
	if how != "QEMU dies" {
		h.start()
	}
	h.eventually(eventLimit, when+": recovery ends", h.idle)
	if how != "the daemon dies" && len(processes(h.t, vm.uuid)) == 0 {
		h.await(vm.name, "stopped") // it died after the end, or without an agent that would bring it back
		vm.cmd = nil
		vm.start()
		if err := vm.own.Cont(h.ctx()); err != nil {
			h.t.Fatal(err)
		}
		h.await(vm.name, "running")
	}
	return h.wholeWithMemory(vm, old, when)
}

// wholeWithMemory verifies what a restore came to, and returns the state that the
// VM is in.
func (h *host) wholeWithMemory(vm *still, old int, when string) (state int) {
	h.t.Helper()
	b := &bench{host: h, vm: vm}
	if !h.followStill(vm, when) {
		h.t.Errorf("%s: the guest does not run", when)
	}
	if n := len(processes(h.t, vm.uuid)); n != 1 {
		h.t.Errorf("%s: %d QEMU processes", when, n)
	}
	state = b.oneOf(when, old, 1)
	h.launchesActive(vm, when)
	h.noOrphans(vm, when)
	vm.check(when)
	if n := h.memories(vm.name); len(memoryFiles(h.t, vm.dir)) != n {
		h.t.Errorf("%s: %v of %d snapshots", when, memoryFiles(h.t, vm.dir), n)
	}
	if j := h.journal(); len(j) > 0 {
		h.t.Errorf("%s: journal %v", when, j)
	}
	return state
}

// processes returns the QEMU processes that run a VM.
func processes(t *testing.T, uuid string) (pids []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		line, err := os.ReadFile(f)
		if err == nil && strings.Contains(string(line), "\x00-uuid\x00"+uuid+"\x00") {
			pids = append(pids, filepath.Base(filepath.Dir(f)))
		}
	}
	return pids
}

// memories returns how many snapshots of a VM have memory.
func (h *host) memories(vm string) (n int) {
	h.t.Helper()
	taken, err := h.Snapshots().ListSnapshots(h.ctx(), connect.NewRequest(&vmsnapv1.ListSnapshotsRequest{Vm: vm}))
	if err != nil {
		h.t.Fatal(err)
	}
	for _, s := range taken.Msg.GetSnapshots() {
		if s.GetMemory() != nil {
			n++
		}
	}
	return n
}
