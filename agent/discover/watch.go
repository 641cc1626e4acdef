package discover

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Options configure a Watcher. The zero value is good.
type Options struct {
	ScanInterval time.Duration // between scans where the process connector cannot be used; 0: 2 s
	NoNetlink    bool          // scan only
	Report       func(error)   // told of processes that cannot be read, once each, from the watch's goroutine; may be nil
}

// EventKind is what happened.
type EventKind int

// The kinds of events.
const (
	Started EventKind = iota + 1 // a QEMU was found
	Exited                       // it is gone
	Listed                       // all that ran when the watch began have been delivered; once, without a Process
)

// String returns the kind as it is logged.
func (k EventKind) String() string {
	switch k {
	case Started:
		return "started"
	case Exited:
		return "exited"
	case Listed:
		return "listed"
	default:
		return fmt.Sprintf("EventKind(%d)", int(k))
	}
}

// Event is a change in the set of QEMU processes.
type Event struct {
	Kind    EventKind
	Process Process // as it was when it was found
}

// The sources of Watcher.Source.
const (
	SourceNetlink = "netlink"
	SourceScan    = "scan"
)

// Watcher follows the QEMU processes of the host.
type Watcher struct {
	opts   Options
	events chan Event

	mu     sync.Mutex
	source string // guarded by mu
	reason string // guarded by mu
}

// Watch follows QEMU processes until ctx is done. Starts are noticed through
// the kernel's process connector, or where that cannot be used by scanning;
// exits, in either case, by the process's own descriptor.
func Watch(ctx context.Context, opts Options) (*Watcher, error) {
	if opts.ScanInterval <= 0 {
		opts.ScanInterval = defaultScanInterval
	}
	if opts.Report == nil {
		opts.Report = func(error) {}
	}
	w := &Watcher{opts: opts, events: make(chan Event)}
	l, err := newLoop(ctx, w)
	if err != nil {
		return nil, fmt.Errorf("watch processes: %w", err)
	}
	go l.run()
	return w, nil
}

// Events delivers what happens. It is closed when the watch has ended. A
// reader that lags loses nothing but the processes that came and went
// meanwhile.
func (w *Watcher) Events() <-chan Event { return w.events }

// Source tells how starts are noticed, SourceNetlink or SourceScan, and for
// the latter the reason.
func (w *Watcher) Source() (source, reason string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.source, w.reason
}

func (w *Watcher) setSource(source, reason string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.source, w.reason = source, reason
}

// tracked is a process that is waited for.
type tracked struct {
	pid       int
	pidfd     int           // -1 when the kernel gives none: scans look for the exit
	inspected time.Duration // monotonic; later executions are news
	vm        bool          // else a bystander, such as a -daemonize launcher
	process   Process       // of a vm
}

// loop is the state of a watch, owned by one goroutine.
type loop struct {
	ctx       context.Context
	w         *Watcher
	epoll     int
	wake      int // eventfd, readable when ctx is done
	unwake    func()
	connector *connector // nil when scanning
	byPID     map[int]*tracked
	byFD      map[int]*tracked
	failed    map[int]string // what was reported of a process, so that it is reported once
	nextScan  time.Time
	openPidfd func(pid int) (int, error)
}

func newLoop(ctx context.Context, w *Watcher) (_ *loop, err error) {
	l := &loop{
		ctx: ctx, w: w, epoll: -1, wake: -1, unwake: func() {},
		byPID: map[int]*tracked{}, byFD: map[int]*tracked{}, failed: map[int]string{},
		openPidfd: func(pid int) (int, error) { return unix.PidfdOpen(pid, 0) },
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.release())
		}
	}()
	if l.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	if l.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	if err := l.await(l.wake); err != nil {
		return nil, err
	}
	l.wakeWhenDone()
	return l, l.subscribe()
}

// wakeWhenDone makes the eventfd readable at the end of the context. unwake
// returns when it is no longer written to.
func (l *loop) wakeWhenDone() {
	written := make(chan struct{})
	stop := context.AfterFunc(l.ctx, func() {
		defer close(written)
		// It cannot fail: the counter is far from full.
		_, _ = unix.Write(l.wake, []byte{1, 0, 0, 0, 0, 0, 0, 1})
	})
	l.unwake = func() {
		if !stop() {
			<-written
		}
	}
}

// subscribe chooses how starts are noticed.
func (l *loop) subscribe() error {
	if l.w.opts.NoNetlink {
		l.w.setSource(SourceScan, "process events are switched off")
		return nil
	}
	c, err := openConnector()
	if err != nil {
		l.w.setSource(SourceScan, err.Error())
		return nil
	}
	l.connector = c
	l.w.setSource(SourceNetlink, "")
	return l.await(c.fd)
}

// await adds a descriptor to those that end a wait when they can be read.
func (l *loop) await(fd int) error {
	err := unix.EpollCtl(l.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)})
	if err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	return nil
}

// release gives up all descriptors.
func (l *loop) release() error {
	l.unwake()
	var errs []error
	for _, t := range l.byPID {
		errs = append(errs, l.forget(t))
	}
	if l.connector != nil {
		errs = append(errs, l.connector.close())
	}
	for _, fd := range []int{l.wake, l.epoll} {
		if fd >= 0 {
			errs = append(errs, unix.Close(fd))
		}
	}
	return errors.Join(errs...)
}
