package launch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"github.com/vmsnap/vmsnap/systemd"
)

// exec starts QEMU as a child that nothing of ours takes with it: in a session of
// its own, and where systemd runs in a scope of its own.
func (s Spec) exec(ctx context.Context) (*Launched, error) {
	cmd := exec.Command(s.Command[0], s.Command[1:]...)
	cmd.Dir = s.Directory
	// Nothing of what systemd tells vmsnapd is for QEMU. One that daemonizes can
	// only be asked for its directory by PWD.
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "PWD=" + s.Directory}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if s.UID != os.Geteuid() || s.GID != os.Getegid() {
		if os.Geteuid() != 0 {
			return nil, s.failed(fmt.Errorf("it ran as user %d, and vmsnapd runs as user %d", s.UID, os.Geteuid()))
		}
		groups := make([]uint32, len(s.Groups))
		for i, g := range s.Groups {
			groups[i] = uint32(g)
		}
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(s.UID), Gid: uint32(s.GID), Groups: groups}
	}
	if s.Log != "" {
		log, err := os.OpenFile(s.Log, os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			return nil, s.failed(err)
		}
		defer func() { _ = log.Close() }()
		cmd.Stdout, cmd.Stderr = log, log // a file: a pipe would end with us
	}
	if err := cmd.Start(); err != nil {
		return nil, s.failed(err)
	}
	l := &Launched{spec: s, ended: make(chan struct{}), child: cmd.Process}
	if !s.Forks {
		l.PID = cmd.Process.Pid
	}
	if systemd.Running() && !s.Forks {
		if err := s.scope(ctx, cmd.Process.Pid); err != nil {
			l.Warning = "QEMU stays in the control group of vmsnapd: " + err.Error()
		}
	}
	go func() {
		_ = cmd.Wait() // how it ended is in its state
		l.state = cmd.ProcessState
		close(l.ended)
	}()
	return l, nil
}

func (s Spec) scope(ctx context.Context, pid int) error {
	units, err := systemd.ConnectUnits(ctx)
	if err != nil {
		return err
	}
	defer units.Close()
	slice := s.Slice
	if slice == "-.slice" {
		slice = ""
	}
	return units.Scope(ctx, s.Unit, "VM "+s.VM+", restored by vmsnapd", slice, pid)
}

// maxPrinted bounds what is shown of QEMU's messages.
const maxPrinted = 2 << 10

// printed returns the beginning of what QEMU has printed, which names the cause.
func (s Spec) printed() string {
	f, err := os.Open(s.Log)
	if errors.Is(err, os.ErrNotExist) || s.Log == "" {
		return "nothing is known of its messages"
	}
	if err != nil {
		return err.Error()
	}
	defer func() { _ = f.Close() }()
	text, err := io.ReadAll(io.LimitReader(f, maxPrinted))
	if err != nil {
		return err.Error()
	}
	return strings.Join(strings.Fields(string(text)), " ")
}
