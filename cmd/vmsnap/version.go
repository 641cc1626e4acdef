package main

import (
	"context"
	"runtime"

	"github.com/spf13/cobra"
)

// version is set by the build.
var version = "devel"

func (a *app) version() *cobra.Command {
	return &cobra.Command{
		Use:               "version",
		Short:             "Show the versions of this command and of the daemon",
		Example:           `  vmsnap version -o json`,
		Args:              takes(),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			daemon, missing := a.client().Version(ctx)
			reason := ""
			if missing != nil {
				_, reason, _ = explain(missing)
			}
			return a.print(result{
				document: object{
					{"vmsnap", object{{"version", version}, {"go", runtime.Version()}}},
					{"vmsnapd", object{{"version", daemon}, {"socket", a.socket}, {"error", reason}}},
				},
				names: []string{version},
				human: func(p page, _ bool) error {
					p.line("vmsnap %s, %s", version, runtime.Version())
					if reason != "" {
						p.line("vmsnapd: %s", reason)
						return nil
					}
					p.line("vmsnapd %s, at %s", daemon, a.socket)
					return nil
				},
			})
		},
	}
}
