package memdump

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// What a guard process inherits.
const (
	guardPipeFD = 3 // its end of a socket pair, whose other end the agent holds
	guardQMPFD  = 4 // a duplicate of the agent's QMP connection
)

// The socket pair carries words, one a line. The agent's first line is a
// guardHello in JSON, the guard's first is ready or why it is not.
const (
	wordArm    = "arm"    // with the limit in nanoseconds: the VM is about to be paused
	wordBeat   = "beat"   // the agent's process runs
	wordDisarm = "disarm" // the VM runs again
	wordYield  = "yield"  // the agent's session has let go of the connection

	wordReady    = "ready"
	wordFailed   = "failed"   // with the reason
	wordDisarmed = "disarmed" // the guard did nothing and will do nothing
	wordTaken    = "taken"    // the guard resumes the VM; the connection is its own
)

// longestHello bounds a line: the paths of a VM's monitors.
const longestHello = 1 << 20

// guardHello is what a guard is told.
type guardHello struct {
	ID        string   `json:"id"` // of its scope
	VM        string   `json:"vm"`
	Sockets   []string `json:"sockets"`
	PID       int      `json:"pid"`
	StartTime uint64   `json:"start_time"`
	Resumed   string   `json:"resumed,omitempty"`
}

// Deadlines of the pause guard. Together they bound the time from an agent's
// death or stop to a guest that runs: silence + yieldWait + stolenReply and some
// milliseconds, which is below two seconds.
const (
	// beatEvery: ten beats make a silence, so that a few which the scheduler
	// delays do not spoil a save.
	beatEvery = 100 * time.Millisecond
	// silence is how long an armed guard waits for a beat.
	silence = time.Second
	// yieldWait: an agent that runs lets go within a millisecond. One that is
	// stopped never does.
	yieldWait = 100 * time.Millisecond
	// stolenReply is how long QEMU may take to answer while a stopped agent
	// still has the connection: it may have woken up and read the answer.
	stolenReply = 500 * time.Millisecond
	// ownReply is how long it may take on a connection that nobody else reads:
	// a pause that is being begun first drains the disks.
	ownReply = 5 * time.Second
	// guardGreeting is for one of the VM's monitors, which another client may
	// hold while the next one is free.
	guardGreeting = time.Second
	// First and last pause between attempts. A monitor that was shut down
	// serves the next client within a millisecond.
	firstAttempt, lastAttempt = 10 * time.Millisecond, time.Second
	// guardGivesUp: longer than QEMU's main loop ever hangs in slow storage. By
	// then there is an agent again, or a person, who may have paused the VM.
	guardGivesUp = 5 * time.Minute

	// guardStart: exec under load, and systemd's answer for the scope (2 s).
	guardStart = 15 * time.Second
	// guardAnswer: the guard answers a disarm in microseconds. One that does
	// not is stopped or hung, and is killed.
	guardAnswer = 2 * time.Second
	// guardEnd: it ends in a millisecond when it has nothing to do.
	guardEnd = 5 * time.Second
	// guardWrite: the pipe holds hundreds of words, so a full one has no reader.
	guardWrite = 100 * time.Millisecond
	// guardFlush is for a log that may lead to a stopped agent.
	guardFlush = 200 * time.Millisecond
)

// wordPipe is the guard's end of the socket pair. It is polled together with
// other descriptors, so it is not left to the runtime's poller.
type wordPipe struct {
	fd     int
	unread []byte
	closed bool // by the agent, and nothing unread is left in the kernel
}

// send tells the agent something. An agent that does not take it is dead or
// stopped, and finds out by other means.
func (p *wordPipe) send(words ...string) {
	_ = unix.Send(p.fd, []byte(strings.Join(words, " ")+"\n"), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
}

// fill reads what has come, without waiting.
func (p *wordPipe) fill() error {
	var chunk [4096]byte
	n, _, err := unix.Recvfrom(p.fd, chunk[:], unix.MSG_DONTWAIT)
	switch {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
		return nil
	case errors.Is(err, unix.ECONNRESET): // closed, with words of ours unread
		p.closed = true
		return nil
	case err != nil:
		return fmt.Errorf("read from the agent: %w", err)
	case n == 0:
		p.closed = true
		return nil
	}
	p.unread = append(p.unread, chunk[:n]...)
	if len(p.unread) > longestHello {
		return errors.New("read from the agent: a line without an end")
	}
	return nil
}

// word returns the next line that has come in full.
func (p *wordPipe) word() (string, bool) {
	i := bytes.IndexByte(p.unread, '\n')
	if i < 0 {
		return "", false
	}
	line := string(p.unread[:i])
	p.unread = p.unread[i+1:]
	return line, true
}

// await waits for something to be read, or for the pidfd to tell of an exit,
// until the deadline; a zero one is none.
func (p *wordPipe) await(pidfd int, deadline time.Time) (readable, exited bool, err error) {
	fds := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}, {Fd: int32(pidfd), Events: unix.POLLIN}}
	if p.closed {
		fds[0].Fd = -1
	}
	for {
		timeout := -1
		if !deadline.IsZero() {
			timeout = int(max(time.Until(deadline)+time.Millisecond-1, 0) / time.Millisecond)
		}
		_, err := unix.Poll(fds, timeout)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return false, false, fmt.Errorf("poll: %w", err)
		}
		return fds[0].Revents != 0, fds[1].Revents != 0, nil
	}
}

// parseArm returns the limit of an arm.
func parseArm(word string) (time.Duration, bool) {
	text, ok := strings.CutPrefix(word, wordArm+" ")
	if !ok {
		return 0, false
	}
	ns, err := strconv.ParseInt(text, 10, 64)
	return time.Duration(ns), err == nil && ns > 0
}
