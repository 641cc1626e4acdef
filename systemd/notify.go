package systemd

import (
	"errors"
	"fmt"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

// Ready says that requests are served, at the start and after a reload.
func Ready() error { return notify(daemon.SdNotifyReady) }

// Stopping says that the daemon has begun to stop, whoever wanted it to.
func Stopping() error { return notify(daemon.SdNotifyStopping) }

// Reloading says that the configuration is being read again; Ready follows.
// The time is what Type=notify-reload of newer systemds asks for.
func Reloading() error {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return fmt.Errorf("tell systemd: %w", err)
	}
	return notify(fmt.Sprintf("%s\nMONOTONIC_USEC=%d", daemon.SdNotifyReloading, now.Nano()/1000))
}

func notify(state string) error {
	if _, err := daemon.SdNotify(false, state); err != nil {
		return errors.Join(errors.New("systemd was not told"), err)
	}
	return nil
}
