package launch

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/vmsnap/vmsnap/agent/discover"
)

// Machine is what was captured of a VM's process to start it again. Its
// environment is not part of it: that of the launcher's is used.
type Machine struct {
	Command   []string // as QEMU was started
	Binary    string   // the executable's path; "" when it is not known
	Type      string   // versioned machine type, like pc-i440fx-7.2; "" when it is not known
	Directory string   // that relative paths start from; "" when it is not known
	UID, GID  int
	Groups    []int
	Unit      string // that QEMU ran in; "" for none
	Slice     string
	Foreign   bool // QEMU saw another file system tree than we do
}

// inherited matches the parts of options that name an open file of the process
// that started QEMU: tap,fd=24 or vhostfds=30:31 or /dev/fdset/2.
var inherited = regexp.MustCompile(`(^|,)((vhost)?fds?|sockfd)=[0-9]|/dev/fd(set)?/[0-9]`)

// Unstartable says why nobody but its own launcher can start the VM by its
// command line, or returns nothing.
func (m Machine) Unstartable() []string {
	var why []string
	for _, arg := range m.Command {
		if inherited.MatchString(arg) || inheritedJSON(arg) {
			why = append(why, fmt.Sprintf("%q uses a file that whoever started QEMU had open", arg))
		}
	}
	if m.Foreign {
		why = append(why, "QEMU runs in a file system tree of its own, such as a container's")
	}
	return why
}

// inheritedJSON is the same for arguments in JSON.
func inheritedJSON(arg string) bool {
	if !strings.HasPrefix(arg, "{") {
		return false
	}
	var keys map[string]any
	if json.Unmarshal([]byte(arg), &keys) != nil {
		return false
	}
	for _, key := range []string{"fd", "fds", "vhostfd", "vhostfds", "sockfd"} {
		if _, ok := keys[key]; ok {
			return true
		}
	}
	return false
}

// dropped are the options that an incoming VM is started without: how its first
// state was to come about.
var dropped = []string{"incoming", "S", "loadvm", "preconfig"}

// Incoming returns the command line of a QEMU that waits for the VM's memory, its
// CPUs stopped: the same one, with an absolute program, the versioned machine
// type, and -incoming defer -S. It is idempotent.
func (m Machine) Incoming() ([]string, error) {
	args, err := m.without(dropped)
	if err != nil {
		return nil, err
	}
	p, err := discover.ParseCommandLine(args)
	if err != nil {
		return nil, err
	}
	if m.Type != "" && p.Machine != m.Type {
		args = append(args, "-machine", "type="+m.Type) // QEMU adds it to what was said before
	}
	return append(args, "-incoming", "defer", "-S"), nil
}

// Booting returns the command line of a QEMU that boots: the same one, with an
// absolute program, and not waiting for any memory.
func (m Machine) Booting() ([]string, error) {
	if !slices.Contains(m.Command, "-incoming") && !slices.Contains(m.Command, "--incoming") {
		return m.without(nil)
	}
	return m.without([]string{"incoming", "S"}) // -S came with it
}

// without returns the command line without some options.
func (m Machine) without(names []string) ([]string, error) {
	options, err := discover.SplitCommandLine(m.Command)
	if err != nil {
		return nil, err
	}
	args := []string{m.Command[0]}
	if m.Binary != "" {
		args[0] = m.Binary
	}
	for _, o := range options {
		if !slices.Contains(names, o.Name) {
			args = append(args, m.Command[o.At:o.At+o.Len]...)
		}
	}
	return args, nil
}

// dropsPrivileges reports whether QEMU changes its user, or its root, by itself:
// then it has to be started as root.
func (m Machine) dropsPrivileges() bool {
	options, err := discover.SplitCommandLine(m.Command)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(options, func(o discover.Option) bool {
		return o.Name == "runas" || o.Name == "chroot" ||
			o.Name == "run-with" && (strings.Contains(o.Arg, "user=") || strings.Contains(o.Arg, "chroot="))
	})
}
