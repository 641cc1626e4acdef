package memdump

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/internal/outlive"
	"github.com/vmsnap/vmsnap/monitor"
)

// Why a guard stops trying.
var errGaveUp = errors.New("the VM could not be resumed; the attempts have ended")

// RunGuard is the body of a guard process, which StartGuard has started and
// whose descriptors it inherits. It returns when the agent has closed its pipe,
// or QEMU has ended, or the VM that it had to resume runs. Cancelling the
// context is the same as closing the pipe.
//
// It logs by options, whose output is standard error when nil, in a way that
// never waits for the reader of the log.
func RunGuard(ctx context.Context, options hclog.LoggerOptions) error {
	outlive.IgnoreSignals()
	if options.Output == nil {
		options.Output = os.Stderr
	}
	out := outlive.NewPatientWriter(options.Output)
	defer out.Flush(guardFlush)
	options.Output = out
	agent := &wordPipe{fd: guardPipeFD}
	k, err := newPauseKeeper(agent, os.NewFile(guardQMPFD, "qmp"), hclog.New(&options))
	if err != nil {
		agent.send(wordFailed, err.Error())
		return fmt.Errorf("pause guard: %w", err)
	}
	k.protect(ctx)
	stop := context.AfterFunc(ctx, func() { _ = unix.Shutdown(agent.fd, unix.SHUT_RD) })
	defer stop()
	if err := k.run(ctx); err != nil {
		return fmt.Errorf("pause guard of %s: %w", k.VM, err)
	}
	return nil
}

// pauseKeeper is the guard seen from inside its process.
type pauseKeeper struct {
	guardHello
	agent *wordPipe
	log   hclog.Logger
	qemu  int // pidfd

	armed    bool
	deadline time.Time // of the pause
	heard    time.Time // when the agent last said something

	qmp     *os.File         // the agent's connection; nil once it was shut down
	alone   bool             // nobody else reads from it
	session *monitor.Session // nil while the agent is well
}

// newPauseKeeper learns from the agent what to do.
func newPauseKeeper(agent *wordPipe, qmp *os.File, log hclog.Logger) (*pauseKeeper, error) {
	k := &pauseKeeper{agent: agent, qmp: qmp}
	hello, err := k.readHello(time.Now().Add(guardStart))
	if err == nil {
		err = json.Unmarshal([]byte(hello), &k.guardHello)
	}
	if err != nil {
		return nil, fmt.Errorf("read what to do: %w", err)
	}
	k.log = log.With("vm", k.VM, "guard", k.ID)
	if k.qemu, err = openProcess(k.PID, k.StartTime); err != nil {
		return nil, err
	}
	return k, nil
}

func (k *pauseKeeper) readHello(deadline time.Time) (string, error) {
	for {
		if hello, ok := k.agent.word(); ok {
			return hello, nil
		}
		readable, _, err := k.agent.await(-1, deadline)
		switch {
		case err != nil:
			return "", err
		case !readable:
			return "", os.ErrDeadlineExceeded
		}
		if err := k.agent.fill(); err != nil {
			return "", err
		}
		if k.agent.closed {
			return "", errors.New("the agent closed its pipe")
		}
	}
}

// openProcess returns a pidfd of the process that has this pid and start time.
func openProcess(pid int, start uint64) (int, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return -1, ErrQEMUEnded
	}
	if err != nil {
		return -1, fmt.Errorf("open process %d: %w", pid, err)
	}
	// Asked after opening: the descriptor cannot mean another process then.
	if found, err := startTime(pid); err != nil || found != start {
		return -1, errors.Join(ErrQEMUEnded, err, unix.Close(fd))
	}
	return fd, nil
}

// startTime returns when a process started, in clock ticks since boot (proc(5),
// stat field 22).
func startTime(pid int) (uint64, error) {
	fields, err := statFields(procPath(pid, "stat"))
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// protect keeps the process alive when the agent is not. What fails of it makes
// the guard weaker, not useless.
func (k *pauseKeeper) protect(ctx context.Context) {
	if err := outlive.AvoidOOM(); err != nil {
		k.log.Warn("the guard is not protected", "error", err)
	}
	scope, err := outlive.EnterScope(ctx, "vmsnap-pause-guard", k.ID, "vmsnap pause guard of VM "+k.VM)
	if err != nil {
		k.log.Debug("the guard has no scope of its own", "error", err)
		return
	}
	k.log.Debug("the guard has a scope of its own", "scope", scope)
}

// run is the guard's life.
func (k *pauseKeeper) run(ctx context.Context) error {
	defer func() { _ = unix.Close(k.qemu) }()
	k.agent.send(wordReady)
	why := k.watch()
	if why == "" {
		// Not shut down: the agent may go on with its session.
		return k.qmp.Close()
	}
	k.agent.send(wordTaken)
	k.log.Warn("resuming the VM", "because", why)
	k.alone = k.agent.closed && ctx.Err() == nil || k.awaitYield()
	return k.takeOver(context.WithoutCancel(ctx))
}

// watch waits until the VM has to be resumed, and says why; "" means that there
// is nothing to do any more.
func (k *pauseKeeper) watch() (why string) {
	for {
		var due time.Time
		if k.armed {
			due = k.heard.Add(silence)
			if k.deadline.Before(due) {
				due = k.deadline
			}
		}
		readable, exited, err := k.agent.await(k.qemu, due)
		if err == nil && readable {
			// Before any deadline is looked at: a guard that was stopped itself
			// must first learn what it missed.
			err = k.agent.fill()
			k.listen()
		}
		switch {
		case exited:
			return ""
		case err != nil:
			return k.ifArmed(err.Error())
		case k.agent.closed:
			return k.ifArmed("the agent closed its pipe")
		case readable || !k.armed:
		case !time.Now().Before(k.deadline):
			return "the pause is over its limit"
		case time.Since(k.heard) >= silence:
			return "the agent is stopped or hung"
		}
	}
}

func (k *pauseKeeper) ifArmed(why string) string {
	if k.armed {
		return why
	}
	return ""
}

// listen does what the agent says.
func (k *pauseKeeper) listen() {
	for {
		word, ok := k.agent.word()
		if !ok {
			return
		}
		k.heard = time.Now()
		if limit, ok := parseArm(word); ok {
			k.armed, k.deadline = true, k.heard.Add(limit)
		}
		if word == wordDisarm {
			k.armed = false
			k.agent.send(wordDisarmed)
		}
	}
}

// awaitYield gives an agent that runs the time to let go of the connection. It
// tells whether nobody reads from it any more.
func (k *pauseKeeper) awaitYield() bool {
	deadline := time.Now().Add(yieldWait)
	for {
		for word, ok := k.agent.word(); ok; word, ok = k.agent.word() {
			if word == wordYield {
				return true
			}
		}
		readable, _, err := k.agent.await(-1, deadline)
		if err != nil || !readable || k.agent.fill() != nil {
			return false
		}
		if k.agent.closed {
			return true
		}
	}
}

// takeOver resumes the VM.
func (k *pauseKeeper) takeOver(ctx context.Context) error {
	defer k.shut()
	began := time.Now()
	ctx, cancel := context.WithTimeoutCause(ctx, guardGivesUp, errGaveUp)
	defer cancel()
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	go k.awaitExit(ctx, end)
	resumed := false
	for pause := firstAttempt; ; pause = min(2*pause, lastAttempt) {
		did, err := k.attempt(ctx)
		resumed = resumed || did
		var state *StateError
		switch {
		case err == nil:
			k.log.Warn("the VM runs", "resumed", resumed, "after", time.Since(began))
			return k.note()
		case errors.As(err, &state):
			return err
		}
		k.log.Warn("the VM is not known to run yet", "error", err)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			if errors.Is(context.Cause(ctx), ErrQEMUEnded) {
				return nil
			}
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
	}
}

// awaitExit ends the attempts when QEMU ends.
func (k *pauseKeeper) awaitExit(ctx context.Context, end context.CancelCauseFunc) {
	none := &wordPipe{fd: -1}
	for ctx.Err() == nil {
		if _, exited, err := none.await(k.qemu, time.Now().Add(lastAttempt)); exited || err != nil {
			end(errors.Join(ErrQEMUEnded, err))
			return
		}
	}
}

// attempt is one attempt to resume the VM.
func (k *pauseKeeper) attempt(ctx context.Context) (resumed bool, err error) {
	patience, shared := ownReply, k.qmp != nil && !k.alone
	if shared {
		patience = stolenReply
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	s, err := k.connect(ctx)
	if err != nil {
		return false, err
	}
	resumed, err = Resume(ctx, s)
	if err != nil && shared {
		k.shut()
	}
	return resumed, err
}

// connect returns a session: by the agent's connection as long as it serves,
// since another client may be waiting for its end, then by one of our own.
func (k *pauseKeeper) connect(ctx context.Context) (_ *monitor.Session, err error) {
	if k.session != nil && k.session.Err() == nil {
		return k.session, nil
	}
	if k.qmp != nil {
		k.session, err = monitor.Adopt(ctx, k.qmp)
		if err == nil || k.alone && errors.Is(err, monitor.ErrUnresponsive) {
			return k.session, err
		}
		k.shut()
	}
	for _, path := range k.Sockets {
		s, dialErr := monitor.Dial(ctx, path, monitor.WithGreetingDeadline(guardGreeting))
		if dialErr == nil {
			k.session = s
			return s, nil
		}
		err = errors.Join(err, dialErr)
	}
	return nil, err
}

// shut ends the connection for all who hold it. An agent that was stopped then
// finds its session gone, and reads no half of what was meant for the guard.
func (k *pauseKeeper) shut() {
	k.closeSession()
	if k.qmp == nil {
		return
	}
	// Both fail only if it has ended.
	_ = unix.Shutdown(int(k.qmp.Fd()), unix.SHUT_RDWR)
	_ = k.qmp.Close()
	k.qmp = nil
}

func (k *pauseKeeper) closeSession() {
	if k.session != nil {
		_ = k.session.Close()
		k.session = nil
	}
}

// note makes the file that says that the VM runs again.
func (k *pauseKeeper) note() error {
	if k.Resumed == "" {
		return nil
	}
	f, err := os.OpenFile(k.Resumed, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("note that the VM runs: %w", err)
	}
	dir, err := os.Open(filepath.Dir(k.Resumed))
	if err != nil {
		return errors.Join(fmt.Errorf("note that the VM runs: %w", err), f.Close())
	}
	err = errors.Join(f.Sync(), f.Close(), dir.Sync(), dir.Close())
	if err != nil {
		return fmt.Errorf("note that the VM runs: %w", err)
	}
	return nil
}
