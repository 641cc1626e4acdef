package outlive

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
)

// ErrNoSystemd means that there is no systemd on this host.
var ErrNoSystemd = errors.New("no systemd manager runs")

// units is the part of systemd's manager that is needed.
type units interface {
	StartTransientUnitContext(ctx context.Context, name, mode string, properties []dbus.Property, done chan<- string) (int, error)
}

// scopeTimeout: systemd moves a process in milliseconds; without it the process
// is only less well protected.
const scopeTimeout = 2 * time.Second

// EnterScope moves this process out of the agent's control group into a scope
// of its own, so that stopping, killing or starving the agent's unit does not
// reach it. It returns the scope's name, which begins with prefix and ends with
// id. Both must be fit for a unit's name.
func EnterScope(ctx context.Context, prefix, id, description string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, scopeTimeout)
	defer cancel()
	// sd_booted(3): the directory exists if and only if systemd is PID 1.
	if _, err := os.Stat("/run/systemd/system"); errors.Is(err, fs.ErrNotExist) {
		return "", ErrNoSystemd
	}
	conn, err := dbus.NewWithContext(ctx)
	if err != nil {
		return "", fmt.Errorf("connect to systemd: %w", err)
	}
	defer conn.Close()
	return startScope(ctx, conn, prefix+"-"+id+".scope", description, os.Getpid())
}

func startScope(ctx context.Context, manager units, name, description string, pid int) (string, error) {
	done := make(chan string, 1)
	_, err := manager.StartTransientUnitContext(ctx, name, "fail", []dbus.Property{
		dbus.PropDescription(description),
		dbus.PropPids(uint32(pid)),
	}, done)
	if err != nil {
		return "", fmt.Errorf("start %s: %w", name, err)
	}
	select {
	case result := <-done:
		if result != "done" {
			return "", fmt.Errorf("start %s: systemd says %s", name, result)
		}
		return name, nil
	case <-ctx.Done():
		return "", fmt.Errorf("start %s: %w", name, context.Cause(ctx))
	}
}
