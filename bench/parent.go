package main

import (
	"os/exec"
	"runtime"
	"syscall"
)

// parent starts processes that end with this one, however that ends.
type parent struct{ births chan birth }

type birth struct {
	cmd     *exec.Cmd
	started chan error
}

func newParent() *parent {
	p := &parent{make(chan birth)}
	go func() {
		// The kernel takes the thread that started a process for its parent,
		// whose end is the process's: none is left behind.
		runtime.LockOSThread()
		for b := range p.births {
			b.started <- b.cmd.Start()
		}
	}()
	return p
}

// start starts a process, which the caller collects.
func (p *parent) start(cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	b := birth{cmd, make(chan error)}
	p.births <- b
	return <-b.started
}

// end ends the thread, and what it has started and still runs.
func (p *parent) end() { close(p.births) }
