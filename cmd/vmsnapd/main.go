// Command vmsnapd is the snapshot agent of a hypervisor host.
package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/launch"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/agent/rpc"
	"github.com/vmsnap/vmsnap/api/client"
	"github.com/vmsnap/vmsnap/freeze"
	"github.com/vmsnap/vmsnap/metrics"
	"github.com/vmsnap/vmsnap/systemd"
)

// version is set by the build.
var version = "devel"

// command is the daemon itself, with the guard and the last thaw beneath it.
func command(code *int) *cobra.Command {
	var c config
	var file string
	root := &cobra.Command{
		Use:   "vmsnapd",
		Short: "The snapshot agent of a hypervisor host",
		Long: `vmsnapd finds the host's QEMU processes and takes snapshots of them. It needs
no configuration. vmsnap is its command line.`,
		Example: `  vmsnapd
  vmsnapd --state-dir /srv/vmsnap --metrics-listen 0.0.0.0:9777 --log-format json`,
		Version: version, Args: cobra.NoArgs, SilenceErrors: true, SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			from := source{flags: cmd.Flags(), given: c, file: file, named: cmd.Flags().Changed("config")}
			c, err := from.load()
			if err != nil {
				return err
			}
			if err := c.checkGroups(); err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
			defer stop()
			return serve(ctx, from, c)
		},
	}
	root.PersistentFlags().StringVar(&file, "config", defaultConfigFile, "configuration `file`")
	c.flags(root.PersistentFlags())
	root.AddCommand(guardCommand(&c, code), launchGuardCommand(), pauseGuardCommand(&c), thawCommand(&c, &file))
	return root
}

// guardCommand is the process that holds a freeze. Only the daemon starts it,
// and tells it how to log.
func guardCommand(c *config, code *int) *cobra.Command {
	return &cobra.Command{
		Use: "guard", Hidden: true, Args: cobra.NoArgs,
		Short: "Hold a freeze, and thaw at its lease's end (started by vmsnapd)",
		RunE: func(cmd *cobra.Command, _ []string) error {
			*code = freeze.Main(cmd.Context(), logOptions(*c, "vmsnapd.guard"))
			return nil
		},
	}
}

// launchGuardCommand is the process that makes the launch paths right when the
// daemon dies in the middle of a cut. Only the daemon starts it.
func launchGuardCommand() *cobra.Command {
	return &cobra.Command{
		Use: "launch-guard", Hidden: true, Args: cobra.NoArgs,
		Short: "Make the launch paths right when the daemon dies in a cut (started by vmsnapd)",
		RunE: func(*cobra.Command, []string) error {
			return agent.GuardLaunchPaths(os.Stdin, os.Stdout)
		},
	}
}

// thawCommand is for ExecStopPost: it thaws what a daemon that is gone has left
// frozen.
func thawCommand(c *config, file *string) *cobra.Command {
	return &cobra.Command{
		Use: "thaw-all", Args: cobra.NoArgs,
		Short: "Thaw every guest that a vmsnapd which is gone has left frozen",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := c.load(*file, cmd.Flags().Changed("config"), cmd.Flags()); err != nil {
				return err
			}
			cfg, err := freezing(*c, logger(*c))
			if err != nil {
				return err
			}
			recoveries, err := freeze.Recover(cmd.Context(), cfg)
			for _, r := range recoveries {
				if errors.Is(r.Err, freeze.ErrHeld) {
					continue // of a daemon that is alive
				}
				err = errors.Join(err, r.Err)
			}
			return err
		},
	}
}

func freezing(c config, log hclog.Logger) (freeze.Config, error) {
	self, err := os.Executable()
	if err != nil {
		return freeze.Config{}, err
	}
	return freeze.Config{
		Executable: []string{self, "guard", "--log-level", c.LogLevel, "--log-format", c.LogFormat},
		Dir:        filepath.Join(c.StateDir, "leases"), Logger: log.Named("freeze"),
	}, nil
}

// metricsCredential is the name under which the unit hands over a
// metrics-config with its secrets.
const metricsCredential = "vmsnap.metrics"

func metricsConfig(c config) (string, error) {
	if c.MetricsConfig != "" {
		return c.MetricsConfig, nil
	}
	return systemd.Credential(metricsCredential)
}

// serve runs the agent, the API and the metrics until ctx ends.
func serve(ctx context.Context, from source, c config) error {
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	log := logger(c)
	roles, err := rpc.ResolveRoles(uint32(os.Getuid()), c.Viewers, c.Operators, c.Admins)
	if err != nil {
		return err
	}
	m := metrics.New(version)
	a, err := openAgent(ctx, c, m, log)
	if err != nil {
		return err
	}
	m.Watch(a)
	listener, err := openSocket(&c, log)
	if err != nil {
		return errors.Join(err, a.Close())
	}
	secrets, err := metricsConfig(c)
	if err != nil {
		return errors.Join(err, listener.Close(), a.Close())
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		return a.Run(ctx, func() {
			group.Go(func() error {
				opts := rpc.Options{Logger: log.Named("rpc"), Roles: roles, Version: version, Refused: a.CallRefused, Made: a.CallMade}
				return rpc.Serve(ctx, listener, rpc.NewHandler(a, opts), log.Named("rpc"))
			})
			log.Info("ready", "version", version, "socket", c.Socket, "metrics", c.MetricsListen)
			group.Go(func() error { return underSystemd(ctx, client.New(c.Socket), log) })
			group.Go(func() error { (&reloader{from, c, a, log}).run(ctx, hangups); return nil })
		})
	})
	if c.MetricsListen != "" {
		group.Go(func() error { return m.Serve(ctx, c.MetricsListen, secrets, log.Named("metrics")) })
	}
	if err := group.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	log.Info("stopped")
	return nil
}

// openAgent opens the agent that the settings describe.
func openAgent(ctx context.Context, c config, m *metrics.Metrics, log hclog.Logger) (*agent.Agent, error) {
	guards, err := freezing(c, log)
	if err != nil {
		return nil, err
	}
	sinks, err := sinks(c)
	if err != nil {
		return nil, err
	}
	launcher, err := launch.ParseKind(c.Launcher)
	if err != nil {
		return nil, err
	}
	return agent.Open(ctx, agent.Config{
		StateDir: c.StateDir, OverridesDir: c.VMsDir, OverlayDir: c.OverlayDir, MemoryDir: c.MemoryDir, KeepPages: c.KeepPages,
		Sealing:  sealing(c),
		Freezing: guards, LaunchGuard: []string{guards.Executable[0], "launch-guard"},
		PauseGuard: []string{guards.Executable[0], "pause-guard", "--log-level", c.LogLevel, "--log-format", c.LogFormat},
		Launcher:   launcher,
		ScanOnly:   c.ScanOnly, ListedOnly: c.ListedOnly, Logger: log,
		EventKeep: c.EventKeep, EventMaxAge: c.EventMaxAge, Sinks: sinks,
		Hooks: c.hooks(), Profiles: c.Profiles, Limits: op.Limits{Operations: c.MaxOperations, PerStorage: c.MaxOperationsPerStorage},
		MergeSpeed: uint64(c.MergeSpeed) << 20, MaxChain: c.MaxChain,
		UpkeepSpeed: uint64(c.UpkeepSpeed) << 20, UpkeepInterval: c.UpkeepInterval,
		LowSpace: uint64(c.LowSpace) << 20, ResumeGuests: c.ResumeGuests,
		ScheduleCaps: agent.ScheduleCaps{Keep: c.ScheduleMaxKeep, MaxAge: c.ScheduleMaxAge},
		OnOperation:  m.ObserveOperation, OnFreezeWindow: m.ObserveFreezeWindow, OnPause: m.ObservePause, OnRun: m.ObserveRun,
	})
}

// underSystemd tells systemd that requests are served, that they are served
// still, and that the daemon stops.
func underSystemd(ctx context.Context, self *client.Client, log hclog.Logger) error {
	defer self.Close()
	if err := systemd.Ready(); err != nil {
		log.Warn("ready", "error", err)
	}
	err := systemd.Watchdog(ctx, health{self}.check, log)
	<-ctx.Done()
	if told := systemd.Stopping(); told != nil {
		log.Warn("stopping", "error", told)
	}
	return err
}
