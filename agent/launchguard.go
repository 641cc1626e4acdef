package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/blockdev"
)

// launchGuard is a process that finishes what a dead agent cannot: between the
// transaction and the moment when the launch paths name the overlays, a VM that
// is started by its command line would write to a covered layer. The process is
// started before the transaction. As long as it lives no QEMU can open one of
// the bases for writing; when its pipe to the agent closes without a word, it
// makes the launch paths right.
//
// It also holds a lock of its own, so that recovery can wait for its end.
type launchGuard struct {
	cmd  *exec.Cmd
	in   io.WriteCloser
	lock string
}

const (
	launchGuardReady   = "ready"
	launchGuardRelease = "release"
	// launchGuardStart bounds the start of a process that reads one line.
	launchGuardStart = 10 * time.Second
)

// launchGuardLock is the lock file of an operation's launch guard.
func (a *Agent) launchGuardLock(operation string) string {
	return filepath.Join(a.cfg.StateDir, "launch-guard-"+operation+".lock")
}

// startLaunchGuard starts the process and returns once it watches.
func startLaunchGuard(ctx context.Context, argv []string, lock string, disks []*cutDisk) (_ *launchGuard, err error) {
	if len(argv) == 0 {
		return nil, errors.New("launch guard: no command is configured")
	}
	held, err := os.OpenFile(lock, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("launch guard: %w", err)
	}
	started := false
	defer func() {
		_ = held.Close() // the process keeps its copy, and with it the lock
		if !started {
			err = errors.Join(err, os.Remove(lock))
		}
	}()
	if err := unix.Flock(int(held.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("launch guard: lock %s: %w", lock, err)
	}
	// Not CommandContext: it is to outlive whatever ends here.
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{held}
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
	started = true // and release removes the lock file
	g := &launchGuard{cmd, in, lock}
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

// release tells the process that it is not needed, and awaits its end. One that
// was killed is not needed either.
func (g *launchGuard) release() error {
	_, told := io.WriteString(g.in, launchGuardRelease+"\n")
	if errors.Is(told, syscall.EPIPE) {
		told = nil
	}
	closed, ended := g.in.Close(), g.cmd.Wait()
	if _, ok := errors.AsType[*exec.ExitError](ended); ok {
		ended = nil
	}
	return errors.Join(told, closed, ended, os.Remove(g.lock))
}

// awaitLaunchGuard waits until the launch guard of an operation that was
// interrupted has done its work.
func awaitLaunchGuard(ctx context.Context, lock string) error {
	f, err := os.OpenFile(lock, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("launch guard: %w", err)
	}
	defer func() { _ = f.Close() }()
	locked := make(chan error, 1)
	go func() { locked <- unix.Flock(int(f.Fd()), unix.LOCK_EX) }()
	select {
	case err := <-locked:
		if err != nil {
			return fmt.Errorf("launch guard: lock %s: %w", lock, err)
		}
		return os.Remove(lock)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
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
	bases := make([]*blockdev.Lock, len(disks))
	for i, d := range disks {
		if err := d.open(); err != nil {
			return fmt.Errorf("launch guard: %w", err)
		}
		if bases[i], err = blockdev.DenyNewWriters(d.Prefix + d.baseDir.Path(d.Base)); err != nil {
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
	for i, d := range disks {
		errs = append(errs, d.guardLaunch(bases[i]))
	}
	return errors.Join(errs...)
}

// guardLaunch makes a start by the launch path safe, unless QEMU still writes to
// the base: then there was no cut. Nobody else can have begun to.
func (d *cutDisk) guardLaunch(base *blockdev.Lock) error {
	if written, err := base.Written(); err != nil || written {
		return err
	}
	return errors.Join(d.coverLaunch(), d.dir.Sync())
}
