package discover

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// ErrNoArguments is returned for an empty command line.
var ErrNoArguments = errors.New("no arguments")

// flagOptions are the options of QEMU that take no argument. Every other
// option takes the next one, also one that is not known here: nearly all that
// QEMU gains do.
var flagOptions = map[string]bool{
	"?": true, "h": true, "help": true, "version": true, "audio-help": true,
	"S": true, "s": true, "snapshot": true, "daemonize": true,
	"no-reboot": true, "no-shutdown": true, "no-acpi": true, "no-hpet": true,
	"no-fd-bootchk": true, "nodefaults": true, "no-user-config": true,
	"nouserconfig": true, "nodefconfig": true, "nographic": true,
	"enable-kvm": true, "no-kvm": true, "no-kvm-irqchip": true,
	"no-kvm-pit": true, "no-kvm-pit-reinjection": true, "enable-hax": true,
	"enable-fips": true, "enable-sync-profile": true, "mem-prealloc": true,
	"only-migratable": true, "preconfig": true, "async-teardown": true,
	"full-screen": true, "portrait": true, "no-frame": true, "no-quit": true,
	"alt-grab": true, "ctrl-grab": true, "curses": true, "sdl": true,
	"show-cursor": true, "usb": true, "win2k-hack": true, "rtc-td-hack": true,
	"localtime": true, "tdf": true, "semihosting": true, "singlestep": true,
	"one-insn-per-tb": true, "old-param": true, "perfmap": true,
	"jitdump": true, "xen-attach": true, "xen-domid-restrict": true,
}

// option is one option of the command line as it was given.
type option struct {
	name, arg string
	settings  settings // of the groups that are looked at, -set applied
	at, n     int      // which arguments it is made of
}

// commandLine collects what the options say before the whole is put together:
// a device may name a drive or chardev that is given after it.
type commandLine struct {
	p          Process
	chardevs   map[string]settings
	monitors   []option // -qmp, -qmp-pretty and -mon
	drives     []driveOption
	blockdevs  []settings
	devices    []settings
	flash      map[string]bool // drives and nodes named by -machine pflash0= and pflash1=
	allScratch bool            // -snapshot
}

// ParseCommandLine describes a QEMU by its arguments, args[0] included. It is
// pure: relative paths stay relative, and files that the command line names,
// such as that of -readconfig, are not read. An error means that the arguments
// are not what a running QEMU can have been started with.
func ParseCommandLine(args []string) (Process, error) {
	if len(args) == 0 {
		return Process{}, ErrNoArguments
	}
	options, err := splitOptions(args[1:])
	if err != nil {
		return Process{}, err
	}
	if err := applySets(options); err != nil {
		return Process{}, err
	}
	c := commandLine{chardevs: map[string]settings{}, flash: map[string]bool{}}
	c.p.Args = args
	for _, o := range options {
		c.take(o)
	}
	c.resolveMonitors()
	c.resolveGuestAgent()
	c.resolveDrives()
	c.p.LibvirtEvidence = libvirtEvidence(args)
	c.p.Libvirt = c.p.LibvirtEvidence != ""
	return c.p, nil
}

// Option is one option of a command line as it was given.
type Option struct {
	Name string // without its dashes; "hda" for an argument that is no option
	Arg  string // "" when it takes none
	At   int    // args[At:At+Len] are its arguments
	Len  int
}

// SplitCommandLine tells the options of a command line apart, args[0] included,
// as QEMU does. The errors are those of ParseCommandLine.
func SplitCommandLine(args []string) ([]Option, error) {
	if len(args) == 0 {
		return nil, ErrNoArguments
	}
	options, err := splitOptions(args[1:])
	if err != nil {
		return nil, err
	}
	out := make([]Option, len(options))
	for i, o := range options {
		out[i] = Option{Name: o.name, Arg: o.arg, At: o.at, Len: o.n}
	}
	return out, nil
}

// maxOptions bounds a command line in options; a VM with a thousand disks has
// some five thousand. It bounds the time spent on one that means harm.
const maxOptions = 1 << 14

// splitOptions pairs options with their arguments. An argument that is no
// option is the image of the first disk.
func splitOptions(args []string) ([]option, error) {
	var out []option
	for i := 0; i < len(args); i++ {
		if len(out) == maxOptions {
			return nil, fmt.Errorf("more than %d options", maxOptions)
		}
		arg := args[i]
		if !strings.HasPrefix(arg, "-") || arg == "-" {
			out = append(out, option{name: "hda", arg: arg, at: i + 1, n: 1})
			continue
		}
		o := option{name: strings.TrimPrefix(arg[1:], "-"), at: i + 1, n: 1}
		if !flagOptions[o.name] {
			if i++; i >= len(args) {
				return nil, fmt.Errorf("%s: argument missing", arg)
			}
			o.arg, o.n = args[i], 2
		}
		if implied, ok := impliedKeys[o.name]; ok {
			s, err := parseSettings(o.arg, implied)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", arg, err)
			}
			o.settings = s
		}
		out = append(out, o)
	}
	return out, nil
}

// impliedKeys are the options that are read key by key, with the key that the
// first part of their argument has when it names none.
var impliedKeys = map[string]string{
	"drive": "", "blockdev": "driver", "device": "driver", "chardev": "backend",
	"mon": "chardev", "name": "guest", "machine": "type", "M": "type",
	"m": "size", "action": "", "sandbox": "enable", "run-with": "", "smbios": "",
}

// applySets carries out -set GROUP.ID.KEY=VALUE, which changes an option given
// before it.
func applySets(options []option) error {
	type target struct{ group, id string }
	named := map[target]*option{}
	for i := range options {
		o := &options[i]
		if id, ok := o.settings.get("id"); ok {
			named[target{o.name, id}] = o
		}
		if o.name != "set" {
			continue
		}
		path, value, ok := strings.Cut(o.arg, "=")
		parts := strings.SplitN(path, ".", 3)
		if !ok || len(parts) != 3 {
			return fmt.Errorf("-set %s: not GROUP.ID.KEY=VALUE", o.arg)
		}
		if set := named[target{parts[0], parts[1]}]; set != nil {
			set.settings = append(set.settings, setting{parts[2], value})
		}
	}
	return nil
}

// take notes what one option says.
func (c *commandLine) take(o option) {
	switch o.name {
	case "chardev":
		c.chardevs[o.settings.value("id")] = o.settings
	case "qmp", "qmp-pretty", "mon":
		c.monitors = append(c.monitors, o)
	case "drive", "hda", "hdb", "hdc", "hdd", "cdrom", "fda", "fdb", "pflash", "mtdblock", "sd":
		c.takeDrive(o)
	case "blockdev":
		c.blockdevs = append(c.blockdevs, o.settings)
	case "device":
		c.devices = append(c.devices, o.settings)
	case "snapshot":
		c.allScratch = true
	case "readconfig":
		c.note("%s is not read: what it configures is not known", o.arg)
	default:
		c.takeIdentity(o)
	}
	c.p.question = c.p.question || isQuestion(o)
}

// takeIdentity notes the options that describe the VM as a whole.
func (c *commandLine) takeIdentity(o option) {
	p := &c.p
	switch o.name {
	case "name":
		if v, ok := o.settings.get("guest"); ok {
			p.Name = v
		}
	case "uuid":
		p.UUID = strings.ToLower(o.arg)
	case "smbios": // the system's UUID is the VM's: query-uuid tells it too
		if v, ok := o.settings.get("uuid"); ok && o.settings.value("type") == "1" {
			p.UUID = strings.ToLower(v)
		}
	case "machine", "M":
		if v, ok := o.settings.get("type"); ok {
			p.Machine = v
		}
		for _, key := range []string{"pflash0", "pflash1"} {
			if v := o.settings.value(key); v != "" {
				c.flash[v] = true
			}
		}
	case "cpu":
		p.CPU = o.arg
	case "m":
		if size, ok := o.settings.get("size"); ok {
			p.MemoryBytes = parseMemory(size)
		}
	case "incoming":
		p.Incoming = o.arg
	case "pidfile":
		p.PIDFile = o.arg
	case "S":
		p.StartPaused = true
	default:
		c.takeLifecycle(o)
	}
}

// takeLifecycle notes the options that decide how the process lives and ends.
func (c *commandLine) takeLifecycle(o option) {
	p := &c.p
	switch o.name {
	case "daemonize":
		p.Daemonized = true
	case "no-reboot":
		p.NoReboot = true
	case "no-shutdown":
		p.NoShutdown = true
	case "action":
		if v, ok := o.settings.get("reboot"); ok {
			p.NoReboot = v == "shutdown"
		}
		if v, ok := o.settings.get("shutdown"); ok {
			p.NoShutdown = v == "pause"
		}
	case "sandbox":
		p.SpawnDenied = o.settings.value("spawn") == "deny"
	case "chroot":
		p.chroot = true
	case "run-with":
		if v, ok := o.settings.get("chroot"); ok {
			p.chroot = v != ""
		}
	}
}

func (c *commandLine) note(format string, args ...any) {
	c.p.Notes = append(c.p.Notes, fmt.Sprintf(format, args...))
}

// answersHelp are the options that list their choices when asked for help.
var answersHelp = map[string]bool{
	"accel": true, "audio": true, "audiodev": true, "chardev": true,
	"cpu": true, "d": true, "device": true, "display": true, "k": true,
	"M": true, "machine": true, "netdev": true, "net": true, "nic": true,
	"object": true, "soundhw": true, "tpmdev": true, "trace": true,
	"vga": true, "watchdog": true,
}

// isQuestion tells the commands that print something and exit, and libvirt's
// capability probe, which lives for a second and runs no guest.
func isQuestion(o option) bool {
	switch o.name {
	case "?", "h", "help", "version", "audio-help", "dump-vmstate":
		return true
	case "qmp":
		return strings.Contains(o.arg, "/libvirt/qemu/") && strings.Contains(o.arg, "/qmp.monitor")
	}
	if !answersHelp[o.name] {
		return false
	}
	first, _ := cutValue(o.arg)
	return first == "help" || first == "?" || o.settings.on("help") || o.settings.on("?")
}

// parseMemory reads the size of -m: a number, MiB without a suffix. 0 means
// that it cannot be read.
func parseMemory(s string) uint64 {
	shift, digits := 20, s
	if s != "" {
		if i := strings.IndexByte("bkmgtpe", lower(s[len(s)-1])); i >= 0 {
			shift, digits = 10*i, s[:len(s)-1]
		}
	}
	n, err := strconv.ParseFloat(digits, 64)
	if err != nil || !(n >= 0 && n <= float64(uint64(1)<<63>>shift)) {
		return 0
	}
	return uint64(n * float64(uint64(1)<<shift))
}

func lower(b byte) byte {
	if 'A' <= b && b <= 'Z' {
		return b + 'a' - 'A'
	}
	return b
}
