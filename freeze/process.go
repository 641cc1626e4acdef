package freeze

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Process is one run of a process: pids are used again, pairs of pid and start
// time are not until the host boots.
type Process struct {
	PID       int    `json:"pid"`
	StartTime uint64 `json:"start_time"` // clock ticks since boot (proc(5), stat field 22)
}

// ProcessOf returns the process that has this pid now.
func ProcessOf(pid int) (Process, error) {
	_, start, err := readStat(pid)
	return Process{PID: pid, StartTime: start}, err
}

// Alive tells whether the process still runs. One that has ended and was not
// waited for does not.
func (p Process) Alive() bool {
	state, start, err := readStat(p.PID)
	return err == nil && start == p.StartTime && state != 'Z' && state != 'X'
}

// readStat returns a process's state and start time from /proc/PID/stat. The
// program's name in it may hold anything, closing brackets too.
func readStat(pid int) (state byte, start uint64, err error) {
	path := "/proc/" + strconv.Itoa(pid) + "/stat"
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, 0, err
	}
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(fields) < 20 {
		return 0, 0, fmt.Errorf("%s: %d fields after the name", path, len(fields))
	}
	start, err = strconv.ParseUint(fields[19], 10, 64)
	if err != nil {
		return 0, 0, fmt.Errorf("%s: start time: %w", path, err)
	}
	return fields[0][0], start, nil
}

// end waits for the process to end by itself until grace has passed, and then
// kills it. It never touches another process that has the pid now.
func (p Process) end(ctx context.Context, grace time.Duration) error {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", p.PID, err)
	}
	defer func() { _ = unix.Close(fd) }()
	if !p.Alive() { // asked after opening: the descriptor cannot mean another one
		return nil
	}
	ended, err := awaitExit(ctx, fd, grace)
	if ended || err != nil {
		return err
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", p.PID, err)
	}
	ended, err = awaitExit(ctx, fd, killTimeout)
	if err == nil && !ended {
		err = fmt.Errorf("process %d does not end within %s of being killed", p.PID, killTimeout)
	}
	return err
}

// awaitEnd waits until the process ends, and no longer than the limit.
func (p Process) awaitEnd(limit time.Duration) {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err != nil {
		return // it has ended
	}
	defer func() { _ = unix.Close(fd) }()
	// Waiting less than asked for does no harm.
	_, _ = awaitExit(context.Background(), fd, limit)
}

// ended returns a channel that is closed when the process ends within the limit.
func (p Process) ended(limit time.Duration) <-chan struct{} {
	ended := make(chan struct{})
	go func() {
		p.awaitEnd(limit)
		if !p.Alive() { // it may as well be that it could not be watched
			close(ended)
		}
	}()
	return ended
}

// awaitExit waits for the process behind a pidfd to end. It looks at the
// context often enough to be interrupted by it.
func awaitExit(ctx context.Context, pidfd int, limit time.Duration) (bool, error) {
	const slice = 50 * time.Millisecond
	for end := time.Now().Add(limit); ; {
		left := max(time.Until(end), 0)
		fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int(min(left, slice).Milliseconds()))
		switch {
		case err != nil && !errors.Is(err, unix.EINTR):
			return false, fmt.Errorf("wait for process: %w", err)
		case n > 0:
			return true, nil
		case ctx.Err() != nil:
			return false, context.Cause(ctx)
		case left == 0:
			return false, nil
		}
	}
}

// bootID names the run of the kernel that start times belong to.
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}
