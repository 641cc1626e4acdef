package packaging

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"

	"github.com/vmsnap/vmsnap/api/client"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

// quickRounds is what the tests of every change can afford.
const quickRounds = 4

var tortureRounds = flag.Int("torture.rounds", quickRounds, "with more than the default, something is killed in every step of a restore")

// launcherKill is a restore with memory in which something is killed.
type launcherKill struct {
	vm   string // "web1" has its own unit, "db" none
	step string // of the operation; "probe" is where the VM's unit is being tried
	how  string
}

// launcherKills are all, or with the default of rounds a few that differ.
func launcherKills() (all []launcherKill) {
	quick := []launcherKill{
		{"web1", "probe", "the daemon dies"}, {"web1", "end", "both die"}, {"web1", "launch", "the daemon dies"}, {"web1", "load", "QEMU dies"},
		{"db", "end", "QEMU dies"}, {"db", "launch", "both die"}, {"db", "load", "the daemon dies"}, {"db", "settle", "the daemon dies"},
	}
	if *tortureRounds <= quickRounds {
		return quick
	}
	for _, vm := range []string{"web1", "db"} {
		for _, step := range []string{"probe", "verify", "save", "end", "overlays", "point", "launch", "load", "resume", "settle", "commit"} {
			for _, how := range []string{"the daemon dies", "QEMU dies", "both die"} {
				if step != "probe" || vm == "web1" {
					all = append(all, launcherKill{vm, step, how})
				}
			}
		}
	}
	return all
}

// killedInRestores kills the daemon, QEMU or both in the steps of restores with
// memory, of a VM in its own unit and of one in transient units. Each VM has the
// state before or the restored one, in one QEMU process in the one unit that it is
// to be in, which is as its owner made it, and nothing is left over.
func (tr *tree) killedInRestores() {
	tr.t.Helper()
	k := &launcherKiller{tree: tr, Client: client.New(tr.dir + "/vmsnapd.sock"), came: map[bool]int{}}
	for _, vm := range []string{"web1", "db"} {
		k.runsAgain(vm)
		k.write(vm, 1)
		tr.run(tr.vmsnap("snapshot", "create", vm, "kills", "--memory")...)
	}
	for i, kill := range launcherKills() {
		if k.restores(kill, i%200+10); tr.t.Failed() {
			return
		}
	}
	tr.t.Logf("to the restored state: %d times, to the one before: %d", k.came[true], k.came[false])
	if k.came[true] == 0 || k.came[false] == 0 {
		tr.t.Error("not both states came about")
	}
}

// launcherKiller kills processes in the tree, from outside.
type launcherKiller struct {
	*tree
	*client.Client
	came map[bool]int // by whether the VM was restored
}

func (k *launcherKiller) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), changeDeadline)
	k.t.Cleanup(cancel)
	return ctx
}

// image is the launch path of the VM's disk.
func (k *launcherKiller) image(vm string) string {
	return fmt.Sprintf("%s/%s/root.qcow2", k.dir, strings.TrimSuffix(vm, "1"))
}

// pids returns the processes of the tree, by their numbers outside, that run a
// program with an argument.
func (k *launcherKiller) pids(program, argument string) (all []int) {
	k.t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		k.t.Fatal(err)
	}
	for _, f := range files {
		line, err := os.ReadFile(f)
		if err != nil {
			continue // it has ended
		}
		args := strings.Split(string(line), "\x00")
		is := func(a string) bool { return strings.Contains(a, argument) }
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f))); err == nil && strings.HasPrefix(filepath.Base(args[0]), program) && slices.ContainsFunc(args, is) {
			all = append(all, pid)
		}
	}
	return all
}

func (k *launcherKiller) machines(vm string) []int { return k.pids("qemu-system", k.image(vm)) }

// kill kills processes, and waits for their end.
func (k *launcherKiller) kill(pids []int) {
	k.t.Helper()
	for _, pid := range pids {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			k.t.Fatal(err)
		}
	}
	k.eventually(changeDeadline, "they are gone", func() error {
		for _, pid := range pids {
			if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil && !strings.Contains(string(stat), ") Z ") {
				return fmt.Errorf("process %d is there", pid)
			}
		}
		return nil
	})
}

// monitor connects to the VM's second monitor.
func (k *launcherKiller) monitor(vm string) *monitor.Session {
	k.t.Helper()
	s, err := monitor.Dial(k.ctx(), filepath.Dir(k.image(vm))+"/q2")
	if err != nil {
		k.t.Fatal(err)
	}
	return s
}

// write writes a value to the VM's disk, as the guest would.
func (k *launcherKiller) write(vm string, value int) {
	k.t.Helper()
	s := k.monitor(vm)
	defer func() { _ = s.Close() }()
	line := fmt.Sprintf(`qemu-io -d /machine/peripheral/root/virtio-backend "write -f -P %d 0 64k"`, value)
	if err := s.Execute(k.ctx(), "human-monitor-command", map[string]any{"command-line": line}, nil); err != nil {
		k.t.Fatal(err)
	}
	if !k.holds(vm, value) {
		k.t.Fatalf("VM %s does not hold %d, which was just written", vm, value)
	}
}

// holds reads what the launch path of the VM's disk leads to.
func (k *launcherKiller) holds(vm string, value int) bool {
	k.t.Helper()
	versions, err := testvm.Versions()
	if err != nil {
		k.t.Fatal(err)
	}
	out, err := exec.Command(versions[0].Tool("qemu-io"), "-U", "-r", "-f", "qcow2", "-c", fmt.Sprintf("read -P %d 0 64k", value), k.image(vm)).CombinedOutput()
	return err == nil && !strings.Contains(string(out), "failed")
}

// restores is one restore in which something is killed.
func (k *launcherKiller) restores(kill launcherKill, old int) {
	k.t.Helper()
	when := fmt.Sprintf("state %d, %v", old, kill)
	k.write(kill.vm, old)
	id := k.run(k.vmsnap("snapshot", "restore", kill.vm+"/kills", "--memory", "--detach", "-o", "name")...)
	k.reaches(id, kill)
	if kill.how != "QEMU dies" {
		k.kill(k.pids("vmsnapd", k.dir+"/state"))
	}
	if kill.how != "the daemon dies" {
		k.kill(k.machines(kill.vm))
	}
	if kill.how != "QEMU dies" {
		k.eventually(changeDeadline, "the unit of the daemon is gone", func() error {
			if out, err := k.try("systemctl", "is-active", "vmsnapd-test"); err == nil {
				return fmt.Errorf("it is %s", out)
			}
			return nil
		})
		k.runDaemon()
	}
	k.eventually(changeDeadline, when+": recovery ends", func() error {
		all, err := k.Operations().ListOperations(k.ctx(), connect.NewRequest(&vmsnapv1.ListOperationsRequest{Active: true}))
		if err == nil && len(all.Msg.GetOperations()) > 0 {
			err = fmt.Errorf("%v", all.Msg.GetOperations()[0])
		}
		return err
	})
	if kill.how != "the daemon dies" && len(k.machines(kill.vm)) == 0 {
		k.runsAgain(kill.vm) // it died when nobody was to bring it back
	}
	k.whole(kill.vm, old, when)
}

// reaches waits until an operation is in a step, or has ended.
func (k *launcherKiller) reaches(id string, kill launcherKill) {
	k.t.Helper()
	if kill.step == "probe" {
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for deadline := time.Now().Add(changeDeadline); len(k.dropIns()) == 0; <-tick.C { // the file is announced to nobody
			if time.Now().After(deadline) {
				k.t.Fatal("the unit is never tried")
			}
		}
		return
	}
	ctx, cancel := context.WithCancel(k.ctx())
	defer cancel()
	_, _ = k.Follow(ctx, id, func(o *vmsnapv1.Operation) {
		for _, s := range o.GetSteps() {
			if s.GetName() == kill.step {
				cancel()
			}
		}
	})
}

// dropIns are what has been put beside the VM's unit for this boot.
func (k *launcherKiller) dropIns() []string {
	k.t.Helper()
	all, err := filepath.Glob(fmt.Sprintf("/proc/%d/root/run/systemd/system/vm@*.service.d/*", k.leader))
	if err != nil {
		k.t.Fatal(err)
	}
	return all
}

// runsAgain starts a VM by its own unchanged command, if it does not run, and waits
// until it does.
func (k *launcherKiller) runsAgain(vm string) {
	k.t.Helper()
	if len(k.machines(vm)) == 0 && vm == "web1" {
		k.sh("systemctl reset-failed vm@1.service; systemctl start vm@1.service")
	} else if len(k.machines(vm)) == 0 {
		k.startDB()
	}
	k.inState(vm, "running")
}

// whole verifies what a restore came to.
func (k *launcherKiller) whole(vm string, old int, when string) {
	k.t.Helper()
	k.inState(vm, "running")
	restored, before := k.holds(vm, 1), k.holds(vm, old)
	if restored == before {
		k.t.Errorf("%s: the disk has the restored state: %t, the one before: %t", when, restored, before)
	}
	k.came[restored]++
	if all := k.machines(vm); len(all) != 1 {
		k.t.Errorf("%s: QEMU is %v", when, all)
	}
	if vm == "web1" {
		k.asItsOwner("")
	}
	if left := k.dropIns(); len(left) > 0 {
		k.t.Errorf("%s: drop-ins are left: %v", when, left)
	}
	k.onlyUnits(when)
	k.onlyMemory(vm, when)
	images, err := filepath.Glob(filepath.Dir(k.image(vm)) + "/*.qcow2")
	if err != nil {
		k.t.Fatal(err)
	}
	k.run(append([]string{"sh", "-euc", `for i; do qemu-img check -q -U -f qcow2 "$i"; done`, "sh"}, images...)...)
}

// onlyUnits fails unless each unit of ours runs the QEMU of the VM without a unit.
func (k *launcherKiller) onlyUnits(when string) {
	k.t.Helper()
	groups := ""
	for _, pid := range k.qemus("db") {
		groups += k.run("cat", "/proc/"+pid+"/cgroup")
	}
	for line := range strings.Lines(k.run("systemctl", "list-units", "--all", "--plain", "--no-legend", "vmsnap-*")) {
		unit, _, _ := strings.Cut(line, " ")
		if !strings.HasSuffix(groups, "/"+unit) {
			k.t.Errorf("%s: a unit is left: %s (QEMU runs in %s)", when, line, groups)
		}
	}
}

// onlyMemory fails unless each memory file is that of a snapshot.
func (k *launcherKiller) onlyMemory(vm, when string) {
	k.t.Helper()
	taken, err := k.Snapshots().ListSnapshots(k.ctx(), connect.NewRequest(&vmsnapv1.ListSnapshotsRequest{Vm: vm}))
	if err != nil {
		k.t.Fatal(err)
	}
	want := 0
	for _, s := range taken.Msg.GetSnapshots() {
		if s.GetMemory() != nil {
			want++
		}
	}
	files, err := filepath.Glob(filepath.Dir(k.image(vm)) + "/.vmsnap/*.mem*")
	if err != nil || len(files) != want {
		k.t.Errorf("%s: %d snapshots have memory, and there are %v, %v", when, want, files, err)
	}
}
