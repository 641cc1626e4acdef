package packaging

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// host is a tree with the package, and a guest that writes all the time.
type host struct {
	*tree
	guest   *testvm.Guest
	writers *testvm.Writers
	qemu    string // the pid of the guest's QEMU in the tree
}

// TestQEMUDebianPackage is the life of the Debian package on a host, from its
// installation to its purge, with a VM that runs through all of it.
func TestQEMUDebianPackage(t *testing.T) {
	h := &host{tree: boot(t, packages(t))}
	before := h.files()
	h.install()
	h.startGuest()
	h.snapshot("installed")
	h.apart()
	for _, step := range []struct {
		name string
		run  func(*host)
	}{
		{"journal", (*host).journal},
		{"credentials", (*host).credentials},
		{"reload", (*host).reload},
		{"roles", (*host).roles},
		{"each capability", (*host).eachCapability},
		{"without capabilities", (*host).withoutCapabilities},
		{"killed", (*host).killed},
		{"hangs", (*host).hangs},
		{"upgrade", (*host).upgrade},
		{"stopped", (*host).stopped},
		{"removed", (*host).removed},
	} {
		t.Run(step.name, func(t *testing.T) {
			h.t = t
			step.run(h)
			h.undisturbed()
		})
	}
	h.t = t
	if !t.Failed() {
		h.purged(before)
	}
}

// files are all files of the tree but for logs and caches and the like, and its
// users and groups.
func (h *host) files() map[string]bool {
	h.t.Helper()
	list := h.sh(`find / -xdev \( -path '/etc/*-' -o -path /var/log -o -path /var/lib/dpkg -o -path /var/cache -o -path /var/lib/systemd -o -path /tmp -o -path /var/tmp \) -prune \
		-o -printf '%p %M %u %g\n'; getent passwd; getent group`)
	all := map[string]bool{}
	for line := range strings.Lines(list) {
		all[line] = true
	}
	return all
}

// documented runs what docs/install.md says under a heading, where the packages
// of a version are.
func (h *host) documented(heading, version string) {
	h.t.Helper()
	text, err := os.ReadFile("../docs/install.md")
	if err != nil {
		h.t.Fatal(err)
	}
	_, section, found := strings.Cut(string(text), "## "+heading+"\n")
	section, _, _ = strings.Cut(section, "\n## ")
	if !found || !strings.Contains(section, "```sh\n") {
		h.t.Fatalf("docs/install.md has no commands under %q", heading)
	}
	for i, block := range strings.Split(section, "```sh\n") {
		if script, _, _ := strings.Cut(block, "```"); i > 0 {
			h.sh("cd /packages/" + version + "\n" + script)
		}
	}
}

func (h *host) install() {
	h.t.Helper()
	h.documented("On Debian", version1)
	for _, unit := range []string{"vmsnapd.service", "vmsnapd.socket"} {
		if enabled, active := h.run("systemctl", "is-enabled", unit), h.run("systemctl", "is-active", unit); enabled != "enabled" || active != "active" {
			h.t.Errorf("%s is %s and %s", unit, enabled, active)
		}
	}
	for path, want := range map[string]string{
		"/run/vmsnap/vmsnapd.sock": "660 vmsnap vmsnap", "/run/vmsnap": "755 vmsnap vmsnap", "/var/lib/vmsnap": "700 vmsnap vmsnap",
		"/etc/vmsnap/vms.d": "755 root root", "/etc/vmsnap/vmsnapd.yaml": "644 root root",
	} {
		if got := h.run("stat", "--format=%a %U %G", path); got != want {
			h.t.Errorf("%s is %s, want %s", path, got, want)
		}
	}
	h.run("getent", "group", "vmsnap-operator", "vmsnap-admin")
	// Capabilities are those of the unit, and no more: their bits in capability.h.
	const wanted = 1<<0 /* CHOWN */ | 1<<1 /* DAC_OVERRIDE */ | 1<<3 /* FOWNER */ | 1<<9 /* LINUX_IMMUTABLE */ |
		1<<12 /* NET_ADMIN */ | 1<<19 /* SYS_PTRACE */ | 1<<23 /* SYS_NICE */
	status := h.run("cat", "/proc/"+h.daemon()+"/status")
	for _, want := range []string{fmt.Sprintf("CapEff:\t%016x", wanted), fmt.Sprintf("CapBnd:\t%016x", wanted), "NoNewPrivs:\t1"} {
		if !strings.Contains(status, want) {
			h.t.Errorf("%q is not in\n%s", want, status)
		}
	}
	if uid := h.run("stat", "--format=%U", "/proc/"+h.daemon()); uid != "vmsnap" {
		h.t.Errorf("vmsnapd runs as %s", uid)
	}
	if out := h.run("vmsnap", "version"); strings.Count(out, version1) != 2 {
		h.t.Errorf("vmsnap version: %s", out)
	}
	h.run("bash", "-n", "/usr/share/bash-completion/completions/vmsnap")
}

// daemon is the daemon's pid in the tree.
func (h *host) daemon() string {
	h.t.Helper()
	return h.show("vmsnapd.service", "MainPID")
}

// startGuest starts a guest in a transient unit of the tree. Its files belong to
// another user than the daemon's.
func (h *host) startGuest() {
	h.t.Helper()
	versions, err := testvm.Versions()
	if err != nil {
		h.t.Fatal(err)
	}
	q := versions[0] // the release's, which is installed in the tree
	start := append(h.enter(), "systemd-run", "--quiet", "--wait", "--collect", "--unit=web", "--slice=machine", q.Binary)
	q.Binary, q.Args = start[0], append(start[1:], q.Args...)
	h.guest = testvm.Start(h.t, testvm.Config{QEMU: q, Name: "web", Dir: filepath.Join(h.dir, "web")})
	h.t.Cleanup(func() {
		_, _ = h.try("systemctl", "kill", "--signal=KILL", "web") // fails when the test has ended it
		_ = h.guest.Wait(context.Background())
	})
	h.qemu = h.show("web.service", "MainPID")
	if h.writers, err = h.guest.StartWriters(h.t.Context()); err != nil {
		h.t.Fatal(err)
	}
	h.await()
}

// apart has a VM whose files the unit hides from the daemon (PrivateTmp=), which
// reaches them through the process.
func (h *host) apart() {
	h.t.Helper()
	h.sh(`mkdir /tmp/apart && qemu-img create -q -f qcow2 /tmp/apart/root.qcow2 8M &&
		systemd-run --quiet --collect --unit=apart qemu-system-x86_64 -S -name apart -nodefaults -display none -machine pc,accel=tcg -m 16 \
		-qmp unix:/tmp/apart/qmp,server=on,wait=off -drive file=/tmp/apart/root.qcow2,if=none,id=d,format=qcow2 -device virtio-blk-pci,id=root,drive=d`)
	h.eventually(changeDeadline, "the VM in /tmp is known", func() error {
		out, err := h.try("vmsnap", "vm", "show", "apart", "-o", "json")
		if err != nil || !strings.Contains(out, `"state": "paused"`) || !strings.Contains(out, "other-mount-namespace") {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	h.run("vmsnap", "snapshot", "create", "apart", "s", "--quiesce", "none")
	h.sh(`test "$(ls /tmp/apart/*.qcow2 | wc -l)" = 3; systemctl stop apart; chattr -i /tmp/apart/*.qcow2; rm -r /tmp/apart`)
}

// await waits until the daemon knows the guest, with its agent.
func (h *host) await() {
	h.t.Helper()
	h.eventually(changeDeadline, "the VM is known", func() error {
		out, err := h.try("vmsnap", "vm", "show", "web", "-o", "json")
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		var vm struct {
			State string `json:"state"`
			Agent struct {
				Presence string `json:"presence"`
			} `json:"guest_agent"`
			Problems []any `json:"problems"`
		}
		if err := json.Unmarshal([]byte(out), &vm); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		if vm.State != "running" || vm.Agent.Presence != "connected" || len(vm.Problems) != 0 {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
}

// undisturbed fails unless the guest's QEMU is the one that was started, and the
// guest writes on.
func (h *host) undisturbed() {
	h.t.Helper()
	if pid := h.show("web.service", "MainPID"); pid != h.qemu {
		h.t.Fatalf("the VM's QEMU is process %s, and was %s", pid, h.qemu)
	}
	ctx, cancel := context.WithTimeout(context.Background(), changeDeadline)
	defer cancel()
	if err := h.writers.AwaitWrites(ctx, 3); err != nil {
		h.t.Fatalf("the guest does not write any more: %v", err)
	}
}

// snapshot takes a snapshot that must be consistent.
func (h *host) snapshot(name string) {
	h.t.Helper()
	out := h.run("vmsnap", "snapshot", "create", "web", name, "--quiesce", "require")
	if !strings.Contains(out, "filesystem consistent") || !strings.Contains(out, "2 of 2") {
		h.t.Errorf("snapshot: %s", out)
	}
	immutable := 0
	for _, f := range h.images() {
		if attributes := strings.Fields(output(h.t, "lsattr", f))[0]; strings.Contains(attributes, "i") {
			immutable++
		}
	}
	if immutable < 2 {
		h.t.Errorf("%d covered layers are immutable, among %v", immutable, h.images())
	}
}

// images are the guest's image files.
func (h *host) images() []string {
	h.t.Helper()
	files, err := filepath.Glob(filepath.Join(h.guest.Dir, "*.qcow2"))
	if err != nil {
		h.t.Fatal(err)
	}
	return files
}

// journal looks for what was done by its fields.
func (h *host) journal() {
	out := h.run("journalctl", "--no-pager", "-o", "json", "_SYSTEMD_UNIT=vmsnapd.service", "VMSNAP_VM=web", "--output-fields=MESSAGE,PRIORITY,VMSNAP_OPERATION,VMSNAP_LOGGER")
	var operation string
	for line := range strings.Lines(out) {
		var entry map[string]string
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			h.t.Fatalf("%v: %s", err, line)
		}
		if !strings.HasPrefix(entry["VMSNAP_LOGGER"], "vmsnapd") || entry["PRIORITY"] == "" {
			h.t.Errorf("entry %v", entry)
		}
		if id := entry["VMSNAP_OPERATION"]; id != "" {
			operation = id
		}
	}
	if operation == "" {
		h.t.Fatalf("no operation in the entries of VM web:\n%s", out)
	}
	h.run("vmsnap", "operation", "show", operation)
}

// answer asks for the metrics, with further headers, and returns the status.
func (h *host) answer(headers string) string {
	h.t.Helper()
	var status string
	h.eventually(changeDeadline, "the metrics are served", func() (err error) {
		const ask = `exec 3<>/dev/tcp/127.0.0.1/9777; printf 'GET /metrics HTTP/1.0\r\n%s\r\n' "$1" >&3; head -n 1 <&3`
		status, err = h.try("bash", "-euc", ask, "bash", headers)
		return err
	})
	return status
}

// credentials hands a password for the metrics over, which only systemd and the
// daemon read.
func (h *host) credentials() {
	if got := h.answer(""); !strings.Contains(got, "200 OK") {
		h.t.Fatalf("metrics when none is set: %s", got)
	}
	hash, err := bcrypt.GenerateFromPassword([]byte("secret"), bcrypt.MinCost)
	if err != nil {
		h.t.Fatal(err)
	}
	h.write("/etc/credstore/vmsnap.metrics", fmt.Sprintf("basic_auth_users:\n  prometheus: %s\n", hash))
	h.run("chmod", "600", "/etc/credstore/vmsnap.metrics")
	h.run("systemctl", "restart", "vmsnapd")
	if got := h.answer(""); !strings.Contains(got, "401 Unauthorized") {
		h.t.Errorf("metrics without the password: %s", got)
	}
	password := base64.StdEncoding.EncodeToString([]byte("prometheus:secret"))
	if got := h.answer("Authorization: Basic " + password + "\r\n"); !strings.Contains(got, "200 OK") {
		h.t.Errorf("metrics with the password: %s", got)
	}
	h.run("rm", "-r", "/etc/credstore")
	h.run("systemctl", "restart", "vmsnapd")
	h.await()
}

// reload changes the log level, and something that cannot be reloaded.
func (h *host) reload() {
	pid := h.daemon()
	h.write("/etc/vmsnap/vmsnapd.yaml", "viewers: [vmsnap]\noperators: [vmsnap-operator]\nadmins: [vmsnap-admin]\nlog-level: debug\nscan-only: true\n")
	h.run("systemctl", "reload", "vmsnapd")
	h.eventually(changeDeadline, "it was reloaded", func() error {
		out := h.run("journalctl", "--no-pager", "-o", "cat", "_PID="+pid)
		for _, want := range []string{"reloaded: log_level=debug", "started again: setting=scan-only"} {
			if !strings.Contains(out, want) {
				return fmt.Errorf("%q is not in\n%s", want, out)
			}
		}
		return nil
	})
	if h.daemon() != pid {
		h.t.Error("a reload is a restart")
	}
}

// roles has users of the groups call.
func (h *host) roles() {
	h.documented("Who may call", version1) // alice is an operator
	h.sh(`useradd --groups vmsnap bob; useradd carol`)
	as := func(user string, args ...string) []string {
		return append([]string{"setpriv", "--reuid=" + user, "--regid=" + user, "--init-groups", "vmsnap"}, args...)
	}
	h.fails("may not be opened", as("carol", "vm", "list")...)
	h.run(as("bob", "vm", "list")...)
	h.fails("operator", as("bob", "snapshot", "create", "web", "denied")...)
	h.run(as("alice", "snapshot", "create", "web", "allowed")...)
	h.sh(`userdel alice; userdel bob; userdel carol`)
}

// eachCapability takes them away one by one, and shows what does not work then
// with a QEMU of another user. Two do not show here: process events are not to
// be had in a tree, and huge pages are for snapshots with memory.
func (h *host) eachCapability() {
	h.sh(`useradd --system images; chmod 711 ` + h.dir + `; mkdir -m 700 ` + h.dir + `/other; cd ` + h.dir + `/other; qemu-img create -q -f qcow2 root.qcow2 8M; chmod 600 root.qcow2
		chown -R images:images .
		systemd-run --quiet --collect --unit=other --property=User=images qemu-system-x86_64 -S -name other -nodefaults -display none -machine pc,accel=tcg -m 16 \
		-qmp unix:$PWD/qmp,server=on,wait=off -drive file=$PWD/root.qcow2,if=none,id=d,format=qcow2 -device virtio-blk-pci,id=root,drive=d`)
	snapshot := func(words string) {
		h.t.Helper()
		h.eventually(changeDeadline, "a snapshot says "+words, func() error {
			if out, err := h.try("vmsnap", "snapshot", "create", "other", "--quiesce", "none"); !strings.Contains(out, words) {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
	}
	snapshot("taken")
	for _, c := range []struct{ name, words string }{
		{"CAP_SYS_PTRACE", "image is in use by another process"},
		{"CAP_DAC_OVERRIDE", "permission denied"},
		{"CAP_CHOWN", "operation not permitted"},
		{"CAP_FOWNER", "operation not permitted"},
		{"CAP_LINUX_IMMUTABLE", "immutable-flag-unavailable"},
	} {
		h.write("/run/systemd/system/vmsnapd.service.d/without.conf", "[Service]\nAmbientCapabilities=~"+c.name+"\nCapabilityBoundingSet=~"+c.name+"\n")
		h.sh("systemctl daemon-reload; systemctl restart vmsnapd")
		snapshot(c.words)
	}
	h.sh("rm -r /run/systemd/system/vmsnapd.service.d; systemctl daemon-reload; systemctl restart vmsnapd; systemctl stop other; userdel images")
	h.await()
}

// withoutCapabilities runs the daemon as a user like any other, and back.
func (h *host) withoutCapabilities() {
	h.documented("What the agent may do", version1)
	h.await()
}

// freeze freezes the guest for longer than this test takes.
func (h *host) freeze() {
	h.t.Helper()
	h.run("vmsnap", "freeze", "web", "--lease", "9m")
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := h.writers.AwaitWrites(ctx, 2); err == nil {
		h.t.Fatal("the guest writes although it is frozen")
	}
}

// restarted waits for another daemon than the one that was, and its answer.
func (h *host) restarted(old string) {
	h.t.Helper()
	h.eventually(changeDeadline, "the daemon was restarted", func() error {
		if pid := h.daemon(); pid == old || pid == "0" {
			return fmt.Errorf("its pid is %s", pid)
		}
		return nil
	})
	h.await()
}

// killed has the daemon die while the guest is frozen.
func (h *host) killed() {
	pid := h.daemon()
	h.freeze()
	h.run("kill", "-KILL", pid)
	h.undisturbed()
	h.restarted(pid)
	h.snapshot("after-kill")
}

// hangs has the daemon stop to answer while the guest is frozen, with a watchdog
// that is quicker than ours.
func (h *host) hangs() {
	h.write("/run/systemd/system/vmsnapd.service.d/quick.conf", "[Service]\nWatchdogSec=3\n")
	h.run("systemctl", "daemon-reload")
	h.run("systemctl", "restart", "vmsnapd")
	h.await()
	pid := h.daemon()
	// It is alive for longer than the watchdog's time without a word from us.
	<-time.After(5 * time.Second)
	if now := h.daemon(); now != pid {
		h.t.Fatalf("a daemon that is well was restarted")
	}
	h.freeze()
	h.run("kill", "-STOP", pid)
	h.restarted(pid)
	h.undisturbed()
	if out := h.run("journalctl", "--no-pager", "-o", "cat", "-u", "vmsnapd"); !strings.Contains(out, "Watchdog timeout") {
		h.t.Errorf("it was not the watchdog:\n%s", out)
	}
	h.run("rm", "-r", "/run/systemd/system/vmsnapd.service.d")
	h.run("systemctl", "daemon-reload")
	h.run("systemctl", "restart", "vmsnapd")
	h.await()
}

// upgrade installs the next version over a configuration that was changed.
func (h *host) upgrade() {
	config := h.run("cat", "/etc/vmsnap/vmsnapd.yaml")
	pid := h.daemon()
	h.documented("Upgrade", version2)
	h.restarted(pid)
	if got := h.run("cat", "/etc/vmsnap/vmsnapd.yaml"); got != config {
		h.t.Errorf("the configuration was changed to\n%s", got)
	}
	if out := h.run("vmsnap", "version"); strings.Count(out, version2) != 2 {
		h.t.Errorf("vmsnap version: %s", out)
	}
	if out := h.run("vmsnap", "snapshot", "list", "web", "-o", "name"); !strings.Contains(out, "web/installed") {
		h.t.Errorf("snapshots: %s", out)
	}
	h.snapshot("upgraded")

	// Who does not want the daemon to run is not overruled.
	h.run("systemctl", "disable", "--now", "vmsnapd.service", "vmsnapd.socket")
	h.sh("dpkg --install /packages/" + version2 + "/vmsnap_*.deb")
	if out, _ := h.try("systemctl", "is-enabled", "vmsnapd.service"); strings.TrimSpace(out) != "disabled" {
		h.t.Errorf("after an upgrade a disabled daemon is %s", out)
	}
	h.run("systemctl", "enable", "--now", "vmsnapd.socket", "vmsnapd.service")
	h.await()
}

// stopped stops the daemon while the guest is frozen.
func (h *host) stopped() {
	h.freeze()
	h.run("systemctl", "stop", "vmsnapd.socket", "vmsnapd.service")
	h.undisturbed()
	if result := h.show("vmsnapd.service", "Result"); result != "success" {
		h.t.Errorf("it stopped with the result %s", result)
	}
	h.fails("cannot be reached", "vmsnap", "vm", "list")
	// Whoever connects starts it.
	h.run("systemctl", "start", "vmsnapd.socket")
	h.run("vmsnap", "vm", "list")
	h.await()
}

func (h *host) removed() {
	h.run("dpkg", "--remove", "vmsnap")
	for _, unit := range []string{"vmsnapd.service", "vmsnapd.socket"} {
		if out, err := h.try("systemctl", "is-active", unit); err == nil {
			h.t.Errorf("%s is %s", unit, out)
		}
	}
	if out, err := h.try("pgrep", "vmsnapd"); err == nil {
		h.t.Errorf("processes %s are left", out)
	}
	h.run("test", "-e", "/etc/vmsnap/vmsnapd.yaml", "-a", "-e", "/var/lib/vmsnap/catalog.db")
	// Installed again, it knows what it knew.
	h.documented("On Debian", version2)
	h.await()
	if out := h.run("vmsnap", "snapshot", "list", "web", "-o", "name"); !strings.Contains(out, "web/installed") {
		h.t.Errorf("snapshots: %s", out)
	}
}

// purged leaves nothing but the VM, and its files are whole.
func (h *host) purged(before map[string]bool) {
	h.t.Helper()
	h.documented("Remove", version2)
	h.undisturbed()
	for line := range h.files() {
		if !before[line] && !strings.HasPrefix(line, h.dir) {
			h.t.Errorf("left behind: %s", line)
		}
	}
	if err := h.writers.Stop(h.t.Context()); err != nil {
		h.t.Error(err)
	}
	h.run("systemctl", "stop", "web")
	for _, f := range h.images() {
		out, err := exec.Command("qemu-img", "check", "-f", "qcow2", f).CombinedOutput()
		if err != nil {
			h.t.Errorf("qemu-img check %s: %v\n%s", f, err, out)
		}
	}
	manifests, err := os.ReadDir(filepath.Join(h.guest.Dir, ".vmsnap"))
	if err != nil || len(manifests) == 0 {
		h.t.Errorf("manifests: %s, %v", strconv.Itoa(len(manifests)), err)
	}
}
