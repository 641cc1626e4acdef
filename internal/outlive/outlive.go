// Package outlive keeps a process running that has to finish what the agent
// that started it cannot: one that thaws a guest, or resumes it.
//
// Such a process ends by its own decision only. What stops, kills or starves
// the agent's service does not reach it, and a log that nobody reads does not
// hold it up.
package outlive

import (
	"fmt"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// OOMScore is close to never: such a process is small, and killing it frees
// nothing.
const OOMScore = "-900"

// IgnoreSignals ignores what ends services, and SIGPIPE: standard error may
// lead to the agent, which may be dead.
func IgnoreSignals() {
	signal.Ignore(unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE)
}

// AvoidOOM makes this process the last that the OOM killer takes. It needs
// CAP_SYS_RESOURCE.
func AvoidOOM() error {
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte(OOMScore), 0); err != nil {
		return fmt.Errorf("avoid the OOM killer: %w", err)
	}
	return nil
}
