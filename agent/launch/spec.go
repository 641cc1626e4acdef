package launch

import (
	"context"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/systemd"
)

// Kind names a launcher.
type Kind string

// The launchers.
const (
	Automatic Kind = ""
	Unit      Kind = "unit"     // through the VM's own unit
	Systemd   Kind = "systemd"  // a transient unit in the VM's slice
	Exec      Kind = "exec"     // a detached child
	External  Kind = "external" // somebody else, by the specification
)

// Kinds are the launchers that can be asked for.
var Kinds = []Kind{Unit, Systemd, Exec, External}

// ParseKind reads the name of a launcher; "" and "auto" are Automatic.
func ParseKind(s string) (Kind, error) {
	switch k := Kind(s); k {
	case Automatic, Unit, Systemd, Exec, External:
		return k, nil
	case "auto":
		return Automatic, nil
	}
	return "", fault.New(fault.Usage, "%q is not a launcher", s).WithHint("launchers are auto, unit, systemd, exec and external")
}

// Spec is everything that starting one QEMU takes. As JSON it is what a
// controller is given that starts the VM itself.
type Spec struct {
	Operation string   `json:"operation"` // id
	VM        string   `json:"vm"`        // name
	UUID      string   `json:"uuid,omitempty"`
	Launcher  Kind     `json:"launcher"`
	Command   []string `json:"command"` // the program's path first
	Directory string   `json:"directory,omitempty"`
	UID       int      `json:"uid"`
	GID       int      `json:"gid"`
	Groups    []int    `json:"groups,omitempty"`
	Unit      string   `json:"unit,omitempty"`  // through which, or as which, it is started
	Slice     string   `json:"slice,omitempty"` // of a transient unit
	Forks     bool     `json:"forks,omitempty"` // -daemonize
	PIDFile   string   `json:"pid_file,omitempty"`
	Notes     []string `json:"notes,omitempty"` // what has to be there that the command line only names
	Log       string   `json:"-"`               // where exec puts what QEMU prints; "" for nowhere
}

// Order is what a Spec is made of.
type Order struct {
	Machine   Machine
	Launcher  Kind // of Choose
	Operation string
	VM, UUID  string
	LogDir    string // where exec may put QEMU's messages
	Boots     bool   // it boots instead of waiting for its memory
	Halted    bool   // one that boots does so when it is told to (-S)
}

// New makes a specification.
func New(o Order) (Spec, error) {
	args, err := o.Machine.Incoming()
	if o.Boots {
		args, err = o.Machine.Booting()
	}
	if o.Boots && o.Halted {
		args = append(args, "-S")
	}
	if err != nil {
		return Spec{}, fmt.Errorf("the launch command of VM %s: %w", o.VM, err)
	}
	p, err := discover.ParseCommandLine(args)
	if err != nil {
		return Spec{}, fmt.Errorf("the launch command of VM %s: %w", o.VM, err)
	}
	m := o.Machine
	s := Spec{
		Operation: o.Operation, VM: o.VM, UUID: o.UUID, Launcher: o.Launcher, Command: args, Directory: m.Directory,
		UID: m.UID, GID: m.GID, Groups: m.Groups, Slice: m.Slice, Forks: p.Daemonized, PIDFile: inDirectory(m.Directory, p.PIDFile),
		Notes: append(needs(args), m.Unstartable()...),
	}
	if m.dropsPrivileges() {
		s.UID, s.GID, s.Groups = 0, 0, nil
	}
	switch o.Launcher {
	case Unit:
		s.Unit = m.Unit
	case Systemd:
		s.Unit = "vmsnap-" + o.Operation + ".service"
		if o.Boots {
			s.Unit = "vmsnap-" + o.Operation + "-boot.service"
		}
	case Exec:
		s.Unit = "vmsnap-" + o.Operation + ".scope"
		s.Log = filepath.Join(o.LogDir, "launch-"+o.Operation+".log")
	}
	return s, nil
}

func inDirectory(dir, file string) string {
	if file == "" || filepath.IsAbs(file) || dir == "" {
		return file
	}
	return filepath.Join(dir, file)
}

// needs names what a command line only refers to, for whoever has to see to it.
func needs(args []string) []string {
	options, err := discover.SplitCommandLine(args)
	if err != nil {
		return nil
	}
	var notes []string
	for _, o := range options {
		if (o.Name == "netdev" || o.Name == "net" || o.Name == "nic") && strings.Contains(o.Arg, "tap") && !inherited.MatchString(o.Arg) {
			notes = append(notes, "the tap device of -"+o.Name+" "+o.Arg)
		}
		if o.Name == "chardev" && strings.HasPrefix(o.Arg, "socket,") && !strings.Contains(o.Arg, "server") {
			notes = append(notes, "somebody who listens at -chardev "+o.Arg)
		}
	}
	return notes
}

// Choose chooses the launcher of a VM, or verifies that the one that is wanted
// can be used. pid is its QEMU process, 0 when it is stopped.
func Choose(ctx context.Context, m Machine, want Kind, pid int) (Kind, error) {
	if want == External {
		return want, nil
	}
	if why := m.Unstartable(); len(why) > 0 {
		return "", fault.New(fault.Unsupported, "vmsnapd cannot start its QEMU: %s", strings.Join(why, "; ")).
			WithHint("--launcher external leaves the start to the VM's own launcher")
	}
	if want == Exec || want == Automatic && !systemd.Running() {
		return Exec, m.canExec()
	}
	if !systemd.Running() {
		return "", fault.New(fault.Unsupported, "launcher %s: systemd does not run on this host", want)
	}
	if want == Systemd {
		return want, nil
	}
	why, err := notOwn(ctx, m, pid, want == Unit)
	if err != nil {
		return "", err
	}
	switch {
	case why == "":
		return Unit, nil
	case want == Unit:
		return "", fault.New(fault.Unsupported, "launcher unit: %s", why)
	default:
		return Systemd, nil
	}
}

// canExec fails when a child of ours could not be the user that QEMU ran as.
func (m Machine) canExec() error {
	uid := m.UID
	if m.dropsPrivileges() {
		uid = 0
	}
	if own := os.Geteuid(); own != 0 && own != uid {
		return fault.New(fault.Unsupported, "launcher exec: QEMU ran as user %d, and vmsnapd runs as user %d", uid, own).
			WithHint("--launcher systemd can start it; docs/launchers.md says what systemd has to allow")
	}
	return nil
}

// notOwn says why the unit that QEMU ran in is not the VM's own, through which it
// can be started, or returns "". The unit of a stopped VM is its own if it runs
// QEMU, or if somebody says so.
func notOwn(ctx context.Context, m Machine, pid int, said bool) (string, error) {
	if !strings.HasSuffix(m.Unit, ".service") {
		return "the VM has no service of its own", nil
	}
	units, err := systemd.ConnectUnits(ctx)
	if err != nil {
		return "", fault.New(fault.Unsupported, "%w", err).WithHint("--launcher exec does without systemd")
	}
	defer units.Close()
	s, err := units.Service(ctx, m.Unit)
	if err != nil {
		return "", fault.New(fault.Unsupported, "%w", err).WithHint("--launcher exec does without systemd")
	}
	switch {
	case !s.Loaded || s.Transient:
		return "unit " + m.Unit + " has no unit file", nil
	case pid != 0 && s.MainPID != pid:
		return fmt.Sprintf("unit %s is not the VM's own: its main process is %d", m.Unit, s.MainPID), nil
	case pid == 0 && s.MainPID != 0:
		return fmt.Sprintf("unit %s runs something else: its main process is %d", m.Unit, s.MainPID), nil
	case pid == 0 && !said && !discover.IsQEMUName(path.Base(s.Program)):
		return "unit " + m.Unit + " does not run QEMU itself", nil
	}
	return "", nil
}
