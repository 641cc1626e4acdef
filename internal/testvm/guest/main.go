package main

import (
	"fmt"
	"os"
	"syscall"
)

const serverArg = "server"

func main() {
	if len(os.Args) > 1 && os.Args[1] == serverArg {
		fmt.Fprintf(os.Stderr, "testvm guest: %v\n", serve())
		os.Exit(1)
	}
	fmt.Fprintf(os.Stderr, "testvm guest: %v\n", boot())
	// The end of process 1 would be a panic and a reboot, over and over. The
	// host is told sooner by a machine that goes off.
	fmt.Fprintf(os.Stderr, "testvm guest: %v\n", syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF))
}

// boot is what process 1 does. It returns only with an error.
func boot() error {
	if err := mountKernel(); err != nil {
		return err
	}
	params, err := readParameters()
	if err != nil {
		return err
	}
	if err := loadModules(params); err != nil {
		return err
	}
	if err := os.Setenv("PATH", "/bin:/sbin"); err != nil {
		return err
	}
	server, err := syscall.ForkExec("/init", []string{"/init", serverArg}, &syscall.ProcAttr{
		Env:   os.Environ(),
		Files: []uintptr{0, 1, 2},
	})
	if err != nil {
		return fmt.Errorf("start the server: %w", err)
	}
	return reap(server)
}

// reap collects dead processes until the server is among them.
func reap(server int) error {
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case err == syscall.EINTR:
		case err != nil:
			return fmt.Errorf("wait: %w", err)
		case pid == server:
			return fmt.Errorf("the server ended: status %#x", uint32(status))
		}
	}
}
