package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// What is asked of file systems. Sizes are bytes.
const (
	// catalogRoom is what the catalog may need for its log.
	catalogRoom = 256 << 20
	// layerRoom is what an overlay needs at the least.
	layerRoom = 16 << 20
)

// fileSystems are the names of file systems by their numbers (statfs(2)).
var fileSystems = map[int64]string{
	unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs", unix.TMPFS_MAGIC: "tmpfs",
	unix.NFS_SUPER_MAGIC: "nfs", unix.OVERLAYFS_SUPER_MAGIC: "overlay", unix.FUSE_SUPER_MAGIC: "fuse", 0x2fc12fc1: "zfs",
	unix.SMB2_SUPER_MAGIC: "cifs", 0xc36400: "ceph",
}

// roomOf looks at the file system of a directory.
func roomOf(dir string) (hostRoom, error) {
	f, err := os.Open(dir)
	if err != nil {
		return hostRoom{}, err
	}
	defer func() { _ = f.Close() }()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return hostRoom{}, fmt.Errorf("%s: %w", dir, err)
	}
	_, err = unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	return hostRoom{Free: st.Bavail * uint64(st.Bsize), Kind: fileSystems[int64(st.Type)], Flags: err == nil}, nil
}

func (f hostFacts) stateDirectory() HostCheck {
	r, err := f.room(f.stateDir)
	switch {
	case err != nil:
		return HostCheck{hostStateDirectory, HostBroken, "the state directory cannot be looked at: " + err.Error(), "see to its file system and its owner"}
	case r.Kind == "tmpfs":
		return HostCheck{hostStateDirectory, HostLimited, f.stateDir + " is in memory: the host's end takes the catalog with it", "set state-dir to a directory on a disk"}
	case r.Kind == "nfs", r.Kind == "cifs", r.Kind == "ceph":
		return HostCheck{hostStateDirectory, HostLimited, f.stateDir + " is on " + r.Kind + ": an operation stands still with the network", "set state-dir to a directory on a disk of this host"}
	case r.Free < catalogRoom:
		return HostCheck{hostStateDirectory, HostLimited, fmt.Sprintf("%d MiB are free where the catalog is, %s: no operation begins once it is full", r.Free>>20, f.stateDir), "make space there"}
	}
	return works(hostStateDirectory, "%s, %d MiB free", f.stateDir, r.Free>>20)
}

// sockets tells of VMs whose QEMU does not talk to the agent, and of those whose
// guests cannot be frozen.
func (f hostFacts) sockets() []HostCheck {
	var checks []HostCheck
	var mute, deaf []string
	for _, vm := range f.vms {
		if vm.Process == nil {
			continue
		}
		for _, p := range vm.Problems {
			switch p.Code {
			case "no-qmp-socket", "monitor-busy", "monitor-unreachable", "monitor-unresponsive", "libvirt-managed", "duplicate-identity":
				checks = append(checks, HostCheck{hostSockets, HostBroken, "VM " + vm.Name + ": " + p.Code + ": " + p.Message, p.Hint})
				mute = append(mute, vm.Name)
			}
		}
		if vm.GuestAgent.Presence == NoChannel && !slices.Contains(mute, vm.Name) {
			deaf = append(deaf, vm.Name)
		}
	}
	if len(deaf) > 0 {
		checks = append(checks, HostCheck{hostSockets, HostLimited, "these VMs have no guest-agent channel, and cannot be frozen: " + strings.Join(deaf, ", "),
			"give each a virtserialport called org.qemu.guest_agent.0; see docs/connecting-qemu.md"})
	}
	if len(checks) == 0 {
		checks = append(checks, works(hostSockets, "the QEMU of each VM that runs talks to vmsnapd"))
	}
	return checks
}

// storage tells of each directory in which VMs have their active layers.
func (f hostFacts) storage() []HostCheck {
	var dirs []string
	for _, vm := range f.vms {
		for _, d := range vm.Disks {
			if len(d.Layers) > 0 && !strings.HasPrefix(d.Layers[0].Path, "/dev/") {
				dirs = append(dirs, filepath.Dir(d.Layers[0].Path))
			}
		}
	}
	slices.Sort(dirs)
	var checks []HostCheck
	for _, dir := range slices.Compact(dirs) {
		checks = append(checks, f.directory(dir))
	}
	return checks
}

func (f hostFacts) directory(dir string) HostCheck {
	r, err := f.room(dir)
	switch {
	case err != nil:
		return HostCheck{hostStorage, HostBroken, "a directory of layers cannot be looked at: " + err.Error(),
			"is it mounted, and may vmsnapd enter it? The unit hides /home and /tmp, unless a drop-in says ProtectHome=no and PrivateTmp=no"}
	case r.Free < layerRoom:
		return HostCheck{hostStorage, HostBroken, fmt.Sprintf("%d MiB are free in %s, and a snapshot needs 16", r.Free>>20, dir), "delete snapshots, or make the file system larger"}
	case !r.Flags:
		return HostCheck{hostStorage, HostLimited, fmt.Sprintf("%s (%s) has no immutable flag: covered layers there are protected by their mode alone", dir, kindOr(r.Kind)),
			"keep other programs from the layers, or move them to ext4, XFS or Btrfs"}
	}
	return works(hostStorage, "%s, %s, %d MiB free", dir, kindOr(r.Kind), r.Free>>20)
}

func kindOr(kind string) string {
	if kind == "" {
		return "a file system of another kind"
	}
	return kind
}
