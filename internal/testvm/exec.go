package testvm

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/vmsnap/vmsnap/internal/testvm/wire"
)

// ExitError is a command that failed in the guest.
type ExitError struct {
	Command string
	Code    int // 128 and the signal's number if a signal ended it
	Stderr  string
}

func (e *ExitError) Error() string {
	return fmt.Sprintf("%q in the guest: exit status %d: %s", e.Command, e.Code, strings.TrimSpace(e.Stderr))
}

// Exec runs `sh -c command` in the guest, without the help of the guest agent,
// and returns its standard output. A command that fails is an *ExitError. A
// command that still runs when ctx ends goes on in the guest.
func (g *Guest) Exec(ctx context.Context, command string) (string, error) {
	reply, err := g.call(ctx, wire.Request{Op: wire.OpExec, Command: command})
	if err != nil {
		return "", err
	}
	if reply.Code != 0 {
		return string(reply.Stdout), &ExitError{Command: command, Code: reply.Code, Stderr: string(reply.Stderr)}
	}
	return string(reply.Stdout), nil
}

// WriteFile writes a file in the guest and returns when it is durable.
func (g *Guest) WriteFile(ctx context.Context, path string, data []byte) error {
	_, err := g.call(ctx, wire.Request{Op: wire.OpWrite, Path: path, Data: data})
	return err
}

// ReadFile returns the content of a file in the guest.
func (g *Guest) ReadFile(ctx context.Context, path string) ([]byte, error) {
	reply, err := g.call(ctx, wire.Request{Op: wire.OpRead, Path: path})
	return reply.Stdout, err
}

// Sha256 returns the hash of a file in the guest, in hexadecimal.
func (g *Guest) Sha256(ctx context.Context, path string) (string, error) {
	b, err := g.ReadFile(ctx, path)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:]), nil
}

// Mountpoint returns where a disk's file system is mounted in the guest.
func Mountpoint(disk string) string { return wire.MountRoot + "/" + disk }

// SignalAgent sends qemu-ga a signal, such as "STOP" or "KILL".
func (g *Guest) SignalAgent(ctx context.Context, signal string) error {
	_, err := g.Exec(ctx, "killall -"+signal+" qemu-ga")
	return err
}

// RestartAgent starts qemu-ga anew, ending it first if it runs. It comes back
// frozen if it was frozen.
func (g *Guest) RestartAgent(ctx context.Context) error {
	_, err := g.call(ctx, wire.Request{Op: wire.OpStartAgent})
	return err
}

// AgentRunning tells whether there is a qemu-ga process in the guest, be it
// stopped.
func (g *Guest) AgentRunning(ctx context.Context) (bool, error) {
	out, err := g.Exec(ctx, "pidof qemu-ga || true")
	return strings.TrimSpace(out) != "", err
}

// Shutdown lets the guest unmount its disks and power off. It returns when QEMU
// has ended.
func (g *Guest) Shutdown(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, shutdownDeadline)
	defer cancel()
	// A guest that powers off does not answer: the connection ends.
	if _, err := g.call(ctx, wire.Request{Op: wire.OpPowerOff}); !errors.Is(err, errClosed) {
		return fmt.Errorf("shut down: %w%s", err, g.logs())
	}
	return g.Wait(ctx)
}

func (g *Guest) call(ctx context.Context, req wire.Request) (wire.Reply, error) {
	_, c := g.current()
	reply, err := c.call(ctx, req)
	if err != nil {
		return reply, fmt.Errorf("guest %s: %w", g.Name, err)
	}
	return reply, nil
}
