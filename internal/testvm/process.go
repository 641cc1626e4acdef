package testvm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
)

// process is a running QEMU.
type process struct {
	pid    int
	signal func(syscall.Signal) error
	ended  chan struct{} // closed when it has ended, and was collected if it is ours to collect
	err    error         // how it ended, once ended is closed
}

// starts carries commands to the thread that starts every QEMU. QEMU is killed
// with its parent (PR_SET_PDEATHSIG), and the kernel takes the thread that
// started a process for its parent, so that thread must last as long as this
// process does.
var starts = sync.OnceValue(func() chan<- func() {
	c := make(chan func())
	go func() {
		runtime.LockOSThread()
		for start := range c {
			start()
		}
	}()
	return c
})

// startProcess starts a program with its output appended to a log.
func startProcess(args []string, log string) (*process, error) {
	out, err := os.OpenFile(log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig: syscall.SIGKILL,
		Setpgid:   true, // a Ctrl-C is for us to handle
	}
	started := make(chan error)
	starts() <- func() { started <- cmd.Start() }
	if err := errors.Join(<-started, out.Close()); err != nil {
		return nil, fmt.Errorf("start %s: %w", args[0], err)
	}
	p := &process{
		pid: cmd.Process.Pid, ended: make(chan struct{}),
		signal: func(s syscall.Signal) error { return cmd.Process.Signal(s) },
	}
	go func() {
		p.err = cmd.Wait()
		close(p.ended)
	}()
	return p, nil
}

func (p *process) running() bool {
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}

func (p *process) wait(ctx context.Context) error {
	select {
	case <-p.ended:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// kill ends the process for sure; it returns when it has ended.
func (p *process) kill() {
	_ = p.signal(syscall.SIGKILL) // fails only if it has ended
	<-p.ended
}
