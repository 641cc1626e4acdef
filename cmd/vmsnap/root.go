package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/vmsnap/vmsnap/api/client"
)

// The deadlines of calls; following an operation has none.
const (
	// Most calls are answered from the daemon's memory or its catalog.
	callTimeout = 30 * time.Second
	// A plan asks the guest, which may take its time to answer or not to.
	planTimeout = 60 * time.Second
	// A freeze takes at most its own time-out; the daemon needs some beside it.
	freezeMargin = 30 * time.Second
	// A thaw goes on until the guest answers.
	thawTimeout = 2 * time.Minute
	// A cancel is acknowledged within a second.
	cancelTimeout = 10 * time.Second
	// Nobody waits longer for a completion.
	completeTimeout = time.Second
)

// app is one run of the command.
type app struct {
	stdout, stderr io.Writer
	now            func() time.Time

	socket   string
	format   format
	noHeader bool
	daemon   *client.Client // made by client

	// asked ends with the first interrupt, and everything that is not an
	// operation ends with it; forced ends with the second.
	asked, forced context.Context
}

// run runs the command and returns its exit code.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer, now func() time.Time) int {
	a := &app{stdout: stdout, stderr: stderr, now: now, format: formatTable}
	stop := a.listen()
	defer stop()
	root := a.root()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(a.asked)
	if a.daemon != nil {
		a.daemon.Close()
	}
	return a.exit(err)
}

// listen ties the contexts to the signals that end a command.
func (a *app) listen() (stop func()) {
	var ask, force context.CancelFunc
	a.asked, ask = context.WithCancel(context.Background())
	a.forced, force = context.WithCancel(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	done := make(chan struct{})
	go func() {
		for _, interrupt := range []context.CancelFunc{ask, force} {
			select {
			case <-signals:
				interrupt()
			case <-done:
				return
			}
		}
	}()
	return func() {
		signal.Stop(signals)
		close(done)
		ask()
		force()
	}
}

const socketVariable = "VMSNAP_SOCKET"

func (a *app) root() *cobra.Command {
	root := a.group(&cobra.Command{
		Use:   "vmsnap",
		Short: "Snapshots of the virtual machines of this host",
		Long: `vmsnap takes and manages snapshots of the QEMU virtual machines of this host,
through vmsnapd, its agent.

A snapshot is named VM/NAME. Wherever a VM is asked for, its name, its UUID or
its id will do.`,
		Example: `  vmsnap vm list
  vmsnap snapshot create web before-upgrade --quiesce require
  vmsnap snapshot list web
  vmsnap operation list --active -o json`,
	}, a.vm(), a.snapshot(), a.disk(), a.preview(), a.operation(), a.schedule(), a.event(), a.freeze(), a.thaw(), a.doctor(), a.version())
	root.SilenceErrors, root.SilenceUsage = true, true
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usage(cmd, "%w", err)
	})
	socket := os.Getenv(socketVariable)
	if socket == "" {
		socket = client.DefaultSocket
	}
	flags := root.PersistentFlags()
	flags.StringVar(&a.socket, "socket", socket, "socket of vmsnapd; also "+socketVariable)
	flags.VarP(&a.format, "output", "o", "how to print the result: "+strings.Join(formats(), ", "))
	flags.BoolVar(&a.noHeader, "no-header", false, "print tables without their header")
	must(root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(formats(), cobra.ShellCompDirectiveNoFileComp)))
	return root
}

// group makes a command that only has commands below it.
func (a *app) group(cmd *cobra.Command, below ...*cobra.Command) *cobra.Command {
	cmd.AddCommand(below...)
	cmd.SuggestionsMinimumDistance = 2 // as many letters may differ in a command that is suggested
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return nil
		}
		err := usage(cmd, "%s has no command %q", cmd.CommandPath(), args[0])
		if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
			err.hint = "did you mean: " + strings.Join(near, ", ")
		}
		return err
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if cmd.HasParent() {
			return usage(cmd, "a command is missing after %q", cmd.CommandPath())
		}
		return cmd.Help()
	}
	return cmd
}

// takes checks that a command gets the arguments that it names. Those in
// brackets may be left out.
func takes(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		for i, name := range names {
			if i >= len(args) && !strings.HasPrefix(name, "[") {
				return usage(cmd, "%s is not given", name)
			}
			if i < len(args) && args[i] == "" {
				return usage(cmd, "%s is empty", strings.Trim(name, "[]"))
			}
		}
		if len(args) > len(names) {
			return usage(cmd, "%q is one argument too many", args[len(names)])
		}
		return nil
	}
}

// client returns the client of the daemon, whose socket is known once the
// command line is parsed.
func (a *app) client() *client.Client {
	if a.daemon == nil {
		a.daemon = client.New(a.socket)
	}
	return a.daemon
}

// must is for mistakes in the wiring of commands, which the first run shows.
func must(err error) {
	if err != nil {
		panic(fmt.Sprintf("wire the commands: %v", err))
	}
}
