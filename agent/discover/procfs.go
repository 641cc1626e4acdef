package discover

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// maxArguments bounds a command line in bytes. The kernel lets one argument
// have 128 KiB and all of them a quarter of the stack limit; a QEMU with
// hundreds of disks needs less than 1 MiB.
const maxArguments = 4 << 20

// flagForkNoExec is PF_FORKNOEXEC of the kernel's task flags: forked, and no
// program executed since.
const flagForkNoExec = 0x40

// procPath names a file of a process.
func procPath(pid int, name string) string {
	return "/proc/" + strconv.Itoa(pid) + "/" + name
}

// taskStat is what /proc/PID/stat tells.
type taskStat struct {
	comm      string
	state     byte
	parent    int
	flags     uint64
	startTime uint64
}

// dead reports whether the process is a zombie, or no longer even that.
func (s taskStat) dead() bool { return s.state == 'Z' || s.state == 'X' || s.state == 'x' }

// readStat reads a process's state. It fails with ErrGone when there is no
// such process.
func readStat(pid int) (taskStat, error) {
	data, err := os.ReadFile(procPath(pid, "stat"))
	if err != nil {
		return taskStat{}, gone(pid, err)
	}
	return parseStat(data)
}

// parseStat reads a line of /proc/PID/stat (proc_pid_stat(5)). The task's name
// is in parentheses and may hold any byte, so the last closing one ends it.
func parseStat(data []byte) (taskStat, error) {
	open, end := bytes.IndexByte(data, '('), bytes.LastIndexByte(data, ')')
	if open < 0 || end < open {
		return taskStat{}, fmt.Errorf("process state %q: no task name", data)
	}
	fields := strings.Fields(string(data[end+1:]))
	const first = 3 // the number, in the manual page, of the first field after the name
	if len(fields) <= 22-first || len(fields[0]) != 1 {
		return taskStat{}, fmt.Errorf("process state %q: %d fields after the name", data, len(fields))
	}
	s := taskStat{comm: string(data[open+1 : end]), state: fields[0][0]}
	var errs [3]error
	s.parent, errs[0] = strconv.Atoi(fields[4-first])
	s.flags, errs[1] = strconv.ParseUint(fields[9-first], 10, 64)
	s.startTime, errs[2] = strconv.ParseUint(fields[22-first], 10, 64)
	return s, errors.Join(errs[:]...)
}

// gone turns the errors by which /proc says that a process has exited into
// ErrGone.
func gone(pid int, err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("process %d: %w", pid, ErrGone)
	}
	return fmt.Errorf("process %d: %w", pid, err)
}

// readArguments returns the command line of a process.
func readArguments(pid int) ([]string, error) {
	f, err := os.Open(procPath(pid, "cmdline"))
	if err != nil {
		return nil, gone(pid, err)
	}
	defer func() { _ = f.Close() }()
	data, err := io.ReadAll(io.LimitReader(f, maxArguments+1))
	if err != nil {
		return nil, gone(pid, err)
	}
	if len(data) > maxArguments {
		return nil, fmt.Errorf("process %d: command line longer than %d bytes", pid, maxArguments)
	}
	if len(data) == 0 { // in the midst of an execution, or of its exit
		return nil, fmt.Errorf("process %d: no command line: %w", pid, ErrNotQEMU)
	}
	return strings.Split(strings.TrimSuffix(string(data), "\x00"), "\x00"), nil
}

// credentials are who a process runs as.
type credentials struct {
	uid, gid int   // effective
	groups   []int // supplementary
}

// readCredentials reads who a process runs as. The owner of its directory is
// root instead for a process that is not dumpable, so the status is read.
func readCredentials(pid int) (credentials, error) {
	data, err := os.ReadFile(procPath(pid, "status"))
	if err != nil {
		return credentials{}, gone(pid, err)
	}
	return parseCredentials(pid, string(data))
}

func parseCredentials(pid int, status string) (c credentials, err error) {
	found := 0
	for line := range strings.Lines(status) {
		key, rest, _ := strings.Cut(line, ":")
		fields := strings.Fields(rest)
		switch {
		case key == "Uid" && len(fields) >= 2:
			c.uid, err = strconv.Atoi(fields[1])
			found++
		case key == "Gid" && len(fields) >= 2:
			c.gid, err = strconv.Atoi(fields[1])
			found++
		case key == "Groups":
			for _, f := range fields {
				var g int
				if g, err = strconv.Atoi(f); err != nil {
					break
				}
				c.groups = append(c.groups, g)
			}
		}
		if err != nil {
			return credentials{}, fmt.Errorf("process %d: status: %w", pid, err)
		}
	}
	if found < 2 {
		return credentials{}, fmt.Errorf("process %d: status names no user", pid)
	}
	return c, nil
}

// startedAt turns a start time, in ticks of 10 ms on every architecture that Go
// runs on, into wall-clock time. The boot clock counts the time asleep, as the
// start time does.
func startedAt(ticks uint64) (time.Time, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return time.Time{}, fmt.Errorf("boot clock: %w", err)
	}
	const tick = 10 * time.Millisecond
	age := time.Duration(ts.Nano()) - time.Duration(ticks)*tick
	return time.Now().Add(-age).Truncate(tick), nil
}

// Same reports whether pid is a live process that started at startTime. A
// zombie is not live.
func Same(pid int, startTime uint64) bool {
	s, err := readStat(pid)
	return err == nil && !s.dead() && s.startTime == startTime
}
