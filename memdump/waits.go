package memdump

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A thread is what one thread of a process does at a moment.
type thread struct {
	tid      int
	state    string // of proc(5): "R", "S", "D", "T", …
	faulting bool   // it waits for userfaultfd to let it write or read
	running  bool   // in user space, or about to be
	kernels  bool   // the kernel's own thread on the process's behalf: vhost, io_uring
	call     int    // the system call that it is in; -1 for none
	switches string // how often it has waited for something
}

// Flags of a thread that runs in the kernel only and has no system call to be
// in (PF_IO_WORKER, PF_USER_WORKER of Linux 6.4 in include/linux/sched.h).
const (
	flagIOWorker   = 0x00000010
	flagUserWorker = 0x00004000
)

// threads reads what the threads of a process do.
func threads(pid int) ([]thread, error) {
	dir := procPath(pid, "task")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var all []thread
	for _, e := range entries {
		t, err := readThread(dir + "/" + e.Name())
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) { // it ended meanwhile
			continue
		}
		if err != nil {
			return nil, err
		}
		if t.tid, err = strconv.Atoi(e.Name()); err != nil {
			return nil, err
		}
		all = append(all, t)
	}
	return all, nil
}

func readThread(dir string) (thread, error) {
	var t thread
	wchan, err := os.ReadFile(dir + "/wchan")
	if err != nil {
		return t, err
	}
	call, err := os.ReadFile(dir + "/syscall")
	if err != nil {
		return t, err
	}
	status, err := os.ReadFile(dir + "/status")
	if err != nil {
		return t, err
	}
	stat, err := statFields(dir + "/stat")
	if err != nil {
		return t, err
	}
	flags, err := strconv.ParseUint(stat[6], 10, 32) // field 9
	if err != nil {
		return t, fmt.Errorf("%s/stat: flags: %w", dir, err)
	}
	t.kernels = flags&(flagIOWorker|flagUserWorker) != 0
	t.faulting = string(wchan) == "handle_userfault"
	if t.call, t.running, err = parseCall(string(call)); err != nil {
		return t, err
	}
	fields := statusFields(status)
	if len(fields["State"]) == 0 {
		return t, fmt.Errorf("%s/status tells no state", dir)
	}
	t.state = fields["State"][0]
	t.switches = strings.Join(fields["voluntary_ctxt_switches"], "")
	return t, nil
}

// parseCall reads /proc/PID/task/TID/syscall: "running", or the number of the
// system call with its arguments, or -1 for a wait in none.
func parseCall(s string) (call int, running bool, err error) {
	number, _, _ := strings.Cut(strings.TrimSpace(s), " ")
	if number == "running" {
		return -1, true, nil
	}
	if call, err = strconv.Atoi(number); err != nil {
		return -1, false, fmt.Errorf("a thread's system call: %w", err)
	}
	return call, false, nil
}

// idleCalls are the system calls in which QEMU's threads wait for something to
// do: locks and conditions, descriptors, timers, signals, completed I/O, and
// the guest's CPU in KVM. A thread that saves memory waits in none of these
// for its target: QEMU makes the target's descriptor blocking, and so it waits
// in the call that writes.
var idleCalls = append([]int{
	unix.SYS_FUTEX,
	unix.SYS_PPOLL, unix.SYS_PSELECT6, unix.SYS_EPOLL_PWAIT,
	unix.SYS_NANOSLEEP, unix.SYS_CLOCK_NANOSLEEP,
	unix.SYS_RT_SIGTIMEDWAIT,
	unix.SYS_IO_GETEVENTS, unix.SYS_IO_URING_ENTER,
	unix.SYS_IOCTL,
	unix.SYS_RESTART_SYSCALL, // one of these, after a signal
}, idleCallsOfArch...)

// mayBeSaving tells of a thread that is held in what could be the writing of
// memory to a target. One that runs is not: it would serve those who wait for
// userfaultfd before long.
func (t thread) mayBeSaving() bool {
	if t.running || t.faulting || t.kernels {
		return false
	}
	return !slices.Contains(idleCalls, t.call)
}

// halted tells of a thread that does not run because somebody stopped it.
func (t thread) halted() bool { return t.state == "T" || t.state == "t" }
