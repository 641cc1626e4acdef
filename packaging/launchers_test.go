package packaging

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// vmUnit is the unit of a VM as an operator would write it: what starts QEMU is a
// script, and QEMU is started again whenever it ends.
const vmUnit = `[Service]
Slice=tenant.slice
ExecStart=/bin/sh -c 'exec %s -name web%%i'
Restart=always
RestartSec=0
`

// stillCommand is a QEMU whose guest has nothing to boot.
func (tr *tree) stillCommand(name string) string {
	return fmt.Sprintf("qemu-system-x86_64 -nodefaults -display none -machine pc,accel=tcg -m 16 -qmp unix:%[1]s/%[2]s/qmp,server=on,wait=off -qmp unix:%[1]s/%[2]s/q2,server=on,wait=off "+
		"-drive file=%[1]s/%[2]s/root.qcow2,if=none,id=d,format=qcow2 -device virtio-blk-pci,id=root,drive=d", tr.dir, name)
}

// TestQEMULaunchersOfSystemd restores the memory of a VM that has its own unit, and
// of one in a transient unit of another user, on a host that systemd runs.
func TestQEMULaunchersOfSystemd(t *testing.T) {
	bin := t.TempDir()
	cmd := exec.Command("go", "build", "-trimpath", "-o", bin, "../cmd/vmsnapd", "../cmd/vmsnap")
	cmd.Env = append(cmd.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	tr := boot(t, bin)
	for _, name := range []string{"web", "db"} {
		tr.sh("mkdir -m 777 " + tr.dir + "/" + name + " && qemu-img create -q -f qcow2 " + tr.dir + "/" + name + "/root.qcow2 8M")
	}
	tr.sh("groupadd -g 4712 tenant; groupadd -g 4713 disks; useradd -u 4711 -g tenant tenant")
	tr.sh("chmod 755 " + tr.dir + "; chown -R 4711:4712 " + tr.dir + "/db")
	tr.write("/etc/systemd/system/vm@.service", fmt.Sprintf(vmUnit, tr.stillCommand("web")))
	tr.sh("systemctl daemon-reload; systemctl start vm@1.service")
	tr.startDB()
	tr.startDaemon()

	t.Run("unit", func(t *testing.T) { tr.t = t; tr.restoresThroughUnit() })
	t.Run("systemd", func(t *testing.T) { tr.t = t; tr.restoresInTransientUnit() })
	t.Run("killed", func(t *testing.T) { tr.t = t; tr.killedInLaunch() })
	t.Run("killed in steps", func(t *testing.T) { tr.t = t; tr.killedInRestores() })
	t.Run("denied", func(t *testing.T) { tr.t = t; tr.deniedBySystemd() })
	tr.t = t
}

// startDB starts the VM that has no unit of its own.
func (tr *tree) startDB() {
	tr.t.Helper()
	tr.sh("systemd-run --quiet --collect --unit=db --slice=tenant -p User=4711 -p Group=4712 -p SupplementaryGroups=4713 " + tr.stillCommand("db") + " -name db")
}

func (tr *tree) startDaemon(properties ...string) {
	tr.t.Helper()
	tr.runDaemon(properties...)
	for _, vm := range []string{"web1", "db"} {
		tr.inState(vm, "running")
	}
}

// runDaemon starts the daemon and waits until it answers.
func (tr *tree) runDaemon(properties ...string) {
	tr.t.Helper()
	args := append([]string{"systemd-run", "--quiet", "--collect", "--unit=vmsnapd-test", "-p", "KillMode=process"}, properties...)
	tr.run(append(args, "/packages/vmsnapd", "--config", "/dev/null", "--state-dir", tr.dir+"/state", "--run-dir", tr.dir, "--metrics-listen", "127.0.0.1:9777")...)
	tr.eventually(changeDeadline, "the daemon answers", func() error {
		out, err := tr.try(tr.vmsnap("vm", "list")...)
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

func (tr *tree) vmsnap(args ...string) []string {
	return append([]string{"/packages/vmsnap", "--socket", tr.dir + "/vmsnapd.sock"}, args...)
}

// inState waits until a VM is in a state.
func (tr *tree) inState(vm, state string) {
	tr.t.Helper()
	tr.eventually(changeDeadline, vm+" is "+state, func() error {
		out, err := tr.try(tr.vmsnap("vm", "show", vm, "-o", "json")...)
		if err != nil || !strings.Contains(out, `"state": "`+state+`"`) || !strings.Contains(out, `"not_cuttable": ""`) {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

// qemus are the pids of the QEMU processes of a VM.
func (tr *tree) qemus(name string) []string {
	out, _ := tr.try("pgrep", "-f", "qemu-system.*-name "+name+"( |$)") // it fails when there is none
	return strings.Fields(out)
}

func (tr *tree) restoresThroughUnit() {
	tr.t.Helper()
	before := tr.show("vm@1.service", "MainPID")
	tr.run(tr.vmsnap("snapshot", "create", "web1", "one", "--memory")...)
	if plan := tr.run(tr.vmsnap("snapshot", "restore", "web1/one", "--memory", "--dry-run")...); !strings.Contains(plan, "launcher unit") {
		tr.t.Errorf("the plan: %s", plan)
	}
	tr.run(tr.vmsnap("snapshot", "restore", "web1/one", "--memory")...)
	tr.inState("web1", "running")
	tr.asItsOwner(before)
	if got := tr.show("vm@1.service", "Slice"); got != "tenant.slice" {
		tr.t.Errorf("it is in %s", got)
	}
}

// asItsOwner fails unless the VM runs in its own unit, as another process than
// before, and the unit is as its owner has written it.
func (tr *tree) asItsOwner(before string) {
	tr.t.Helper()
	pid := tr.show("vm@1.service", "MainPID")
	if all := tr.qemus("web1"); len(all) != 1 || all[0] != pid || pid == before {
		tr.t.Errorf("QEMU is %v, the unit's process %s, before %s", all, pid, before)
	}
	for property, want := range map[string]string{"Restart": "always", "DropInPaths": "", "NeedDaemonReload": "no", "ActiveState": "active"} {
		if got := tr.show("vm@1.service", property); got != want {
			tr.t.Errorf("%s is %q, want %q", property, got, want)
		}
	}
}

func (tr *tree) restoresInTransientUnit() {
	tr.t.Helper()
	tr.run(tr.vmsnap("snapshot", "create", "db", "one", "--memory")...)
	tr.run(tr.vmsnap("snapshot", "restore", "db/one", "--memory")...)
	tr.inState("db", "running")
	all := tr.qemus("db")
	if len(all) != 1 {
		tr.t.Fatalf("QEMU is %v", all)
	}
	group := tr.run("cat", "/proc/"+all[0]+"/cgroup")
	if !strings.Contains(group, "/tenant.slice/vmsnap-") || !strings.HasSuffix(group, ".service") {
		tr.t.Errorf("its control group is %s", group)
	}
	status := tr.run("cat", "/proc/"+all[0]+"/status")
	for _, want := range []string{"Uid:\t4711\t4711", "Gid:\t4712\t4712"} {
		if !strings.Contains(status, want) {
			tr.t.Errorf("%q is not in %s", want, status)
		}
	}
	if !strings.Contains(status, " 4713") && !strings.Contains(status, "\t4713") {
		tr.t.Errorf("its groups are not those that it had: %s", status)
	}
	// From a transient unit of ours to another one.
	tr.run(tr.vmsnap("snapshot", "restore", "db/one", "--memory", "--no-safety-snapshot")...)
	tr.inState("db", "running")
	if again := tr.qemus("db"); len(again) != 1 || again[0] == all[0] {
		tr.t.Errorf("QEMU is %v, was %v", again, all)
	}
}

// killedInLaunch kills the daemon when the VM's unit has another command: the next
// one brings the state before back, through the same unit.
func (tr *tree) killedInLaunch() {
	tr.t.Helper()
	before := tr.show("vm@1.service", "MainPID")
	id := tr.run(tr.vmsnap("snapshot", "restore", "web1/one", "--memory", "--detach", "-o", "name")...)
	tr.sh(`while ! grep -qs incoming /run/systemd/system/vm@1.service.d/*.conf; do :; done; systemctl kill --signal=KILL vmsnapd-test`)
	tr.eventually(changeDeadline, "the daemon is gone", func() error {
		if out, err := tr.try("systemctl", "is-active", "vmsnapd-test"); err == nil {
			return fmt.Errorf("it is %s", out)
		}
		return nil
	})
	tr.startDaemon()
	out, _ := tr.try(tr.vmsnap("operation", "watch", id)...) // fails if it was taken back
	tr.inState("web1", "running")
	tr.t.Logf("the operation: %s", out)
	tr.asItsOwner(before)
	if files, err := filepath.Glob(tr.dir + "/web/.vmsnap/*.mem"); err != nil || len(files) > 3 {
		tr.t.Errorf("memory files %v, %v", files, err)
	}
}

// deniedBySystemd runs the daemon as a user whom systemd lets do nothing: the VM is
// not touched.
func (tr *tree) deniedBySystemd() {
	tr.t.Helper()
	tr.sh("systemctl stop vmsnapd-test; useradd --system vmsnap; chown -R vmsnap " + tr.dir + "/state; chmod 777 " + tr.dir)
	tr.startDaemon("-p", "User=vmsnap", "-p", "AmbientCapabilities=CAP_SYS_PTRACE CAP_DAC_OVERRIDE CAP_CHOWN CAP_FOWNER CAP_LINUX_IMMUTABLE CAP_NET_ADMIN CAP_SYS_NICE")
	before := tr.qemus("web1")
	tr.fails("systemd does not allow it", tr.vmsnap("snapshot", "restore", "web1/one", "--memory")...)
	if after := tr.qemus("web1"); strings.Join(after, " ") != strings.Join(before, " ") {
		tr.t.Errorf("QEMU is %v, was %v", after, before)
	}
	tr.inState("web1", "running")
}
