package agent

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/launch"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/monitor"
)

const (
	// launchWithin bounds how long a QEMU that was started takes until it waits
	// for its memory: it opens its images and sets its memory up.
	launchWithin = 2 * time.Minute
	// externalWithin bounds how long a controller may take to start QEMU.
	externalWithin = 10 * time.Minute
	// endWithin bounds how long QEMU takes to end once it was told to: it writes
	// its images out, and gives its memory back.
	endWithin = 30 * time.Second
	// launchPoll lies between two looks at a QEMU that starts: its process and its
	// monitor are not announced to recipes.
	launchPoll = 20 * time.Millisecond
	// launchAsk lies between two questions to systemd.
	launchAsk = 500 * time.Millisecond
)

// launched starts a QEMU and returns it when it waits for its memory, or, if it
// was not to wait, when its monitor answers. The VM's own launcher is told what
// to start by the operation.
func (r *restore) launched(ctx context.Context, spec launch.Spec) (*run, error) {
	within := launchWithin
	if spec.Launcher == launch.External {
		within = externalWithin
		text, err := json.Marshal(spec)
		if err != nil {
			return nil, err
		}
		r.o.Output(string(text))
		r.warn(warnAwaitsLauncher, "", "QEMU is to be started by the VM's own launcher, as the output of this step says (vmsnap operation show "+r.o.ID()+" -o json)")
	}
	ctx, stop := context.WithTimeoutCause(ctx, within, fault.New(fault.Failed, "VM %s: no QEMU of it waits for its memory after %s", r.vm.name(), within))
	defer stop()
	l, err := spec.Start(ctx)
	if err != nil {
		return nil, err
	}
	if l.Warning != "" {
		r.warn(warnLauncher, "", l.Warning)
	}
	r.child = l
	asked := time.Now()
	for {
		run, err := r.up(ctx, spec)
		if run != nil || err != nil {
			return run, err
		}
		if time.Since(asked) > launchAsk {
			if err := l.Failed(ctx); err != nil {
				return nil, err
			}
			asked = time.Now()
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-r.stopping:
			return nil, op.ErrLeave
		case <-time.After(launchPoll):
		}
	}
}

// up returns the VM's QEMU process once it is as the specification wants it.
func (r *restore) up(ctx context.Context, spec launch.Spec) (*run, error) {
	run, err := r.vm.alone()
	if run == nil || err != nil {
		return nil, err
	}
	if waiting(spec.Command) != waiting(run.proc.Args) {
		return nil, fault.New(fault.Busy, "VM %s was started by somebody else meanwhile (process %d)", r.vm.name(), run.proc.PID)
	}
	s, err := r.vm.monitorOf(run)
	if err != nil {
		return nil, nil //nolint:nilerr // it has not opened its sockets yet
	}
	st, err := s.QueryStatus(ctx)
	if err != nil || waiting(spec.Command) && st.Status != monitor.RunStateInMigrate {
		return nil, nil //nolint:nilerr // it is asked again
	}
	return run, nil
}

// waiting reports whether a command line is that of a QEMU that waits for its
// memory.
func waiting(args []string) bool {
	p, err := discover.ParseCommandLine(args)
	return err == nil && p.Incoming == "defer"
}

// quit tells a QEMU to end.
func (r *restore) quit(ctx context.Context, run *run) error {
	s, err := r.vm.monitorOf(run)
	if err != nil {
		return err
	}
	ctx, stop := context.WithTimeout(ctx, wakeOnce)
	defer stop()
	err = s.Execute(ctx, "quit", nil, nil)
	if errors.Is(err, monitor.ErrGone) || errors.Is(err, monitor.ErrOutcomeUnknown) {
		return nil // whether it ends is seen
	}
	return err
}

// awaitGone waits until a QEMU process has ended, and kills it when it does not.
// The agent has taken it off its VM then.
func (r *restore) awaitGone(ctx context.Context, run *run) error {
	deadline := time.Now().Add(endWithin)
	killed := false
	for {
		lives := discover.Same(run.proc.PID, run.proc.StartTime)
		if _, known := r.runOf(run.proc); !lives && known == nil {
			return nil
		}
		if lives && !killed && time.Now().After(deadline) {
			killed = true
			if err := kill(run.proc.PID, run.proc.StartTime); err != nil {
				return fault.New(kindOf(err), "VM %s: its QEMU process %d does not end, and cannot be killed: %w", r.vm.name(), run.proc.PID, err)
			}
		}
		if time.Now().After(deadline.Add(endWithin)) {
			return fault.New(fault.Unresponsive, "VM %s: its QEMU process %d does not end", r.vm.name(), run.proc.PID)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(launchPoll): // of two that end, and one of which the agent takes note
		}
	}
}

// kill kills one process, and no other that has its number by now.
func kill(pid int, startTime uint64) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	if !discover.Same(pid, startTime) {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	return nil
}

// openMemoryDir opens the directory of a memory file.
func openMemoryDir(dir string) (*os.Root, error) { return os.OpenRoot(filepath.Clean(dir)) }
