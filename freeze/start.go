package freeze

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Start runs a guard for one freeze and waits until it is ready: connected to
// the guest agent, in step with it, and sure that the guest is not frozen. It
// fails with ErrAlreadyFrozen, ErrUnsupported, ErrGuard, or an error of package
// qga; then no guard is left. The context bounds the start, not the guard.
func Start(ctx context.Context, cfg Config, r Request) (*Guard, error) {
	g, err := start(ctx, cfg, r, nil, 0)
	if err != nil {
		return nil, &Error{VM: r.VM, Step: "start guard of", Err: err}
	}
	return g, nil
}

// start runs a guard that holds a new freeze, or ends the one of a lost guard.
func start(ctx context.Context, cfg Config, r Request, lost *Lease, replaced int) (*Guard, error) {
	if err := errors.Join(cfg.check(), r.check()); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrLease, err)
	}
	owner, err := ProcessOf(os.Getpid())
	if err != nil {
		return nil, err
	}
	h := hello{ID: newID(), Dir: cfg.Dir, Owner: owner, Request: r, Recover: lost}
	if lost != nil {
		h.ID = lost.ID
	}
	cmd, p, err := launch(cfg.Executable)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrGuard, err)
	}
	g := newGuard(cfg, h, cmd, p)
	g.replaced = replaced
	if err := g.begin(ctx); err != nil {
		return nil, errors.Join(err, g.discard())
	}
	go g.listen()
	g.log.Debug("guard is ready", "guard", g.process.PID, "scope", g.ready.Scope, "no_scope", g.ready.NoScope)
	return g, nil
}

// launch starts the process with its end of the pipe, in a session of its own,
// so that no terminal and no process group's signal reaches it.
func launch(argv []string) (*exec.Cmd, *pipe, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make its pipe: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "guard"), os.NewFile(uintptr(fds[1]), "agent")
	defer func() { _ = errors.Join(ours.Close(), theirs.Close()) }() // the process and conn have copies
	conn, err := net.FileConn(ours)
	if err != nil {
		return nil, nil, fmt.Errorf("make its pipe: %w", err)
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = "/"
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{theirs} // pipeFD
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, nil, errors.Join(err, conn.Close())
	}
	return cmd, newPipe(conn), nil
}

// begin sends the request and waits for the guard to be ready.
func (g *Guard) begin(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = g.pipe.conn.SetReadDeadline(time.Unix(1, 0)) })
	err := g.greet()
	if !stop() {
		return fmt.Errorf("%w: it is not ready: %w", ErrGuard, context.Cause(ctx))
	}
	return err
}

func (g *Guard) greet() (err error) {
	if g.process, err = ProcessOf(g.cmd.Process.Pid); err != nil {
		return fmt.Errorf("%w: %w", ErrGuard, err)
	}
	if err := g.pipe.write(g.hello, helloTimeout); err != nil {
		return fmt.Errorf("%w: send the request: %w", ErrGuard, err)
	}
	var first report
	err = g.pipe.read(&first)
	switch {
	case errors.Is(err, io.EOF):
		return fmt.Errorf("%w: it ended before it was ready", ErrGuard)
	case err != nil:
		return fmt.Errorf("%w: %w", ErrGuard, err)
	case first.Err != nil:
		return first.Err
	case first.Kind != reportReady || first.Ready == nil:
		return fmt.Errorf("%w: it answered %q", ErrGuard, first.Kind)
	}
	g.ready = *first.Ready
	return nil
}

// discard ends a guard that has frozen nothing. One that recovers is only let
// go of, since it thaws.
func (g *Guard) discard() error {
	err := g.pipe.conn.Close()
	if g.Recover == nil {
		_ = g.cmd.Process.Kill() // it may have ended already
	}
	go func() { _ = g.cmd.Wait() }() // how it ended says nothing new
	return err
}

func newID() string {
	var b [10]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return hex.EncodeToString(b[:])
}
