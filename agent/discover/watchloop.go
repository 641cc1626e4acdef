package discover

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// run delivers events until the context is done.
func (l *loop) run() {
	defer close(l.w.events)
	defer func() {
		if err := l.release(); err != nil {
			l.w.opts.Report(err)
		}
	}()
	l.scan()
	l.emit(Event{Kind: Listed})
	for l.ctx.Err() == nil {
		if err := l.turn(); err != nil {
			l.reportIf(err)
			return
		}
	}
}

// turn waits once, and handles what happened: exits before executions, so that
// a reused pid is free for its new owner.
func (l *loop) turn() error {
	var ready [64]unix.EpollEvent
	n, err := unix.EpollWait(l.epoll, ready[:], int(max(0, time.Until(l.nextScan)).Milliseconds())+1)
	if err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("epoll: %w", err)
	}
	events := false
	for _, e := range ready[:max(0, n)] {
		if t := l.byFD[int(e.Fd)]; t != nil {
			l.exited(t)
		}
		events = events || l.connector != nil && int(e.Fd) == l.connector.fd
	}
	if events {
		l.readExecutions()
	}
	if l.ctx.Err() == nil && !time.Now().Before(l.nextScan) {
		l.scan()
	}
	return nil
}

// readExecutions handles the executions that are waiting. Lost ones are made
// up for by a scan.
func (l *loop) readExecutions() {
	for l.ctx.Err() == nil {
		e, err := l.connector.next()
		switch {
		case err == nil:
			l.executed(e)
		case errors.Is(err, unix.EAGAIN):
			return
		case errors.Is(err, errOverrun):
			l.nextScan = time.Now()
		default:
			l.w.setSource(SourceScan, err.Error())
			l.w.opts.Report(errors.Join(err, l.connector.close()))
			l.connector = nil
			l.nextScan = time.Now()
			return
		}
	}
}

// executed looks at a process that has executed a program. A process that was
// known before has replaced itself, or has gone and left its pid to another.
func (l *loop) executed(e execution) {
	if t := l.byPID[e.pid]; t != nil {
		if e.when <= t.inspected {
			return
		}
		l.exited(t)
	}
	l.look(e.pid)
}

// scan looks for VMs that are not known yet. Those that are need no look: their
// descriptor tells when they end. A bystander may have become one.
func (l *loop) scan() {
	defer func() { l.nextScan = time.Now().Add(l.interval()) }()
	for _, t := range l.byPID {
		if t.pidfd < 0 && !Same(t.pid, t.process.StartTime) {
			l.exited(t)
		}
	}
	pids, err := listProcesses()
	if err != nil {
		l.w.opts.Report(err)
		return
	}
	present := make(map[int]bool, len(pids))
	for _, pid := range pids {
		present[pid] = true
		t := l.byPID[pid]
		if l.ctx.Err() != nil || t != nil && t.vm {
			continue
		}
		if t != nil {
			l.reportIf(l.forget(t))
		}
		l.look(pid)
	}
	for pid := range l.failed {
		if !present[pid] {
			delete(l.failed, pid)
		}
	}
}

// interval is the time to the next scan.
func (l *loop) interval() time.Duration {
	if l.connector == nil {
		return l.w.opts.ScanInterval
	}
	for _, t := range l.byPID {
		if t.pidfd < 0 {
			return l.w.opts.ScanInterval
		}
	}
	return max(auditInterval, l.w.opts.ScanInterval)
}

// look inspects a process that is not tracked, and tracks it if it is a QEMU.
func (l *loop) look(pid int) {
	t := &tracked{pid: pid, pidfd: -1}
	var err error
	if t.inspected, err = monotonic(); err == nil {
		t.process, err = Inspect(pid)
	}
	t.vm = err == nil
	switch {
	case err == nil:
	case errors.Is(err, errBystander):
		var s taskStat
		if s, err = readStat(pid); err != nil {
			return
		}
		t.process.StartTime = s.startTime
	case errors.Is(err, ErrNotQEMU), errors.Is(err, ErrGone):
		return
	default:
		l.reportOnce(pid, err)
		return
	}
	delete(l.failed, pid)
	if l.track(t) && t.vm {
		l.emit(Event{Started, t.process})
	}
}

func (l *loop) reportOnce(pid int, err error) {
	if text := err.Error(); l.failed[pid] != text {
		l.failed[pid] = text
		l.w.opts.Report(err)
	}
}

// track waits for the exit of a process. It reports whether the process is
// still the one that was inspected.
func (l *loop) track(t *tracked) bool {
	fd, err := l.openPidfd(t.pid)
	switch {
	case errors.Is(err, unix.ESRCH):
		return false
	case err != nil:
		l.reportOnce(t.pid, fmt.Errorf("process %d: its exit will be seen by scanning: %w", t.pid, err))
	default:
		t.pidfd = fd
		l.byFD[fd] = t
		err = l.await(fd)
	}
	l.byPID[t.pid] = t
	if err != nil && t.pidfd >= 0 || !Same(t.pid, t.process.StartTime) {
		l.reportIf(errors.Join(err, l.forget(t)))
		return false
	}
	if t.pidfd < 0 {
		l.nextScan = earlier(l.nextScan, time.Now().Add(l.w.opts.ScanInterval))
	}
	return true
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

func (l *loop) reportIf(err error) {
	if err != nil {
		l.w.opts.Report(fmt.Errorf("watch processes: %w", err))
	}
}

// exited forgets a process that is gone. After a bystander a scan follows: the
// launcher of a daemonized QEMU leaves when its child is ready.
func (l *loop) exited(t *tracked) {
	l.reportIf(l.forget(t))
	if t.vm {
		l.emit(Event{Exited, t.process})
		return
	}
	l.nextScan = time.Now()
}

// forget stops waiting for a process. Closing its descriptor takes it out of
// the epoll set: it was never duplicated.
func (l *loop) forget(t *tracked) error {
	delete(l.byPID, t.pid)
	if t.pidfd < 0 {
		return nil
	}
	delete(l.byFD, t.pidfd)
	return unix.Close(t.pidfd)
}

// emit delivers an event. While the reader lags the kernel keeps what happens,
// and says so when it cannot.
func (l *loop) emit(e Event) {
	select {
	case l.w.events <- e:
	case <-l.ctx.Done():
	}
}
