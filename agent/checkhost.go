package agent

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// HostState is how far something works on a host.
type HostState string

// The states of a HostCheck.
const (
	HostWorks   HostState = "works"
	HostLimited HostState = "limited" // snapshots are taken, and something is lost
	HostBroken  HostState = "broken"  // some VM or all cannot be snapshotted
)

// HostCheck is what the doctor says of one thing that the agent needs of its
// host.
type HostCheck struct {
	Code          string // one of those in docs/doctor.md
	State         HostState
	Message, Hint string
}

// The codes of what is checked.
const (
	hostKernel         = "kernel"
	hostQEMU           = "qemu"
	hostQEMUImg        = "qemu-img"
	hostProcessEvents  = "process-events"
	hostOtherUsers     = "vms-of-others"
	hostImmutableFlag  = "immutable-flag"
	hostHugePages      = "huge-pages"
	hostWriteTracking  = "write-tracking"
	hostMemoryKey      = "memory-key"
	hostStateDirectory = "state-directory"
	hostSockets        = "vm-sockets"
	hostStorage        = "storage"
)

// hostFacts are what the checks look at.
type hostFacts struct {
	release      string
	capabilities uint64 // effective
	uid          int
	userFaults   bool // vm.unprivileged_userfaultfd
	find         func(program string) (string, error)
	stateDir     string
	room         func(dir string) (hostRoom, error)
	discovery    Discovery
	vms          []VMView
	owners       map[int]int // uids of QEMU processes, by pid
	recipient    string      // whom memory is encrypted to; "" when it is not
	keyError     *fault.Error
}

// hostRoom is the file system of a directory.
type hostRoom struct {
	Free  uint64
	Kind  string // ext4, xfs, …; "" for one that this program has no name for
	Flags bool   // it has immutable flags
}

// CheckHost looks at what the agent needs of its host: the kernel, the programs,
// its own rights, the VMs' sockets, and the file systems. It changes nothing.
func (a *Agent) CheckHost(ctx context.Context) ([]HostCheck, error) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return nil, fault.New(fault.Failed, "the kernel's version: %w", err)
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return nil, fault.New(fault.Failed, "the rights of vmsnapd: %w", err)
	}
	faults, err := os.ReadFile("/proc/sys/vm/unprivileged_userfaultfd")
	f := hostFacts{
		release: unix.ByteSliceToString(uts.Release[:]), capabilities: effective(string(status)), uid: os.Geteuid(),
		userFaults: err == nil && strings.TrimSpace(string(faults)) == "1", find: exec.LookPath, stateDir: a.cfg.StateDir,
		room: roomOf, owners: a.owners(),
	}
	f.recipient, f.keyError = a.memoryRecipient()
	f.vms, f.discovery = a.VMs(ctx)
	ctx, cancel := context.WithTimeout(ctx, hostPatience)
	defer cancel()
	return fencedChecks(ctx, f)
}

// hostPatience is how long file systems may take to answer.
const hostPatience = 10 * time.Second

// fencedChecks is check within ctx: a file system that hangs is named by the
// caller's deadline, and left behind.
func fencedChecks(ctx context.Context, f hostFacts) ([]HostCheck, error) {
	answer := make(chan []HostCheck, 1)
	go func() { answer <- f.check() }()
	select {
	case checks := <-answer:
		return checks, nil
	case <-ctx.Done():
		return nil, fault.New(fault.Unresponsive, "the host is not looked at to its end: %w", context.Cause(ctx)).
			WithHint("a file system that holds layers hangs: stat each directory that vmsnap vm show names")
	}
}

// owners returns the users of the QEMU processes, by pid.
func (a *Agent) owners() map[int]int {
	a.mu.RLock()
	defer a.mu.RUnlock()
	all := map[int]int{}
	for _, v := range a.vms {
		v.mu.Lock()
		for _, r := range v.runs {
			all[r.proc.PID] = r.proc.UID
		}
		v.mu.Unlock()
	}
	return all
}

// effective reads the effective capabilities in a /proc/PID/status.
func effective(status string) uint64 {
	for line := range strings.Lines(status) {
		if value, ok := strings.CutPrefix(line, "CapEff:"); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
			if err == nil {
				return n
			}
		}
	}
	return 0
}

// has reports whether the agent holds all these capabilities.
func (f hostFacts) has(capabilities ...int) bool {
	for _, c := range capabilities {
		if f.capabilities&(1<<c) == 0 {
			return false
		}
	}
	return true
}

// hintCapabilities is for what the unit without capabilities cannot do.
const hintCapabilities = "run vmsnapd with the unit as it is packaged: remove unprivileged.conf from /etc/systemd/system/vmsnapd.service.d"

// check looks at everything.
func (f hostFacts) check() []HostCheck {
	checks := []HostCheck{
		f.kernel(), f.qemu(), f.qemuImg(), f.processEvents(), f.otherUsers(), f.immutableFlag(), f.hugePages(), f.writeTracking(),
		f.memoryKey(), f.stateDirectory(),
	}
	return append(append(checks, f.sockets()...), f.storage()...)
}

func works(code, format string, args ...any) HostCheck {
	return HostCheck{Code: code, State: HostWorks, Message: fmt.Sprintf(format, args...)}
}

// atLeast reports whether the kernel is of a version or newer.
func (f hostFacts) atLeast(major, minor int) bool {
	var has [2]int
	if _, err := fmt.Sscanf(f.release, "%d.%d", &has[0], &has[1]); err != nil {
		return false
	}
	return has[0] > major || has[0] == major && has[1] >= minor
}

func (f hostFacts) kernel() HostCheck {
	switch {
	case !f.atLeast(5, 10):
		return HostCheck{hostKernel, HostBroken, "Linux " + f.release + " is older than 5.10, the oldest that vmsnapd is made for", "install a newer kernel"}
	case !f.atLeast(6, 1):
		return HostCheck{hostKernel, HostLimited, "Linux " + f.release + " cannot put a guest's huge pages back after a snapshot with memory, which takes 6.1: the guest is slower from then on",
			"install a kernel of 6.1 or newer, where memory is saved"}
	}
	return works(hostKernel, "Linux %s", f.release)
}

// programs under which distributions install QEMU.
var qemuPrograms = []string{"qemu-system-x86_64", "qemu-kvm", "kvm", "/usr/libexec/qemu-kvm"}

func (f hostFacts) qemu() HostCheck {
	var old []string
	running := 0
	for _, vm := range f.vms {
		if vm.Process == nil {
			continue
		}
		running++
		if v := vm.Process.QEMUVersion; v != "" && !supportedQEMU(v) {
			old = append(old, vm.Name+" ("+v+")")
		}
	}
	if len(old) > 0 {
		return HostCheck{hostQEMU, HostBroken, "these VMs run on a QEMU that is older than 7.2: " + strings.Join(old, ", "), "start them with QEMU 7.2 or newer"}
	}
	if running > 0 {
		return works(hostQEMU, "%d QEMU processes run", running)
	}
	for _, p := range qemuPrograms {
		if path, err := f.find(p); err == nil {
			return works(hostQEMU, "%s is there, and no VM runs", path)
		}
	}
	return HostCheck{hostQEMU, HostLimited, "no VM runs, and no QEMU was found: " + strings.Join(qemuPrograms, ", "),
		"install QEMU (Debian: apt install qemu-system-x86); how to start a VM is in docs/connecting-qemu.md"}
}

func supportedQEMU(version string) bool {
	var major, minor int
	if _, err := fmt.Sscanf(version, "%d.%d", &major, &minor); err != nil {
		return true // a version that nobody can read is not called old
	}
	return major > 7 || major == 7 && minor >= 2
}

func (f hostFacts) qemuImg() HostCheck {
	path, err := f.find("qemu-img")
	if err != nil {
		return HostCheck{hostQEMUImg, HostBroken, "qemu-img is not found: no snapshot can be taken, restored, exported or cloned",
			"install it (Debian: apt install qemu-utils)"}
	}
	return works(hostQEMUImg, "%s", path)
}

func (f hostFacts) processEvents() HostCheck {
	if f.discovery.Source == "scan" {
		hint := "on kernels before 6.6 this takes CAP_NET_ADMIN, and on all of them the host's own network and process namespace; " + hintCapabilities
		return HostCheck{hostProcessEvents, HostLimited, "the start and the end of VMs are noticed with a delay of seconds: " + cmp.Or(f.discovery.Reason, "the host is scanned"), hint}
	}
	return works(hostProcessEvents, "the kernel tells of the start and the end of VMs")
}

func (f hostFacts) otherUsers() HostCheck {
	if f.uid == 0 || f.has(unix.CAP_SYS_PTRACE, unix.CAP_DAC_OVERRIDE, unix.CAP_CHOWN, unix.CAP_FOWNER) {
		return works(hostOtherUsers, "VMs of all users can be reached")
	}
	var others []string
	for _, vm := range f.vms {
		if vm.Process == nil {
			continue
		}
		if uid, known := f.owners[vm.Process.PID]; known && uid != f.uid {
			others = append(others, vm.Name)
		}
	}
	hint := fmt.Sprintf("run all QEMUs as the user of vmsnapd (uid %d), or %s", f.uid, hintCapabilities)
	if len(others) > 0 {
		return HostCheck{hostOtherUsers, HostBroken, "vmsnapd has no capabilities, and these VMs run as other users: " + strings.Join(slices.Compact(others), ", "), hint}
	}
	return HostCheck{hostOtherUsers, HostLimited, "vmsnapd has no capabilities: only VMs of its own user can be snapshotted", hint}
}

func (f hostFacts) immutableFlag() HostCheck {
	if f.has(unix.CAP_LINUX_IMMUTABLE) {
		return works(hostImmutableFlag, "covered layers are protected by the immutable flag, where the file system has it")
	}
	return HostCheck{hostImmutableFlag, HostLimited, "vmsnapd may not set the immutable flag (CAP_LINUX_IMMUTABLE): covered layers are protected by their mode alone", hintCapabilities}
}

func (f hostFacts) hugePages() HostCheck {
	if f.has(unix.CAP_SYS_PTRACE, unix.CAP_SYS_NICE) {
		return works(hostHugePages, "a guest's huge pages are put back after a snapshot with memory")
	}
	return HostCheck{hostHugePages, HostLimited, "vmsnapd may not put a guest's huge pages back (CAP_SYS_PTRACE, CAP_SYS_NICE): after a snapshot with memory the guest is slower", hintCapabilities}
}

func (f hostFacts) writeTracking() HostCheck {
	if f.userFaults {
		return works(hostWriteTracking, "every QEMU can track writes to its guest's memory")
	}
	var without []string
	for _, vm := range f.vms {
		if vm.Process == nil {
			continue
		}
		if uid, known := f.owners[vm.Process.PID]; known && uid != 0 {
			without = append(without, vm.Name)
		}
	}
	if len(without) == 0 {
		return works(hostWriteTracking, "QEMUs that run as root can track writes to their guests' memory")
	}
	return HostCheck{hostWriteTracking, HostLimited,
		"the kernel lets only root track writes to a guest's memory, so that with memory these VMs stand still for longer: " + strings.Join(slices.Compact(without), ", "),
		"sysctl vm.unprivileged_userfaultfd=1, kept in /etc/sysctl.d"}
}
