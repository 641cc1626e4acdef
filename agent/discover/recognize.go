package discover

import (
	"errors"
	"io/fs"
	"os"
	"path"
	"strings"
)

// executable returns the path of a process's program. It is "" without an
// error when it may not be read; kernel threads have none and are ErrNotQEMU.
func executable(pid int) (string, error) {
	exe, err := os.Readlink(procPath(pid, "exe"))
	switch {
	case err == nil:
		// An upgraded package leaves running QEMUs with a deleted program.
		return strings.TrimSuffix(exe, " (deleted)"), nil
	case errors.Is(err, fs.ErrPermission):
		return "", nil
	case errors.Is(err, fs.ErrNotExist):
		return "", ErrNotQEMU // a kernel thread or a zombie; a process that has gone is neither
	default:
		return "", gone(pid, err)
	}
}

// looksLikeQEMU tells a QEMU by its program, and where that may not be read by
// its task name, which the kernel cuts to 15 bytes. It costs one readlink for
// nearly every process, and so comes before all else.
func looksLikeQEMU(pid int) (binary string, err error) {
	exe, err := executable(pid)
	if err != nil {
		return "", err
	}
	if exe != "" {
		if !IsQEMUName(path.Base(exe)) {
			return "", ErrNotQEMU
		}
		return exe, nil
	}
	s, err := readStat(pid)
	if err != nil {
		return "", err
	}
	if !IsQEMUName(s.comm) {
		return "", ErrNotQEMU
	}
	return s.comm, nil
}

// IsQEMUName reports whether a program of this name is a QEMU system emulator.
// Some distributions wrap it: ".qemu-system-x86_64-wrapped".
func IsQEMUName(name string) bool {
	name = strings.TrimPrefix(name, ".")
	return strings.HasPrefix(name, "qemu-system-") || name == "qemu-kvm" || name == "kvm" ||
		name == "qemu-kvm-wrapped"
}

// asyncTeardown is how QEMU names the process that frees its memory after it.
const asyncTeardown = "cleanup/"

// isBystander tells the processes that carry a VM's command line and do not
// run it: before -daemonize has forked twice the launcher and the child
// between, later the children that QEMU forks for helper programs. It reports
// false once -daemonize is done and the process is on its own.
//
// The process that runs a VM has executed QEMU itself, or, daemonized, was
// forked by a QEMU that has gone; any other is a bystander.
func isBystander(s taskStat, daemonized bool) bool {
	if strings.HasPrefix(s.comm, asyncTeardown) {
		return true
	}
	forked := s.flags&flagForkNoExec != 0
	if forked != daemonized {
		return true
	}
	if !forked {
		return false
	}
	_, err := looksLikeQEMU(s.parent)
	return err == nil
}
