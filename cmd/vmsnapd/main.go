// Command vmsnapd is the snapshot agent of a hypervisor host.
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/rpc"
	"github.com/vmsnap/vmsnap/freeze"
	"github.com/vmsnap/vmsnap/metrics"
)

// version is set by the build.
var version = "devel"

func main() {
	var code int
	root := command(&code)
	if err := root.ExecuteContext(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "vmsnapd:", err)
		os.Exit(1)
	}
	os.Exit(code)
}

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
			if err := c.load(file, cmd.Flags().Changed("config"), cmd.Flags()); err != nil {
				return err
			}
			if err := c.checkGroups(); err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
			defer stop()
			return serve(ctx, c)
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

func logger(c config) hclog.Logger {
	options := logOptions(c, "vmsnapd")
	return hclog.New(&options)
}

func logOptions(c config, name string) hclog.LoggerOptions {
	return hclog.LoggerOptions{Name: name, Level: hclog.LevelFromString(c.LogLevel), JSONFormat: c.LogFormat == "json", Output: os.Stderr}
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

// serve runs the agent, the API and the metrics until ctx ends.
func serve(ctx context.Context, c config) error {
	log := logger(c)
	roles, err := rpc.ResolveRoles(uint32(os.Getuid()), c.Viewers, c.Operators, c.Admins)
	if err != nil {
		return err
	}
	guards, err := freezing(c, log)
	if err != nil {
		return err
	}
	m := metrics.New(version)
	a, err := agent.Open(ctx, agent.Config{
		StateDir: c.StateDir, OverridesDir: c.VMsDir, OverlayDir: c.OverlayDir, Freezing: guards, LaunchGuard: []string{guards.Executable[0], "launch-guard"}, ScanOnly: c.ScanOnly, ListedOnly: c.ListedOnly, Logger: log,
		OnOperation: m.ObserveOperation, OnFreezeWindow: m.ObserveFreezeWindow,
	})
	if err != nil {
		return err
	}
	m.Watch(a)
	listener, err := listen(c)
	if err != nil {
		return errors.Join(err, a.Close())
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		return a.Run(ctx, func() {
			log.Info("ready", "version", version, "socket", c.Socket, "metrics", c.MetricsListen)
			if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
				log.Warn("systemd was not told", "error", err)
			}
			group.Go(func() error {
				return rpc.Serve(ctx, listener, rpc.NewHandler(a, rpc.Options{Logger: log.Named("rpc"), Roles: roles, Version: version}), log.Named("rpc"))
			})
		})
	})
	if c.MetricsListen != "" {
		group.Go(func() error { return m.Serve(ctx, c.MetricsListen, c.MetricsConfig, log.Named("metrics")) })
	}
	if err := group.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	log.Info("stopped")
	return nil
}

// listen makes the API's socket. One that an earlier run left behind is
// replaced: the state directory's lock, which is held by now, says that no
// other daemon serves it.
func listen(c config) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(c.Socket), 0o755); err != nil {
		return nil, fmt.Errorf("API socket: %w", err)
	}
	if fi, err := os.Lstat(c.Socket); err == nil {
		if fi.Mode()&os.ModeSocket == 0 {
			return nil, fmt.Errorf("API socket: %s exists and is not a socket", c.Socket)
		}
		if err := os.Remove(c.Socket); err != nil {
			return nil, fmt.Errorf("API socket: %w", err)
		}
	}
	mask := syscall.Umask(0o177)
	l, err := net.Listen("unix", c.Socket)
	syscall.Umask(mask)
	if err != nil {
		return nil, fmt.Errorf("API socket: %w", err)
	}
	if c.SocketGroup == "" {
		return l, nil
	}
	if err := openTo(c.Socket, c.SocketGroup); err != nil {
		return nil, errors.Join(fmt.Errorf("API socket: %w", err), l.Close())
	}
	return l, nil
}

// openTo lets a group connect.
func openTo(socket, group string) error {
	g, err := user.LookupGroup(group)
	if err != nil {
		return err
	}
	gid, err := strconv.Atoi(g.Gid)
	if err != nil {
		return err
	}
	return errors.Join(os.Chown(socket, -1, gid), os.Chmod(socket, 0o660))
}
