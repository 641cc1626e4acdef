package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

const (
	running = vmsnapv1.VMState_VM_STATE_RUNNING
	paused  = vmsnapv1.VMState_VM_STATE_PAUSED
	stopped = vmsnapv1.VMState_VM_STATE_STOPPED
	unknown = vmsnapv1.VMState_VM_STATE_UNKNOWN
)

// remaining is what is left of a time that began earlier. A machine that was
// too busy to start QEMU in time gets a little more.
func remaining(limit time.Duration, began time.Time) time.Duration {
	return max(limit-time.Since(began), limit/4)
}

// follows starts a VM under a daemon's eyes, has it run and stand still, and
// ends it. Each change must be listed within the limit.
func follows(t *testing.T, h *host, vm *still, limit time.Duration) {
	t.Helper()
	began := time.Now()
	vm.start()
	seen := h.sees(remaining(limit, began), vm.name, inState(paused))
	process := seen.GetProcess()
	if seen.GetUuid() != vm.uuid || seen.GetRunState() != "prelaunch" || int(process.GetPid()) != vm.cmd.Process.Pid ||
		!strings.HasPrefix(process.GetQemuVersion(), vm.q.Name+".") || process.GetQmpSocket() != vm.dir+"/q1" || len(seen.GetProblems()) != 0 {
		t.Errorf("shown as %v", seen)
	}
	if len(seen.GetDisks()) != len(vm.disks) {
		t.Fatalf("shown with the disks %v", seen.GetDisks())
	}
	for i, d := range seen.GetDisks() {
		path := vm.dir + "/" + vm.disks[i] + ".qcow2"
		if d.GetDevice() != vm.disks[i] || d.GetVirtualSize() != 8<<20 || d.GetLaunchPath() != path || d.GetLaunchFormat() != "qcow2" || d.GetNotCuttable() != "" ||
			len(d.GetLayers()) != 1 || d.GetLayers()[0].GetPath() != path || d.GetLayers()[0].GetFormat() != "qcow2" || d.GetLayers()[0].GetAllocated() == 0 {
			t.Errorf("disk %v", d)
		}
	}
	vm.tell("cont")
	h.sees(promptly(time.Second), vm.name, inState(running))
	vm.tell("stop")
	h.sees(promptly(time.Second), vm.name, inState(paused))
	vm.kill()
	gone := h.sees(promptly(time.Second), vm.name, inState(stopped))
	if gone.GetProcess() != nil || gone.GetId() != seen.GetId() || len(gone.GetDisks()) != len(vm.disks) {
		t.Errorf("after its end it is shown as %v", gone)
	}
}

// tell sends QEMU a command without arguments.
func (s *still) tell(command string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), eventLimit)
	defer cancel()
	if err := s.own.Execute(ctx, command, nil, nil); err != nil {
		s.t.Fatal(err)
	}
}

func TestQEMUIsListedFromStartToExit(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "appears-"+q.Name, "root.qcow2", "data.qcow2")
		vm.kill()
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		follows(t, h, vm, promptly(time.Second))
		follows(t, h, vm, promptly(time.Second))
		if r := h.run("vm", "list"); r.code != 0 || strings.Contains(r.stderr, "scanning") || !strings.Contains(r.stdout, vm.name) {
			t.Errorf("vm list: %+v", r)
		}
		if m := h.scrape(); !strings.Contains(m, "\nvmsnap_discovery_fallback 0\n") || !strings.Contains(m, "\nvmsnap_vms{state=\"stopped\"} 1\n") {
			t.Errorf("metrics:\n%s", m)
		}
	})
}

func TestQEMUIsListedByScanning(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "scanned-"+q.Name, "root.qcow2")
		vm.kill()
		h := prepareHost(t, "--scan-only")
		h.list(vm.name, vm.uuid)
		h.start()
		t.Cleanup(h.end)
		follows(t, h, vm, 5*time.Second)
		if r := h.run("vm", "list"); r.code != 0 || !strings.Contains(r.stderr, "scanning") {
			t.Errorf("vm list does not tell of the fallback: %+v", r)
		}
		if m := h.scrape(); !strings.Contains(m, "\nvmsnap_discovery_fallback 1\n") {
			t.Errorf("the metrics do not tell of the fallback:\n%s", m)
		}
	})
}

// TestQEMUMonitorOfAnotherClient has VMs whose monitors another client holds:
// one has a second monitor, one has not, and a third is nobody else's.
func TestQEMUMonitorOfAnotherClient(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		busy := newMachine(t, q, "busy-"+q.Name, "-qmp", qmp("q"))
		busy.command = append(busy.command, busy.disk(q, "root")...)
		shared := newMachine(t, q, "shared-"+q.Name, "-qmp", qmp("q"),
			"-chardev", "socket,id=second,path=${DIR}/second,server=on,wait=off", "-mon", "chardev=second,mode=control")
		free := newMachine(t, q, "free-"+q.Name, "-qmp", qmp("q"))
		for _, m := range []*machine{busy, shared, free} {
			m.start()
		}
		client := busy.hold("q")
		shared.hold("q")
		h := hostOf(t, nil, busy, shared, free)
		h.sees(3*time.Second, free.name, inState(paused)) // sooner than a busy monitor is given up
		h.sees(12*time.Second, busy.name, hasProblem("monitor-busy"))
		h.sees(0, busy.name, inState(unknown))
		if list := h.must("vm", "list"); !strings.Contains(list, "monitor-busy") {
			t.Errorf("vm list:\n%s", list)
		}
		r := h.fails(8, "busy", "snapshot", "create", busy.name, "early", "--quiesce", "none")
		if !strings.Contains(r.stderr, "second -qmp") {
			t.Errorf("no advice in: %s", r.stderr)
		}
		h.sees(12*time.Second, shared.name, func(vm *vmsnapv1.VM) error {
			if got := vm.GetProcess().GetQmpSocket(); got != shared.dir+"/second" || vm.GetState() != paused || len(vm.GetProblems()) != 0 {
				return fmt.Errorf("monitor %q, %s, problems %v", got, vm.GetState(), vm.GetProblems())
			}
			return nil
		})
		if err := client.Close(); err != nil {
			t.Fatal(err)
		}
		vm := h.sees(12*time.Second, busy.name, inState(paused))
		if len(vm.GetProblems()) != 0 {
			t.Errorf("problems that are over: %v", vm.GetProblems())
		}
		h.must("snapshot", "create", busy.name, "late", "--quiesce", "none")
	})
}

func TestQEMUWithoutMonitorToConnectTo(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		none := newMachine(t, q, "none-"+q.Name)
		libvirt := newMachine(t, q, "libvirt-"+q.Name, "-chardev", "socket,id=charmonitor,fd=3,server=on,wait=off",
			"-mon", "chardev=charmonitor,id=monitor,mode=control")
		l, err := net.Listen("unix", libvirt.dir+"/monitor.sock")
		if err != nil {
			t.Fatal(err)
		}
		f, err := l.(*net.UnixListener).File()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close(); _ = f.Close() })
		libvirt.files = []*os.File{f}
		h := hostOf(t, nil, none, libvirt)
		none.start()
		libvirt.start()
		for m, problem := range map[*machine]string{none: "no-qmp-socket", libvirt: "libvirt-managed"} {
			vm := h.sees(time.Second, m.name, hasProblem(problem))
			if vm.GetState() != unknown || int(vm.GetProcess().GetPid()) != m.cmd.Process.Pid || vm.GetUuid() != m.uuid {
				t.Errorf("%s is shown as %v", m.name, vm)
			}
			r := h.fails(14, m.name, "snapshot", "create", m.name, "x")
			if !strings.Contains(r.stderr, "-qmp unix:") {
				t.Errorf("%s: no advice in %s", m.name, r.stderr)
			}
		}
	})
}

func TestQEMUDuplicateIdentity(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		one := newMachine(t, q, "one-"+q.Name, "-qmp", qmp("q"))
		one.command = append(one.command, one.disk(q, "root")...)
		two := newMachine(t, q, "one-"+q.Name, "-qmp", qmp("q"), "-uuid", one.uuid)
		two.command = append(two.command, two.disk(q, "root")...)
		h := hostOf(t, nil, one)
		one.start()
		h.sees(eventLimit, one.name, inState(paused))
		h.must("snapshot", "create", one.name, "before", "--quiesce", "none")
		two.start()
		h.eventually(eventLimit, "both are listed", func() error {
			found, err := h.shown(one.name)
			if err != nil || len(found) != 2 {
				return fmt.Errorf("%d are listed, %w", len(found), err)
			}
			for _, vm := range found {
				if err := hasProblem("duplicate-identity")(vm); err != nil {
					return err
				}
			}
			if found[0].GetProcess().GetPid() == found[1].GetProcess().GetPid() {
				return fmt.Errorf("both have the pid %d", found[0].GetProcess().GetPid())
			}
			return nil
		})
		h.fails(14, "same identity", "snapshot", "create", one.name, "during", "--quiesce", "none")
		h.fails(14, "same identity", "freeze", one.name)
		two.kill()
		vm := h.sees(time.Second, one.name, inState(paused))
		if len(vm.GetProblems()) != 0 || int(vm.GetProcess().GetPid()) != one.cmd.Process.Pid {
			t.Errorf("what is left is shown as %v", vm)
		}
		h.must("snapshot", "create", one.name, "after", "--quiesce", "none")
		if names := h.must("snapshot", "list", one.name, "-o", "name"); len(strings.Fields(names)) != 2 {
			t.Errorf("snapshots: %s", names)
		}
	})
}

// TestQEMUInAnotherMountNamespace has images and sockets where only the VM's
// own process sees them.
func TestQEMUInAnotherMountNamespace(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		m := newMachine(t, q, "apart-"+q.Name, "-qmp", qmp("q"), "-drive", "file=${DIR}/root.qcow2,if=none,id=drive-root,format=qcow2",
			"-device", "virtio-blk-pci,drive=drive-root,id=root")
		setup := fmt.Sprintf(`mount -t tmpfs tmpfs %s && %s create -q -f qcow2 %s/root.qcow2 8M && exec "$@"`, m.dir, q.Img, m.dir)
		m.command = append([]string{"unshare", "-m", "sh", "-c", setup, "sh"}, m.command...)
		h := hostOf(t, nil, m)
		m.start()
		vm := h.sees(eventLimit, m.name, inState(paused))
		if err := hasProblem("other-mount-namespace")(vm); err != nil {
			t.Error(err)
		}
		if d := vm.GetDisks(); len(d) != 1 || d[0].GetVirtualSize() != 8<<20 || d[0].GetNotCuttable() != "" || d[0].GetLayers()[0].GetAllocated() == 0 {
			t.Fatalf("disks %v", d)
		}
		h.must("snapshot", "create", m.name, "s", "--quiesce", "none")
		if entries, err := os.ReadDir(m.dir); err != nil || len(entries) != 0 {
			t.Errorf("on the host's side appeared %v, %v", entries, err)
		}
		inside := fmt.Sprintf("/proc/%d/root", m.cmd.Process.Pid)
		vm = h.sees(eventLimit, m.name, func(vm *vmsnapv1.VM) error {
			if len(vm.GetDisks()) != 1 || len(vm.GetDisks()[0].GetLayers()) != 2 {
				return fmt.Errorf("disks %v", vm.GetDisks())
			}
			return nil
		})
		for _, l := range vm.GetDisks()[0].GetLayers() {
			if out, err := exec.Command("nsenter", "-m", "-t", fmt.Sprint(m.cmd.Process.Pid), q.Img, "check", "-q", "-U", "-f", "qcow2", l.GetPath()).CombinedOutput(); err != nil {
				t.Errorf("qemu-img check %s: %v\n%s", l.GetPath(), err, out)
			}
		}
		launch, err := os.Stat(filepath.Join(inside, m.dir, "root.qcow2"))
		if err != nil {
			t.Fatal(err)
		}
		active, err := os.Stat(filepath.Join(inside, vm.GetDisks()[0].GetLayers()[0].GetPath()))
		if err != nil || !os.SameFile(launch, active) {
			t.Errorf("the launch path does not lead to the active layer: %v", err)
		}
		m.kill()
		h.sees(time.Second, m.name, inState(stopped))
		h.fails(1, "no such file", "snapshot", "create", m.name, "t", "--quiesce", "none")
	})
}

func TestQEMUOverrides(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		m := newMachine(t, q, "found-"+q.Name, "-qmp", qmp("q1"), "-qmp", qmp("q2"), "-device", "virtio-serial-pci",
			"-chardev", "socket,id=ga,path=${DIR}/ga,server=on,wait=off", "-device", "virtserialport,chardev=ga,id=port,name=com.example.agent")
		ignored := newMachine(t, q, "ignored-"+q.Name, "-qmp", qmp("q1"))
		h := prepareHost(t)
		text := fmt.Sprintf("match: {uuid: %s}\nname: called-%s\nqmp: %s/q2\nguest-agent: %s/ga\n---\nmatch:\n  uuid: %s\nignore: true\n",
			m.uuid, q.Name, m.dir, m.dir, ignored.uuid)
		if err := os.WriteFile(h.path("vms.d/vms.yaml"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		m.start()
		ignored.start()
		ignored.hold("q1")
		h.start()
		t.Cleanup(h.end)
		vm := h.sees(eventLimit, "called-"+q.Name, inState(paused))
		if vm.GetUuid() != m.uuid || vm.GetProcess().GetQmpSocket() != m.dir+"/q2" || vm.GetGuestAgent().GetSocket() != m.dir+"/ga" {
			t.Errorf("shown as %v", vm)
		}
		m.hold("q1") // nobody holds it
		if names := strings.Fields(h.must("vm", "list", "-o", "name")); len(names) != 1 {
			t.Errorf("listed are %v", names)
		}
		h.fails(4, ignored.name, "snapshot", "create", ignored.name, "x")
	})
}

func TestQEMUKeepsItsIdentity(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "first-"+q.Name, "root.qcow2")
		h := newHostOf(t, map[string]string{vm.name: vm.uuid})
		id := h.await(vm.name, "paused").GetId()
		h.must("snapshot", "create", vm.name, "s", "--quiesce", "none")
		vm.kill()
		vm.start()
		h.await(vm.name, "paused")
		again := h.await(vm.name, "paused")
		if again.GetId() != id || again.GetSnapshots() != 1 {
			t.Errorf("started again it is %v with %v snapshots, was %v", again.GetId(), again.GetSnapshots(), id)
		}
		vm.kill()
		for i, a := range vm.args {
			if a == vm.name {
				vm.args[i] = "second-" + q.Name
			}
		}
		first := vm.name
		vm.name = "second-" + q.Name
		vm.start()
		renamed := h.await(vm.name, "paused")
		if renamed.GetId() != id || renamed.GetSnapshots() != 1 {
			t.Errorf("renamed it is %v with %v snapshots, was %v", renamed.GetId(), renamed.GetSnapshots(), id)
		}
		if s := h.snapshot(vm.name + "/s"); s.Name != "s" || len(s.Disks) != 1 {
			t.Errorf("snapshot %+v", s)
		}
		h.fails(4, first, "vm", "show", first)
		h.must("snapshot", "create", vm.name, "t", "--quiesce", "none")
		vm.check("after the snapshots")
	})
}

// TestWrongSettingsStopTheDaemon has mistakes in the configuration and in the
// files of VMs. The daemon names file and line, and does not start.
func TestWrongSettingsStopTheDaemon(t *testing.T) {
	for name, c := range map[string]struct{ config, vms, want string }{
		"unknown setting":      {"log-level: info\nlog-severity: info\n", "", "vmsnapd.yaml:2: log-severity"},
		"wrong value":          {"# what is logged\nlog-format: text\nlog-level: loud\n", "", "vmsnapd.yaml:3: log-level"},
		"wrong type":           {"log-level: info\nscan-only: perhaps\n", "", "vmsnapd.yaml:2: scan-only"},
		"no such group":        {"log-level: info\nviewers: [no-such-group-1]\n", "", "vmsnapd.yaml:2: viewers"},
		"no YAML":              {"log-level: [\n", "", "vmsnapd.yaml:"},
		"VM: unknown setting":  {"", "match: {name: a}\nqpm: /x\n", "vm.yaml:2: qpm"},
		"VM: socket not there": {"", "match:\n  name: a\nqmp: relative\n", "vm.yaml:3: qmp"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := prepareHost(t)
			config := h.path("vmsnapd.yaml")
			for path, text := range map[string]string{config: c.config, h.path("vms.d/vm.yaml"): c.vms} {
				if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), eventLimit)
			defer cancel()
			out, err := exec.CommandContext(ctx, filepath.Join(binaries, "vmsnapd"), "--config", config, "--state-dir", h.path("state"), "--run-dir", h.dir,
				"--socket", h.socket, "--metrics-listen", h.metrics, "--vms-dir", h.path("vms.d"), "--listed-only").CombinedOutput()
			if err == nil || ctx.Err() != nil || !strings.Contains(string(out), c.want) {
				t.Errorf("%v, %v: %q is not in:\n%s", err, ctx.Err(), c.want, out)
			}
			if _, err := os.Stat(h.socket); err == nil {
				t.Error("it made its socket")
			}
		})
	}
}
