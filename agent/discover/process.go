package discover

import (
	"errors"
	"time"
)

// ErrGone is returned for a process that has exited, or whose pid now belongs
// to another process.
var ErrGone = errors.New("process is gone")

// ErrNotQEMU is returned for a process that is not a QEMU running a VM.
var ErrNotQEMU = errors.New("not a QEMU that runs a VM")

// Process is a QEMU process as its command line and /proc describe it: a copy,
// safe to keep. Paths are as QEMU sees them; Process.HostPath and
// Process.Address give what this process must open instead.
type Process struct {
	PID       int
	StartTime uint64    // clock ticks since boot, field 22 of /proc/PID/stat
	Started   time.Time // the same as wall-clock time, to 10 ms
	Binary    string    // the executable's path, in the process's mount namespace
	Args      []string
	UID       int    // effective
	GID       int    // effective
	Groups    []int  // supplementary
	Cwd       string // what relative paths of the command line start from; "" when unknown

	Name string // -name guest=; "" when not given
	UUID string // -uuid or -smbios type=1,uuid=, lower case; "" when not given

	QMP              []Socket // every QMP monitor that is a unix socket server, in command-line order
	GuestAgent       Socket   // behind the port named org.qemu.guest_agent.0; zero when there is none
	GuestAgentDevice string   // that port's id, as VSERPORT_CHANGE reports it
	Drives           []Drive  // what the launch command opens, in command-line order

	Machine     string // -machine type, as given; "" when not given
	CPU         string // -cpu, as given
	MemoryBytes uint64 // -m, in bytes; 0 when not given
	Incoming    string // -incoming; "" when not given
	PIDFile     string // -pidfile
	NoReboot    bool   // a guest's reboot ends QEMU
	NoShutdown  bool   // a guest's shutdown does not end QEMU
	StartPaused bool   // -S
	Daemonized  bool   // -daemonize
	SpawnDenied bool   // -sandbox spawn=deny: QEMU is killed when it forks

	Root            string // "/proc/PID/root" when the process has its own file system tree, else ""
	Cgroup          Cgroup
	Libvirt         bool     // managed by libvirt
	LibvirtEvidence string   // how that is known
	Stopped         bool     // by a signal or a debugger, when it was inspected
	Overrides       []string // the override files applied

	OverlayDir  string            `json:",omitempty"` // where the overlays of its disks are to be made; "" when no file says
	OverlayDirs map[string]string `json:",omitempty"` // the same for single disks, by device

	Notes []string // what could not be told from outside, for an operator

	question bool // the command only prints something and exits
	chroot   bool // QEMU changed its root by itself, after opening its files
}

// Socket is a unix socket that QEMU listens on.
type Socket struct {
	Path     string // "" means that there is none
	Abstract bool   // Path is a name in the abstract namespace
	Loose    bool   // abstract, and padded with zeros to the full length (tight=off)
	Chardev  string // the chardev's id; "" for -qmp unix:…
}

// Drive is one block device of the launch command.
type Drive struct {
	ID        string // of -drive, given or as QEMU makes it up; "" with -blockdev, or when QEMU's choice is unknown
	Node      string // node name of the root node; "" when not given
	Device    string // qdev id of the device that uses it; "" when there is none or it has no id
	Interface string // virtio, scsi, ide, nvme, usb, floppy, pflash, sd, mtd; "" when the machine type decides and its choice is unknown, "none" when nothing uses it
	File      string // the launch path; "" when no local file is opened
	Protocol  string // file, host_device, nbd, rbd, …; "" when nothing is opened
	Format    string // declared; "" when QEMU probes it
	ReadOnly  bool
	CDROM     bool
	Snapshot  bool // writes go to a temporary file and are lost at exit

	AIO             string // "", threads, native or io_uring
	Discard         string // "", ignore or unmap
	IOThread        string // of the device that uses it; "" when there is none
	ExplicitBacking bool   // the command names the backing node, or forbids one
}

// CgroupMode is how the host mounts cgroups.
type CgroupMode string

// The cgroup modes.
const (
	CgroupNone   CgroupMode = ""
	CgroupV1     CgroupMode = "v1"
	CgroupV2     CgroupMode = "v2"
	CgroupHybrid CgroupMode = "hybrid"
)

// Cgroup is the place of a process among the host's control groups.
type Cgroup struct {
	Mode  CgroupMode
	Unit  string // qemu@web.service, 100.scope; "" for login sessions and user managers, which are never a VM's own
	Slice string // the innermost slice above the unit
	Path  string // in the hierarchy that systemd uses
}
