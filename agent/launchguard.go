package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"github.com/vmsnap/vmsnap/blockdev"
)

// launchGuard is a process that finishes what a dead agent cannot: between the
// transaction and the moment when the launch paths name the overlays, a VM that
// is started by its command line would write to a covered layer. The process is
// started before the transaction, and does nothing unless its pipe to the agent
// closes without a word.
type launchGuard struct {
	cmd *exec.Cmd
	in  io.WriteCloser
}

const (
	launchGuardReady   = "ready"
	launchGuardRelease = "release"
	// launchGuardStart bounds the start of a process that reads one line.
	launchGuardStart = 10 * time.Second
)

// startLaunchGuard starts the process and returns once it watches.
func startLaunchGuard(ctx context.Context, argv []string, disks []*cutDisk) (_ *launchGuard, err error) {
	if len(argv) == 0 {
		return nil, errors.New("launch guard: no command is configured")
	}
	// Not CommandContext: it is to outlive whatever ends here.
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("launch guard: %w", err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("launch guard: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("launch guard: %w", err)
	}
	g := &launchGuard{cmd, in}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()
	hung := time.AfterFunc(launchGuardStart, func() { _ = cmd.Process.Kill() })
	defer hung.Stop()
	if err := json.NewEncoder(in).Encode(disks); err != nil {
		return nil, errors.Join(fmt.Errorf("launch guard: %w", err), g.release())
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if line != launchGuardReady+"\n" {
		return nil, errors.Join(fmt.Errorf("launch guard: it said %q: %w", line, err), g.release())
	}
	return g, nil
}

// release tells the process that it is not needed, and awaits its end.
func (g *launchGuard) release() error {
	_, err := io.WriteString(g.in, launchGuardRelease+"\n")
	return errors.Join(err, g.in.Close(), g.cmd.Wait())
}

// GuardLaunchPaths is the body of the process. in is the pipe to the agent.
func GuardLaunchPaths(in io.Reader, out io.Writer) error {
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	r := bufio.NewReader(in)
	line, err := r.ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("launch guard: %w", err)
	}
	var disks []*cutDisk
	if err := json.Unmarshal(line, &disks); err != nil {
		return fmt.Errorf("launch guard: %w", err)
	}
	for _, d := range disks {
		if err := d.open(); err != nil {
			return fmt.Errorf("launch guard: %w", err)
		}
	}
	if _, err := io.WriteString(out, launchGuardReady+"\n"); err != nil {
		return fmt.Errorf("launch guard: %w", err)
	}
	if word, err := r.ReadString('\n'); err == nil && word == launchGuardRelease+"\n" {
		return nil
	}
	var errs []error
	for _, d := range disks {
		errs = append(errs, d.guardLaunch())
	}
	return errors.Join(errs...)
}

// guardLaunch makes a start by the launch path safe, whether or not the
// transaction took place: an overlay that was not put on its base is empty and
// reads as its base does. Where the launch path has to stay on the base, that is
// made immutable, but only when nobody writes to it.
func (d *cutDisk) guardLaunch() error {
	if d.Settle == SettleLive {
		return errors.Join(d.pointLaunch(), d.dir.Sync())
	}
	lock, err := blockdev.LockNoWriters(d.Prefix + d.dir.Path(d.Base))
	if errors.Is(err, blockdev.ErrLocked) {
		return nil // QEMU still writes to it: there was no cut
	}
	if err != nil {
		return err
	}
	return errors.Join(d.dir.SetImmutable(d.Base, true), lock.Close())
}
