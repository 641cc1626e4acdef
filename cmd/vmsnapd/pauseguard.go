package main

import (
	"github.com/spf13/cobra"

	"github.com/vmsnap/vmsnap/memdump"
)

// pauseGuardCommand is the process that resumes a VM whose daemon cannot. Only
// the daemon starts it, and tells it how to log.
func pauseGuardCommand(c *config) *cobra.Command {
	return &cobra.Command{
		Use: "pause-guard", Hidden: true, Args: cobra.NoArgs,
		Short: "Resume a VM that a daemon has paused and cannot resume (started by vmsnapd)",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return memdump.RunGuard(cmd.Context(), logOptions(*c, "vmsnapd.pause-guard"))
		},
	}
}
