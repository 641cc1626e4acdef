package launch

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/systemd"
)

// startWithin bounds the start of a unit: what comes before QEMU in it, such as
// making tap devices, and QEMU's own opening of images and memory.
const startWithin = 90 * time.Second

// dropIn is the name of the drop-in that changes the command of a VM's unit.
const dropIn = "90-vmsnap-restore"

// Launched is a QEMU that was started.
type Launched struct {
	spec    Spec
	PID     int              // 0 when it is not known
	Warning string           // what went wrong beside the start
	ended   chan struct{}    // exec: closed when the child has ended
	child   *os.Process      // exec
	state   *os.ProcessState // exec, once ended is closed
}

// Start starts QEMU. What it leaves behind, Clear takes back. With External
// nothing is started.
func (s Spec) Start(ctx context.Context) (*Launched, error) {
	ctx, cancel := context.WithTimeout(ctx, startWithin)
	defer cancel()
	switch s.Launcher {
	case External:
		return &Launched{spec: s}, nil
	case Exec:
		return s.exec(ctx)
	}
	units, err := systemd.ConnectUnits(ctx)
	if err != nil {
		return nil, s.failed(err)
	}
	defer units.Close()
	if s.Launcher == Unit {
		err = s.startUnit(ctx, units)
	} else {
		err = units.StartTransient(ctx, s.transient())
	}
	if err != nil {
		return nil, s.failed(err)
	}
	return &Launched{spec: s}, nil
}

// Probe finds out, while nothing depends on it, whether this process may start what
// the specification says: it starts something that does nothing in the same way. What
// it leaves behind when it is interrupted, Clear takes back.
func (s Spec) Probe(ctx context.Context) error {
	if s.Launcher != Unit && s.Launcher != Systemd {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, startWithin)
	defer cancel()
	units, err := systemd.ConnectUnits(ctx)
	if err != nil {
		return s.mayNot(err)
	}
	defer units.Close()
	err = units.StartTransient(ctx, systemd.TransientService{
		Name: "vmsnap-" + s.Operation + "-probe.service", Description: "Whether vmsnapd may start VM " + s.VM, Command: []string{"/bin/sh", "-c", ":"},
	})
	if err == nil && s.Launcher == Unit {
		err = units.Override(ctx, s.Unit, dropIn, "[Service]\n")
		back, stop := context.WithTimeout(context.WithoutCancel(ctx), startWithin)
		defer stop()
		if failed := units.Restore(back, s.Unit, dropIn); err == nil { // and what a failure has left
			err = failed
		}
	}
	if err != nil {
		return s.mayNot(err)
	}
	return nil
}

func (s Spec) mayNot(err error) error {
	kind := fault.Failed
	if errors.Is(err, systemd.ErrDenied) || errors.Is(err, os.ErrPermission) {
		kind = fault.Denied
	}
	return fault.New(kind, "VM %s: vmsnapd could not start its QEMU again (launcher %s): %w", s.VM, s.Launcher, err).
		WithHint("docs/launchers.md says what systemd has to allow; --launcher exec or external does without it")
}

// startUnit starts the VM's own unit with another command, for this once.
func (s Spec) startUnit(ctx context.Context, units *systemd.Units) error {
	service, err := units.Service(ctx, s.Unit)
	if err != nil {
		return err
	}
	if err := units.Override(ctx, s.Unit, dropIn, s.dropIn(service.Type)); err != nil {
		return err
	}
	return units.Start(ctx, s.Unit)
}

// dropIn is the text of the drop-in. A unit whose own command forks, or tells that
// it is ready, gets the type that QEMU itself has.
func (s Spec) dropIn(kind string) string {
	var b strings.Builder
	b.WriteString("# Of vmsnapd, for one start that restores memory.\n[Service]\nRestart=no\nExecStart=\n")
	fmt.Fprintf(&b, "ExecStart=%s\n", systemd.QuoteCommand(s.Command))
	switch {
	case s.Forks && kind != "forking":
		b.WriteString("Type=forking\n")
	case !s.Forks && kind != "simple" && kind != "exec":
		b.WriteString("Type=exec\n")
	}
	if s.Directory != "" {
		fmt.Fprintf(&b, "WorkingDirectory=%s\n", strings.ReplaceAll(s.Directory, "%", "%%"))
	}
	if s.UID != 0 {
		fmt.Fprintf(&b, "User=%d\nGroup=%d\n", s.UID, s.GID)
	}
	return b.String()
}

func (s Spec) transient() systemd.TransientService {
	t := systemd.TransientService{
		Name: s.Unit, Description: "VM " + s.VM + ", restored by vmsnapd", Command: s.Command, Forks: s.Forks,
		Slice: s.Slice, Directory: s.Directory,
	}
	if s.Slice == "-.slice" {
		t.Slice = ""
	}
	if s.Forks && strings.HasPrefix(s.PIDFile, "/") {
		t.PIDFile = s.PIDFile
	}
	if s.UID != 0 {
		t.User, t.Group = strconv.Itoa(s.UID), strconv.Itoa(s.GID)
		for _, g := range s.Groups {
			t.Groups = append(t.Groups, strconv.Itoa(g))
		}
	}
	return t
}

// failed gives an error of a start the words an operator needs.
func (s Spec) failed(err error) *fault.Error {
	e := fault.New(fault.Failed, "VM %s: QEMU was not started (launcher %s): %w", s.VM, s.Launcher, err)
	if s.Launcher == Unit || s.Launcher == Systemd {
		return e.WithHint("journalctl -u %s tells more; docs/launchers.md says what systemd has to allow", s.Unit)
	}
	return e
}

// Stop stops what runs in the unit of the specification, and returns when it has
// stopped: begun is called as soon as systemd will not restart it any more. For a
// launcher without a unit of that kind it only calls begun.
func (s Spec) Stop(ctx context.Context, begun func() error) error {
	if s.Launcher != Unit && s.Launcher != Systemd {
		return begun()
	}
	units, err := systemd.ConnectUnits(ctx)
	if err != nil {
		return err
	}
	defer units.Close()
	return units.Stop(ctx, s.Unit, begun)
}

// Clear takes back what a start has left behind it beside QEMU. The VM's unit is
// as its owner made it then, whether QEMU runs or not.
func (s Spec) Clear(ctx context.Context) error {
	switch s.Launcher {
	case Unit:
		units, err := systemd.ConnectUnits(ctx)
		if err != nil {
			return err
		}
		defer units.Close()
		return units.Restore(ctx, s.Unit, dropIn)
	case Exec:
		if s.Log == "" {
			return nil
		}
		if err := os.Remove(s.Log); err != nil && !os.IsNotExist(err) {
			return err
		}
	}
	return nil
}

// Failed returns why QEMU will not come up, or nil while it still may. It asks
// systemd, so it is not for a tight loop.
func (l *Launched) Failed(ctx context.Context) error {
	switch l.spec.Launcher {
	case Exec:
		select {
		case <-l.ended:
		default:
			return nil
		}
		if l.state.Success() && l.spec.Forks {
			return nil
		}
		return l.spec.failed(fmt.Errorf("it ended (%s): %s", l.state, l.spec.printed()))
	case Unit, Systemd:
		units, err := systemd.ConnectUnits(ctx)
		if err != nil {
			return nil //nolint:nilerr // its monitor tells
		}
		defer units.Close()
		service, err := units.Service(ctx, l.spec.Unit)
		if err != nil || service.Active == "active" || service.Active == "activating" || service.Active == "reloading" {
			return nil //nolint:nilerr // its monitor tells
		}
		return l.spec.failed(fmt.Errorf("unit %s is %s (%s)", l.spec.Unit, service.Active, service.Result))
	default:
		return nil
	}
}

// Said returns what QEMU has printed, to stand behind an error, or where that is;
// "" when it is not known.
func (l *Launched) Said() string {
	switch l.spec.Launcher {
	case Exec:
		return "; QEMU said: " + l.spec.printed()
	case Unit, Systemd:
		return "; journalctl -u " + l.spec.Unit + " has what QEMU said"
	default:
		return ""
	}
}

// Kill kills a child that does not daemonize, of which nothing may be needed any
// more. What others have started is theirs to end.
func (l *Launched) Kill() {
	if l.child != nil && !l.spec.Forks {
		_ = l.child.Kill() // fails only if it has ended
	}
}
