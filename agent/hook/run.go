package hook

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// MaxOutput is how many bytes of a hook's output are kept: the last ones, since
// what went wrong is told at the end.
const MaxOutput = 8 << 10

const (
	// grace is how long a hook that was told to end may take: first after SIGTERM,
	// and again after SIGKILL, which a hook that waits for a dead disk ignores.
	grace = 5 * time.Second
	// drain is how long the output is read on when all of the group has ended:
	// a program that left the group may hold it open for ever.
	drain = time.Second
)

// Result is what became of a hook.
type Result struct {
	Took   time.Duration
	Output string // standard output and error, the last MaxOutput bytes
	Err    error  // nil when it ended with 0
}

// ErrTimeout means that a hook did not end within its limit.
var ErrTimeout = errors.New("it did not end within its time limit")

// errStuck means that not even SIGKILL ended it.
var errStuck = errors.New("it was killed, and does not end")

// Run runs a hook with an environment and with standard input. It returns when
// the hook has ended, by itself, at the limit, or with ctx.
func (h Hook) Run(ctx context.Context, limit time.Duration, env []string, stdin []byte) Result {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("%w of %s", ErrTimeout, limit))
	defer cancel()
	began := time.Now()
	result := make(chan Result, 1)
	go func() {
		// The thread that starts a process is the parent that Pdeathsig is about: it
		// must live as long as the process.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		h.run(ctx, env, stdin, result)
	}()
	r := <-result
	r.Took = time.Since(began)
	return r
}

// run sends one result. It returns when the process is gone, which may be later.
func (h Hook) run(ctx context.Context, env []string, stdin []byte, result chan<- Result) {
	cmd := exec.Command(h.Path) // not CommandContext, which knows of no groups
	cmd.Dir, cmd.Env = "/", env
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	out, err := start(cmd, stdin)
	if err != nil {
		result <- Result{Err: err}
		return
	}
	group := cmd.Process.Pid
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		// The exit is seen and not reaped, so that the group's number stays its own.
		for unix.Waitid(unix.P_PID, group, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR { //nolint:errorlint // a number
		}
	}()
	ended := awaitExit(ctx, group, exited)
	_ = syscall.Kill(-group, syscall.SIGKILL) // what it left behind
	if !ended {
		result <- Result{Output: out.close(), Err: errors.Join(context.Cause(ctx), errStuck)}
		<-exited
		_ = cmd.Wait()
		return
	}
	err = cmd.Wait()
	if cause := context.Cause(ctx); err != nil && cause != nil {
		err = cause
	}
	result <- Result{Output: out.close(), Err: err}
}

// awaitExit waits for a process and ends it with ctx. It reports whether the
// process has exited.
func awaitExit(ctx context.Context, group int, exited <-chan struct{}) bool {
	select {
	case <-exited:
		return true
	case <-ctx.Done():
	}
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		_ = syscall.Kill(-group, signal)
		select {
		case <-exited:
			return true
		case <-time.After(grace):
		}
	}
	return false
}

// start starts a process with its input and output.
func start(cmd *exec.Cmd, stdin []byte) (_ *output, err error) {
	read, write, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer func() { _ = write.Close() }()
	in, feed, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, read.Close())
	}
	defer func() { _ = in.Close() }()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, write, write
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(err, read.Close(), feed.Close())
	}
	go func() {
		_, _ = io.Copy(feed, bytes.NewReader(stdin)) // a hook need not read it
		_ = feed.Close()
	}()
	out := &output{from: read, ended: make(chan struct{})}
	go out.read()
	return out, nil
}

// output keeps the last bytes that are read.
type output struct {
	from  *os.File
	ended chan struct{}

	mu   sync.Mutex
	kept []byte
	lost bool
}

func (o *output) read() {
	defer close(o.ended)
	buffer := make([]byte, 4096)
	for {
		n, err := o.from.Read(buffer)
		o.keep(buffer[:n])
		if err != nil {
			return
		}
	}
}

func (o *output) keep(b []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.kept = append(o.kept, b...)
	if over := len(o.kept) - MaxOutput; over > 0 {
		o.kept, o.lost = append(o.kept[:0], o.kept[over:]...), true
	}
}

// close returns the output once all of it is there, or drain is over.
func (o *output) close() string {
	select {
	case <-o.ended:
	case <-time.After(drain):
	}
	_ = o.from.Close()
	o.mu.Lock()
	defer o.mu.Unlock()
	text := strings.TrimSpace(printable(string(o.kept)))
	if o.lost {
		text = "… " + text
	}
	return text
}

// printable makes a text fit for terminals, logs and JSON.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' && r != '\n' && r != '\t' || r == 0x7f {
			return '\uFFFD'
		}
		return r
	}, strings.ToValidUTF8(s, "\uFFFD"))
}
