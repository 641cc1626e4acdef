package systemd

import (
	"context"
	"fmt"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/hashicorp/go-hclog"
)

// checksPerWatchdog is how often the daemon is looked at in the time after
// which systemd gives up on it: one look may fail without harm.
const checksPerWatchdog = 3

// Watchdog tells systemd that the daemon is alive as long as healthy says so,
// until ctx ends. Nothing is told after a look that failed or did not end in
// its part of the watchdog's time, so that systemd restarts a daemon that only
// looks alive. It returns at once when the unit has no watchdog.
func Watchdog(ctx context.Context, healthy func(context.Context) error, log hclog.Logger) error {
	limit, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return fmt.Errorf("watchdog: %w", err)
	}
	if limit == 0 {
		return nil
	}
	every := limit / checksPerWatchdog
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for {
		if err := look(ctx, every, healthy); err == nil {
			err = notify(daemon.SdNotifyWatchdog)
			if err != nil {
				log.Warn("the watchdog was not told", "error", err)
			}
		} else if ctx.Err() == nil {
			log.Error("not healthy; systemd restarts the daemon if this goes on", "error", err, "watchdog", limit)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

func look(ctx context.Context, limit time.Duration, healthy func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return healthy(ctx)
}
