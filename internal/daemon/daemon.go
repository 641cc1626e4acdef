package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"connectrpc.com/connect"

	"github.com/vmsnap/vmsnap/api/client"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// Deadlines of this package: far beyond what a busy machine takes.
const (
	// readyDeadline: a start takes a fraction of a second.
	readyDeadline = 30 * time.Second
	// stopDeadline: vmsnapd lets operations come to a safe end for up to 60 s.
	stopDeadline = 70 * time.Second
	// stateDeadline: VMs are seen to start and end within a scan's interval.
	stateDeadline = 20 * time.Second
)

// stateInterval is the time between looks at a VM, whose changes the API does
// not announce.
const stateInterval = 10 * time.Millisecond

// Config describes a daemon.
type Config struct {
	Binary string            // the vmsnapd to run
	Dir    string            // state, sockets and log; made if it is not there, and left behind
	VMs    map[string]string // UUIDs by name
	// Metrics is the address that metrics are served on; empty for none.
	Metrics string
	// Tools is the directory of the qemu-img that it runs; empty for the host's.
	Tools string
}

// Daemon is a running vmsnapd and a client of it.
type Daemon struct {
	*client.Client
	Ready time.Duration // from its start until it served requests

	cmd   *exec.Cmd
	log   string
	ended chan struct{} // closed when it was collected
	err   error         // how it ended, once ended is closed
}

// Start starts a daemon and returns when it serves requests. The caller ends it
// with Stop.
func Start(ctx context.Context, c Config) (*Daemon, error) {
	d, err := start(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("start vmsnapd: %w", err)
	}
	return d, nil
}

func start(ctx context.Context, c Config) (*Daemon, error) {
	if _, err := os.Stat(c.Binary); err != nil {
		return nil, fmt.Errorf("%w: run `make build`", err)
	}
	if err := list(c); err != nil {
		return nil, err
	}
	n, err := listenForReady(filepath.Join(c.Dir, "notify.sock"))
	if err != nil {
		return nil, err
	}
	defer n.close()
	socket := filepath.Join(c.Dir, "vmsnapd.sock")
	d := &Daemon{Client: client.New(socket), log: filepath.Join(c.Dir, "vmsnapd.log"), ended: make(chan struct{})}
	d.cmd = exec.Command(c.Binary, "--config", os.DevNull, "--state-dir", filepath.Join(c.Dir, "state"), "--run-dir", c.Dir,
		"--socket", socket, "--metrics-listen", c.Metrics, "--vms-dir", filepath.Join(c.Dir, "vms.d"), "--listed-only")
	d.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+n.path)
	if c.Tools != "" {
		d.cmd.Env = append(d.cmd.Env, "PATH="+c.Tools+":"+os.Getenv("PATH"))
	}
	began := time.Now()
	if err := d.launch(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, readyDeadline)
	defer cancel()
	if err := n.await(ctx, d.ended); err != nil {
		_ = d.cmd.Process.Kill() // fails only if it has ended
		<-d.ended
		return nil, fmt.Errorf("wait until it is ready: %w%s", err, d.logTail())
	}
	d.Ready = time.Since(began)
	return d, nil
}

// list makes the daemon's directories and names the VMs it manages.
func list(c Config) error {
	dir := filepath.Join(c.Dir, "vms.d")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for name, uuid := range c.VMs {
		text := fmt.Sprintf("match:\n  uuid: %s\n", uuid)
		if err := os.WriteFile(filepath.Join(dir, name+".yaml"), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// launch starts the process and leaves a goroutine to collect it.
func (d *Daemon) launch() error {
	log, err := os.OpenFile(d.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	d.cmd.Stdout, d.cmd.Stderr = log, log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig: syscall.SIGTERM,
		Setpgid:   true, // a Ctrl-C is for us to handle
	}
	started := make(chan error)
	go func() {
		// The kernel takes the thread that started a process for its parent:
		// it must last until the process has ended.
		runtime.LockOSThread()
		err := d.cmd.Start()
		started <- err
		if err == nil {
			d.err = d.cmd.Wait()
			close(d.ended)
		}
	}()
	return errors.Join(<-started, log.Close())
}

// PID returns its process id.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// Stop ends the daemon, and fails if it did not end well or had ended before.
func (d *Daemon) Stop() error {
	d.Close()
	select {
	case <-d.ended:
		return fmt.Errorf("vmsnapd has ended: %w%s", d.err, d.logTail())
	default:
	}
	_ = d.cmd.Process.Signal(syscall.SIGTERM) // fails only if it has ended
	hung := time.NewTimer(stopDeadline)
	defer hung.Stop()
	select {
	case <-d.ended:
	case <-hung.C:
		_ = d.cmd.Process.Kill()
		<-d.ended
		return fmt.Errorf("vmsnapd did not stop within %s%s", stopDeadline, d.logTail())
	}
	if d.err != nil {
		return fmt.Errorf("stop vmsnapd: %w%s", d.err, d.logTail())
	}
	return nil
}

// AwaitRunning returns when the daemon shows a VM as running, with a guest agent
// unless it has no channel for one.
func (d *Daemon) AwaitRunning(ctx context.Context, vm string) error {
	return d.await(ctx, vm, "running", func(vm *vmsnapv1.VM) bool {
		return vm.GetState() == vmsnapv1.VMState_VM_STATE_RUNNING &&
			vm.GetGuestAgent().GetPresence() != vmsnapv1.GuestAgent_PRESENCE_DISCONNECTED
	})
}

// AwaitStopped returns when the daemon shows a VM as stopped.
func (d *Daemon) AwaitStopped(ctx context.Context, vm string) error {
	return d.await(ctx, vm, "stopped", func(vm *vmsnapv1.VM) bool {
		return vm.GetState() == vmsnapv1.VMState_VM_STATE_STOPPED
	})
}

func (d *Daemon) await(ctx context.Context, vm, what string, reached func(*vmsnapv1.VM) bool) error {
	ctx, cancel := context.WithTimeout(ctx, stateDeadline)
	defer cancel()
	ticker := time.NewTicker(stateInterval)
	defer ticker.Stop()
	for {
		res, err := d.VMs().GetVM(ctx, connect.NewRequest(&vmsnapv1.GetVMRequest{Vm: vm}))
		if err == nil {
			if reached(res.Msg.GetVm()) {
				return nil
			}
			err = fmt.Errorf("it is %s, its guest agent %s", res.Msg.GetVm().GetState(), res.Msg.GetVm().GetGuestAgent().GetPresence())
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait until VM %s is %s: %w%s", vm, what, err, d.logTail())
		case <-ticker.C:
		}
	}
}

// logTailSize is how much of the log an error shows, in bytes.
const logTailSize = 2000

func (d *Daemon) logTail() string {
	b, err := os.ReadFile(d.log)
	if err != nil {
		return fmt.Sprintf("\nits log: %v", err)
	}
	return fmt.Sprintf("\nits log ends:\n%s", b[max(0, len(b)-logTailSize):])
}
