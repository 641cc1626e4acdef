package launch

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
)

// Clone says what a clone has of its own: what makes its command line another VM's
// that runs beside its origin.
type Clone struct {
	Origin string // the name of the VM that it is a clone of
	Name   string // without a slash
	UUID   string // lower case
	// MAC returns another address at each call.
	MAC        func() string
	Generation string // id that the guest sees change: a UUID
	// Disks are the files of its disks, by an id, a node name or a file that the
	// drive or its device has in the command line; other writable drives are left out.
	Disks map[string]string // qcow2, absolute
	// Firmware gives each writable firmware drive a file of its own, by the one
	// that the command line names.
	Firmware func(path string) (string, error)
	// Replace are the resources of the host that the clone has in the place of
	// those that only one VM can have, by what the command line calls these.
	Replace map[string]string
	// IsDirectory reports whether a path of the command line is a directory:
	// memory backed by a file of its own is another's memory.
	IsDirectory func(path string) bool
}

// Cloned is the command line of a clone.
type Cloned struct {
	Command []string // the program first
	MACs    []string
	// Files are what QEMU makes when it starts, and must not be there: sockets,
	// the pid file, logs. As the command line names them.
	Files   []string
	Omitted []string // drives that are left out
	Used    []string // the keys of Disks that were found
}

// cloning is a command line being made another VM's.
type cloning struct {
	Clone
	out     Cloned
	refused []string
	name    bool            // it has an option that says the name
	gone    map[string]bool // ids and nodes of drives that are left out
	drives  []*fate         // in the order of the command line
	next    int             // the first of them that may be made by the next -drive
	nodes   map[string]argument
	below   map[string]*fate // the drive that a node is a part of

	variables []string // files of firmware variables
	err       error
}

// Clone returns the command line by which the clone of a machine boots. What the
// two cannot both have, and Replace does not replace, is refused by name.
func (m Machine) Clone(c Clone) (Cloned, error) {
	dropped := []string{"incoming", "loadvm", "uuid"}
	if slices.Contains(m.Command, "-incoming") || slices.Contains(m.Command, "--incoming") {
		dropped = append(dropped, "S") // it came with it
	}
	args, err := m.without(dropped)
	if err != nil {
		return Cloned{}, err
	}
	p, err := discover.ParseCommandLine(args)
	if err != nil {
		return Cloned{}, err
	}
	options, err := discover.SplitCommandLine(args)
	if err != nil {
		return Cloned{}, err
	}
	r := &cloning{Clone: c, gone: map[string]bool{}, nodes: map[string]argument{}, below: map[string]*fate{}}
	r.out.Command = args[:1:1]
	r.planDrives(p.Drives, options)
	for _, o := range options {
		dashes := args[o.At]
		arg, keep := r.option(o)
		switch {
		case !keep:
		case o.Len == 1 && o.Name != "hda":
			r.out.Command = append(r.out.Command, dashes)
		case o.Len == 1: // the image of the first disk, without an option
			r.out.Command = append(r.out.Command, arg)
		default:
			r.out.Command = append(r.out.Command, dashes, arg)
		}
	}
	if !r.name {
		r.out.Command = append(r.out.Command, "-name", escape(r.Name))
	}
	r.out.Command = append(r.out.Command, "-uuid", r.UUID)
	if r.err != nil {
		return Cloned{}, r.err
	}
	if len(r.refused) > 0 {
		return Cloned{}, fault.New(fault.Unsupported, "the clone could not run beside VM %s: %s", c.Origin, strings.Join(r.refused, "; ")).
			WithHint("--replace OLD=NEW gives the clone something of its own in the place of each")
	}
	if err := r.verify(); err != nil {
		return Cloned{}, err
	}
	return r.out, nil
}

func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }

// claim is for what only one VM can have: it returns what the clone has instead.
func (r *cloning) claim(value, format string, args ...any) string {
	if now, ok := r.Replace[value]; ok {
		return now
	}
	r.refused = append(r.refused, fmt.Sprintf(format, args...)+" ("+value+")")
	return value
}

// made is for a file that QEMU makes: it returns another one's name beside it.
func (r *cloning) made(path string) string {
	if path == "" || strings.HasPrefix(path, "/dev/") {
		return path
	}
	now, ok := r.Replace[path]
	if !ok {
		now = filepath.Join(filepath.Dir(path), rename(filepath.Base(path), r.Origin, r.Name))
		if strings.HasPrefix(path, "./") {
			now = "./" + now
		}
	}
	r.out.Files = append(r.out.Files, now)
	return now
}

// rename makes a file's name one of the clone's: where the origin's name is a part
// of it, the clone's stands in its place, else before it.
func rename(base, origin, name string) string {
	if origin != "" {
		word := func(c byte) bool {
			return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
		}
		for at := 0; ; {
			i := strings.Index(base[at:], origin)
			if i < 0 {
				break
			}
			begin, end := at+i, at+i+len(origin)
			if (begin == 0 || !word(base[begin-1])) && (end == len(base) || !word(base[end])) {
				return base[:begin] + name + base[end:]
			}
			at = begin + 1
		}
	}
	return name + "-" + base
}

// socketPath is made for a socket, whose path is bounded (unix(7)).
func (r *cloning) socketPath(path string) string {
	now := r.made(path)
	if len(now) > 107 && r.err == nil {
		r.err = fault.New(fault.Usage, "the path of the clone's socket is too long: %s", now).WithHint("choose a shorter name, or --replace %s=PATH", path)
	}
	return now
}

// option returns what the clone has in the place of an option's argument, and
// whether it has the option at all.
func (r *cloning) option(o discover.Option) (arg string, keep bool) {
	switch o.Name {
	case "drive", "hda", "hdb", "hdc", "hdd", "cdrom", "fda", "fdb", "pflash", "mtdblock", "sd", "blockdev":
		return r.drive(o)
	case "device":
		return r.device(o.Arg)
	case "name":
		r.name = true
		a := readArgument(o.Arg, "guest")
		a.set("guest", r.Name)
		return a.String(), true
	case "smbios":
		a := readArgument(o.Arg, "")
		if _, ok := a.get("uuid"); ok {
			a.set("uuid", r.UUID)
		}
		return a.String(), true
	case "netdev", "nic", "net":
		return r.network(o), true
	case "chardev":
		return r.chardev(o.Arg), true
	case "qmp", "qmp-pretty", "monitor", "serial", "parallel", "debugcon", "gdb":
		return r.character(o), true
	case "pidfile", "D":
		return r.made(o.Arg), true
	}
	return r.rest(o), true
}

// rest does the options that seldom stand in the way.
func (r *cloning) rest(o discover.Option) string {
	switch o.Name {
	case "vnc":
		return r.vnc(o.Arg)
	case "spice":
		return r.spice(o.Arg)
	case "display":
		if kind, rest, ok := strings.Cut(o.Arg, "="); ok && kind == "vnc" {
			return "vnc=" + r.vnc(rest)
		}
	case "object":
		return r.object(o.Arg)
	case "tpmdev":
		a := readArgument(o.Arg, "type")
		if path, ok := a.get("path"); ok {
			a.set("path", r.claim(path, "-tpmdev %s", o.Arg))
		}
		return a.String()
	case "mem-path":
		if r.IsDirectory == nil || !r.IsDirectory(o.Arg) {
			return r.claim(o.Arg, "-mem-path is a file, the memory of the origin")
		}
	case "trace":
		a := readArgument(o.Arg, "enable")
		if path, ok := a.get("file"); ok {
			a.set("file", r.made(path))
		}
		return a.String()
	case "s":
		r.claim("-s", "the port of gdb is fixed")
	case "readconfig":
		return r.claim(o.Arg, "-readconfig: what the file configures is not known")
	case "set":
		return r.setting(o.Arg)
	case "audiodev":
		a := readArgument(o.Arg, "driver")
		if path, ok := a.get("path"); ok && a.value("driver") == "wav" {
			a.set("path", r.made(path))
		}
		return a.String()
	}
	return o.Arg
}

// decisive are the keys that -set must not change behind our back.
var decisive = []string{"mac", "file", "filename", "path", "guid", "host", "port", "ifname", "format", "driver", "drive", "guest-cid", "hostfwd"}

func (r *cloning) setting(arg string) string {
	path, _, _ := strings.Cut(arg, "=")
	key := path[strings.LastIndexByte(path, '.')+1:]
	if slices.Contains(decisive, key) {
		return r.claim(arg, "-set")
	}
	return arg
}

// object is -object.
func (r *cloning) object(arg string) string {
	a := readArgument(arg, "qom-type")
	switch kind := a.value("qom-type"); kind {
	case "memory-backend-file":
		path := a.value("mem-path")
		if path != "" && (r.IsDirectory == nil || !r.IsDirectory(path)) {
			a.set("mem-path", r.claim(path, "-object memory-backend-file is the memory of the origin"))
		}
	case "filter-dump":
		a.set("file", r.made(a.value("file")))
	case "input-linux":
		a.set("evdev", r.claim(a.value("evdev"), "-object input-linux"))
	}
	return a.String()
}
