package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

// The saves of these tests are of VMs whose CPUs run with no guest to boot: the
// firmware counts the ticks of its timer, in memory. What needs a guest is in
// memory_qemu_test.go and memoryload_qemu_test.go.

// run lets the CPUs run.
func (s *still) run() {
	s.t.Helper()
	s.tell("cont")
}

// status is QEMU's own run state.
func (s *still) status() monitor.Status {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), eventLimit)
	defer cancel()
	status, err := s.own.QueryStatus(ctx)
	if err != nil {
		s.t.Fatal(err)
	}
	return status
}

// ticks reads the timer's count from the VM's memory, where PC firmware keeps
// it (40:6C).
func (s *still) ticks() (n int) {
	s.t.Helper()
	var out string
	s.execute("human-monitor-command", map[string]any{"command-line": "xp /1wx 0x46c"}, &out)
	if _, err := fmt.Sscanf(out, "000000000000046c: 0x%x", &n); err != nil {
		s.t.Fatalf("%q: %v", out, err)
	}
	return n
}

// goesOn waits until the VM's CPUs work.
func (h *host) goesOn(vm *still, when string) {
	h.t.Helper()
	if s := vm.status(); !s.Running {
		h.t.Errorf("%s: the VM is %s", when, s.Status)
	}
	from := vm.ticks()
	h.eventually(eventLimit, when+": the timer ticks", func() error {
		if now := vm.ticks(); now == from {
			return fmt.Errorf("%d ticks", now)
		}
		return nil
	})
}

// loaded is a VM like another that goes on from a snapshot of it, on overlays
// of its own.
func (s *still) loaded(disks []snapshotDisk, memory string) *still {
	s.t.Helper()
	dir, err := os.MkdirTemp("", "vs-")
	if err != nil {
		s.t.Fatal(err)
	}
	l := &still{t: s.t, q: s.q, name: s.name + "-loaded", uuid: newUUID(s.t), dir: dir, disks: s.disks}
	s.t.Cleanup(func() { l.kill(); _ = os.RemoveAll(dir) })
	for _, a := range s.args {
		l.args = append(l.args, strings.NewReplacer(s.dir+"/", dir+"/", s.uuid, l.uuid).Replace(a))
	}
	l.args = append(l.args, "-incoming", "defer")
	for _, d := range disks {
		img(s.t, s.q, "create", "-q", "-f", "qcow2", "-b", d.Path, "-F", d.Format, dir+"/"+d.Device+".qcow2")
	}
	l.start()
	ctx, cancel := context.WithTimeout(context.Background(), eventLimit)
	defer cancel()
	if err := loadInto(ctx, l.own, memory); err != nil {
		s.t.Fatal(err)
	}
	return l
}

// settings are the migration settings that the VM's owner may have made.
func (s *still) settings() string {
	s.t.Helper()
	var capabilities, parameters json.RawMessage
	s.execute("query-migrate-capabilities", nil, &capabilities)
	s.execute("query-migrate-parameters", nil, &parameters)
	return string(capabilities) + "\n" + string(parameters)
}

// TestQEMUTenSaves saves ten times in one process. Each save can be loaded, and
// is of its own instant; the owner's settings are as they were, and the VM is
// stopped and resumed once for each.
func TestQEMUTenSaves(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "ten-"+q.Name, "root.qcow2", "data.qcow2")
		vm.run()
		vm.execute("migrate-set-parameters", map[string]any{"downtime-limit": 123, "max-bandwidth": 45 << 20}, nil)
		vm.execute("migrate-set-capabilities", map[string]any{"capabilities": []any{map[string]any{"capability": "auto-converge", "state": true}}}, nil)
		settings := vm.settings()
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		h.await(vm.name, "running")
		states := vm.own.Subscribe(256, "STOP", "RESUME", "SUSPEND", "WAKEUP", "RESET", "SHUTDOWN", "POWERDOWN", "GUEST_PANICKED")
		defer states.Close()
		before, after := map[int]int{}, map[int]int{}
		for i := 1; i <= 10; i++ {
			strategy := strategies(q)[i%len(strategies(q))]
			vm.write(i)
			h.goesOn(vm, strategy)
			before[i] = vm.ticks()
			h.must("snapshot", "create", vm.name, fmt.Sprint("s", i), "--memory", "--memory-strategy", strategy)
			after[i] = vm.ticks()
			h.goesOn(vm, strategy)
			if now := vm.settings(); now != settings {
				t.Errorf("%s: the owner's settings were\n%s\nand are\n%s", strategy, settings, now)
			}
			if got := drain(states); !slices.Equal(got, []string{"STOP", "RESUME"}) {
				t.Errorf("%s: the VM's states: %v", strategy, got)
			}
		}
		for i := 1; i <= 10; i++ {
			name := fmt.Sprintf("%s/s%d", vm.name, i)
			s := h.snapshot(name)
			if s.Consistency != "memory" || len(s.Disks) != 2 {
				t.Errorf("%s: %+v", name, s)
			}
			l := vm.loaded(s.Disks, h.memoryOf(name))
			if n := l.ticks(); n < before[i] || n > after[i] {
				t.Errorf("%s: its memory is of tick %d, saved between %d and %d", name, n, before[i], after[i])
			}
			l.run()
			h.goesOn(l, name)
			l.holds(i, name)
			l.kill()
		}
	})
}

// drain returns the names of the events that have come.
func drain(sub *monitor.Subscription) (names []string) {
	for {
		select {
		case e := <-sub.C:
			names = append(names, e.Name)
		default:
			return names
		}
	}
}

// TestQEMUAPausedVMStaysPaused when its memory is saved.
func TestQEMUAPausedVMStaysPaused(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "ownerpaused-"+q.Name, "root.qcow2")
		vm.run()
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		h.await(vm.name, "running")
		h.goesOn(vm, "at first")
		vm.tell("stop")
		h.await(vm.name, "paused")
		vm.write(1)
		ticks := vm.ticks()
		states := vm.own.Subscribe(64, "STOP", "RESUME", "SUSPEND", "RESET", "SHUTDOWN")
		defer states.Close()
		h.must("snapshot", "create", vm.name, "s", "--memory")
		if got := drain(states); len(got) > 0 {
			t.Errorf("the VM's states: %v", got)
		}
		if s := vm.status(); s.Running {
			t.Errorf("the VM is %s", s.Status)
		}
		if q.Name == "7.2" { // which has no way to save a paused VM and leave it as it was
			h.eventually(eventLimit, "it is said to have been saved", func() error { return h.shows(vm.name, "run_state", "postmigrate") })
			h.await(vm.name, "paused")
			if w := h.snapshot(vm.name + "/s").Warnings; len(w) != 1 || w[0].Code != "vm-left-postmigrate" {
				t.Errorf("nobody was warned: %+v", w)
			}
		} else {
			h.await(vm.name, "paused")
		}
		l := vm.loaded(h.snapshot(vm.name+"/s").Disks, h.memoryOf(vm.name+"/s"))
		if s := l.status(); s.Running {
			t.Errorf("loaded it is %s", s.Status)
		}
		if n := l.ticks(); n != ticks {
			t.Errorf("its memory is of tick %d, saved at %d", n, ticks)
		}
		vm.run() // as its owner does
		h.goesOn(vm, "continued")
		vm.write(2)
		h.must("snapshot", "create", vm.name, "t", "--memory")
		h.goesOn(vm, "saved again")
	})
}

// failing has a system call of a process fail from its n-th time on, in each of
// its threads.
func (h *host) failing(pid int, call, cause string, n int) (end func()) {
	h.t.Helper()
	return h.tamper(pid, call, fmt.Sprintf("error=%s:when=%d+", cause, n))
}

// tamper changes what becomes of a system call of a process: see -e inject of
// strace.
func (h *host) tamper(pid int, call, how string) (end func()) {
	h.t.Helper()
	tracer := exec.Command("strace", "-f", "-b", "execve", "-q", "-o", h.path("tampered"), "-e", "trace="+call,
		"-e", "inject="+call+":"+how, "-p", fmt.Sprint(pid))
	if err := tracer.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.eventually(eventLimit, "the tracer is attached", func() error {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err == nil && strings.Contains(string(b), "TracerPid:\t0\n") {
			err = errors.New("not traced")
		}
		return err
	})
	return func() {
		_ = tracer.Process.Signal(syscall.SIGINT)
		_ = tracer.Wait()
	}
}

// takenBack verifies that nothing is left of a snapshot with memory.
func (h *host) takenBack(vm *still, name string, layers int, when string) {
	h.t.Helper()
	h.eventually(eventLimit, when+": it has ended", h.idle)
	h.fails(4, "", "snapshot", "show", vm.name+"/"+name)
	for _, dir := range append([]string{vm.dir}, vm.further...) {
		for _, d := range []string{dir, dir + "/.vmsnap"} {
			if left, err := filepath.Glob(d + "/*.mem*"); err != nil || len(left) > 0 {
				h.t.Errorf("%s: %v is left, %v", when, left, err)
			}
		}
	}
	for i, n := range h.layers(vm.name) {
		if n != layers {
			h.t.Errorf("%s: disk %d has %d layers, and had %d", when, i, n, layers)
		}
	}
	if j := h.journal(); len(j) > 0 {
		h.t.Errorf("%s: journal %v", when, j)
	}
	h.eventually(eventLimit, when+": no guard is left", func() error {
		if g := h.guards(); len(g) > 0 {
			return fmt.Errorf("processes %v", g)
		}
		return nil
	})
	vm.check(when)
	h.noOrphans(vm, when)
}

// TestQEMUMemoryFileFails has what QEMU writes, and what the daemon syncs, fail.
// The VM runs on, its disks are those from before, and the error names the cause.
func TestQEMUMemoryFileFails(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "badfile-"+q.Name, "root.qcow2", "data.qcow2")
		vm.run()
		dir := t.TempDir()
		sh(t, "mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", dir)
		t.Cleanup(func() { sh(t, "umount", dir) })
		vm.further = []string{dir}
		h := prepareHost(t, "--memory-dir", dir)
		h.list(vm.name, vm.uuid)
		h.start()
		t.Cleanup(h.end)
		h.await(vm.name, "running")
		settings := vm.settings()
		round := 0
		after := func(when string) {
			t.Helper()
			h.goesOn(vm, when)
			h.takenBack(vm, "x", 1, when)
			if now := vm.settings(); now != settings {
				t.Errorf("%s: the owner's settings were\n%s\nand are\n%s", when, settings, now)
			}
			round++
			vm.write(round)
		}
		h.fails(6, "set aside", "snapshot", "create", vm.name, "x", "--memory")
		after("too little space")
		sh(t, "mount", "-o", "remount,size=512m", dir)

		for _, c := range []struct{ strategy, cause, says string }{
			{"background", "EIO", "Input/output error"}, {"background", "ENOSPC", "No space left"},
			{"precopy", "ENOSPC", "No space left"}, {"stopped", "EIO", "Input/output error"},
		} {
			if c.strategy == "background" && q.Name == "7.2" {
				continue // which holds the guest for good: see TestQEMUDoctorRescues
			}
			if !slices.Contains(strategies(q), c.strategy) {
				h.fails(14, "without KVM", "snapshot", "create", vm.name, "x", "--memory", "--memory-strategy", c.strategy)
				continue
			}
			when := c.strategy + ", " + c.cause
			end := h.failing(vm.cmd.Process.Pid, "writev", c.cause, 3)
			r := h.run("snapshot", "create", vm.name, "x", "--memory", "--memory-strategy", c.strategy)
			end()
			if r.code != 1 || !strings.Contains(r.stderr, c.says) {
				t.Errorf("%s: exit code %d: %s", when, r.code, r.stderr)
			}
			after(when)
		}
		end := h.failing(h.daemon.Process.Pid, "fdatasync", "EIO", 1)
		r := h.run("snapshot", "create", vm.name, "x", "--memory")
		end()
		if r.code != 1 || !strings.Contains(r.stderr, "input/output error") {
			t.Errorf("the sync: exit code %d: %s", r.code, r.stderr)
		}
		after("the sync")
		h.must("snapshot", "create", vm.name, "y", "--memory")
		h.must("snapshot", "verify", vm.name+"/y")
		vm.kill()
		vm.start()
		vm.holds(round, "started again")
	})
}
