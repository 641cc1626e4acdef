package main

import (
	"maps"
	"path/filepath"
	"slices"
	"time"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/hook"
)

// checkHooks refuses settings of hooks that cannot be meant.
func (c *config) checkHooks() error {
	if c.HooksDir != "" && !filepath.IsAbs(c.HooksDir) {
		return c.wrong("hooks-dir", "%q is not an absolute path", c.HooksDir)
	}
	if c.HookTimeout <= 0 {
		return c.wrong("hook-timeout", "%s is not more than 0", c.HookTimeout)
	}
	for _, phase := range c.HooksFailClosed {
		if err := c.checkPhase("hooks-fail-closed", phase); err != nil {
			return err
		}
		if hook.Phase(phase) == hook.OnFailure {
			return c.wrong("hooks-fail-closed", "%s comes when the operation has failed already", phase)
		}
	}
	for _, phase := range slices.Sorted(maps.Keys(c.HookTimeouts)) {
		if err := c.checkPhase("hook-timeouts", phase); err != nil {
			return err
		}
		if d, err := time.ParseDuration(c.HookTimeouts[phase]); err != nil || d <= 0 {
			return c.wrong("hook-timeouts", "%s: %q is not a duration of more than 0, such as 1h", phase, c.HookTimeouts[phase])
		}
	}
	return nil
}

func (c *config) checkPhase(setting, phase string) error {
	if !hook.Phase(phase).Valid() {
		return c.wrong(setting, "%q is no phase; known are %s", phase, hook.Phases)
	}
	return nil
}

// hooks are the hooks as the agent knows them. The settings are checked.
func (c *config) hooks() agent.HookConfig {
	h := agent.HookConfig{Dir: c.HooksDir, Timeouts: map[hook.Phase]time.Duration{}, Socket: c.Socket}
	for _, phase := range hook.Phases {
		h.Timeouts[phase] = c.HookTimeout
		if d, err := time.ParseDuration(c.HookTimeouts[string(phase)]); err == nil {
			h.Timeouts[phase] = d
		}
	}
	for _, phase := range c.HooksFailClosed {
		h.Closed = append(h.Closed, hook.Phase(phase))
	}
	return h
}
