package testvm

import (
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vmsnap/vmsnap/internal/testvm/wire"
)

// Names of the files in a guest's directory.
const (
	qmpSocket       = "qmp.sock"
	agentSocket     = "agent.sock"
	controlSocket   = "control.sock"
	heartbeatSocket = "heartbeat.sock"
	writesSocket    = "writes.sock"
	consoleLog      = "console.log"
	qemuLog         = "qemu.log"
	hookName        = "fsfreeze-hook"
)

// kernelOptions make the guest boot fast, and reboot at once after a panic.
const kernelOptions = "console=ttyS0 panic=-1 quiet mitigations=off rodata=off cryptomgr.notests " +
	"random.trust_cpu=on audit=0 ipv6.disable=1"

// throttleOps is more than a guest does under TCG, so it limits nothing.
const throttleOps = 100000

func extraQMPSocket(i int) string { return fmt.Sprintf("qmp%d.sock", i+1) }

// commandLine returns the command line of a guest, the program included.
func commandLine(c Config) []string {
	at := func(name string) string { return escape(filepath.Join(c.Dir, name)) }
	args := append([]string{c.QEMU.Binary}, c.QEMU.Args...)
	args = append(args,
		"-name", escape(c.Name), "-uuid", c.UUID,
		"-nodefaults", "-no-user-config", "-display", "none",
		"-machine", "pc", "-accel", "tcg", "-cpu", "qemu64", "-m", strconv.Itoa(c.MemoryMiB),
		"-kernel", c.QEMU.kernel, "-initrd", c.QEMU.initramfs, "-append", kernelLine(c),
		"-chardev", "file,id=console,append=on,path="+at(consoleLog), "-serial", "chardev:console",
	)
	if !c.NoQMP {
		args = append(args, "-qmp", "unix:"+at(qmpSocket)+",server=on,wait=off")
	}
	for i := range c.ExtraQMP {
		id := fmt.Sprintf("qmp%d", i+1)
		args = append(args,
			"-chardev", "socket,id="+id+",path="+at(extraQMPSocket(i))+",server=on,wait=off",
			"-mon", "chardev="+id+",mode=control")
	}
	if c.NoReboot {
		args = append(args, "-no-reboot")
	}
	if c.FreezeHook != "" {
		args = append(args, "-fw_cfg", "name="+wire.FreezeHookFile+",file="+at(hookName))
	}
	args = append(args, "-device", "virtio-serial-pci,id=serial")
	port := func(id, socket, name string) {
		args = append(args,
			"-chardev", "socket,id="+id+",path="+at(socket)+",server=on,wait=off",
			"-device", "virtserialport,id="+id+"-port,chardev="+id+",name="+name)
	}
	if !c.NoGuestAgent {
		port("agent", agentSocket, wire.AgentPort)
	}
	port("heartbeat", heartbeatSocket, wire.HeartbeatPort)
	port("writes", writesSocket, wire.WritesPort)
	port("control", controlSocket, wire.ControlPort) // the last that the guest sees
	args = append(args, diskArgs(c.Disks)...)
	return append(args, c.ExtraArgs...)
}

// kernelLine returns the command line of the guest's kernel.
func kernelLine(c Config) string {
	words := []string{kernelOptions}
	var mounts, with []string
	if c.FreezeHook != "" {
		with = append(with, wire.WithHook)
	}
	for _, d := range c.Disks {
		if !d.NoFilesystem {
			mounts = append(mounts, d.Name)
		}
		if d.Bus == SCSI && !slices.Contains(with, wire.WithSCSI) {
			with = append(with, wire.WithSCSI)
		}
		if d.Bus == IDE && !slices.Contains(with, wire.WithIDE) {
			with = append(with, wire.WithIDE)
		}
	}
	if mounts != nil {
		words = append(words, wire.MountsParameter+strings.Join(mounts, ","))
	}
	if with != nil {
		words = append(words, wire.WithParameter+strings.Join(with, ","))
	}
	return strings.Join(words, " ")
}

func diskArgs(disks []Disk) []string {
	var args []string
	controllers := 0
	for _, d := range disks {
		var device string
		var iothread string
		if d.IOThread {
			args = append(args, "-object", "iothread,id=iothread-"+d.Name)
			iothread = ",iothread=iothread-" + d.Name
		}
		switch d.Bus {
		case Virtio:
			device = "virtio-blk-pci" + iothread
		case SCSI:
			// A controller for each disk, since I/O threads belong to it.
			args = append(args, "-device", fmt.Sprintf("virtio-scsi-pci,id=scsi%d%s", controllers, iothread))
			device = fmt.Sprintf("scsi-hd,bus=scsi%d.0", controllers)
			controllers++
		case IDE:
			device = "ide-hd"
		}
		var node string
		if d.Style == StyleBlockdev {
			node = d.Name + "-format"
			args = append(args, blockdevArgs(d, &node)...)
		} else {
			node = "drive-" + d.Name
			args = append(args, "-drive", driveArg(d, node))
		}
		args = append(args, "-device", device+",id="+d.Name+",drive="+node)
	}
	return args
}

func driveArg(d Disk, id string) string {
	arg := "if=none,id=" + id + ",file=" + escape(d.Path)
	if !d.NoDeclaredFormat {
		arg += ",format=" + d.Format
	}
	if d.Throttle {
		arg += fmt.Sprintf(",throttling.iops-total=%d", throttleOps)
	}
	return arg
}

// blockdevArgs returns the nodes of a disk; node is set to the top one, which
// the device uses.
func blockdevArgs(d Disk, node *string) []string {
	args := []string{
		"-blockdev", "driver=file,node-name=" + d.Name + "-file,filename=" + escape(d.Path),
		"-blockdev", "driver=" + d.Format + ",node-name=" + *node + ",file=" + d.Name + "-file",
	}
	if !d.Throttle {
		return args
	}
	group := d.Name + "-limits"
	below := *node
	*node = d.Name + "-throttle"
	return append(args,
		"-object", fmt.Sprintf("throttle-group,id=%s,x-iops-total=%d", group, throttleOps),
		"-blockdev", "driver=throttle,node-name="+*node+",throttle-group="+group+",file="+below)
}

// escape doubles commas, as QEMU's option strings want them.
func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }
