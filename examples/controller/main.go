package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path"
	"strings"
	"syscall"
	"time"
)

// settings are what the command line says.
type settings struct {
	agents  []agent
	round   string
	pattern string
	quiesce string
	patient time.Duration
}

// agent is a host's vmsnapd.
type agent struct{ name, socket string }

// agents is the flag that names them.
type agents []agent

// String returns what was given.
func (a *agents) String() string { return fmt.Sprint(*a) }

// Set takes NAME=SOCKET.
func (a *agents) Set(text string) error {
	name, socket, ok := strings.Cut(text, "=")
	if !ok || name == "" || socket == "" {
		return errors.New("an agent is given as NAME=SOCKET")
	}
	*a = append(*a, agent{name, socket})
	return nil
}

// parse reads the command line.
func parse(args []string, stderr io.Writer) (settings, error) {
	var s settings
	flags := flag.NewFlagSet("controller", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Var((*agents)(&s.agents), "agent", "an agent, as `NAME=SOCKET`; may be repeated")
	flags.StringVar(&s.round, "round", "", "name of the snapshots, and what makes repeating safe: the same round is taken once")
	flags.StringVar(&s.pattern, "vms", "*", "the VMs whose names match this `pattern`")
	flags.StringVar(&s.quiesce, "quiesce", "prefer", "require, prefer or none")
	flags.DurationVar(&s.patient, "patience", 10*time.Minute, "how long all may take")
	if err := flags.Parse(args); err != nil {
		return s, err
	}
	switch {
	case len(s.agents) == 0:
		return s, errors.New("no -agent is given")
	case s.round == "":
		return s, errors.New("no -round is given")
	case flags.NArg() > 0:
		return s, fmt.Errorf("%q is one argument too many", flags.Arg(0))
	}
	if _, err := path.Match(s.pattern, ""); err != nil {
		return s, fmt.Errorf("-vms %s: %w", s.pattern, err)
	}
	if _, ok := quiesces[s.quiesce]; !ok {
		return s, fmt.Errorf("-quiesce %s: it is none of require, prefer and none", s.quiesce)
	}
	return s, nil
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run takes a round and returns the exit code: 0 when every VM has its snapshot,
// 1 when one has none, 2 for a wrong command line.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	s, err := parse(args, stderr)
	if err != nil {
		_, _ = fmt.Fprintln(stderr, "controller:", err)
		return 2
	}
	ctx, cancel := context.WithTimeout(ctx, s.patient)
	defer cancel()
	r := newRound(s, stdout)
	failed := r.take(ctx)
	for _, err := range failed {
		_, _ = fmt.Fprintln(stderr, "controller:", err)
	}
	if len(failed) > 0 {
		return 1
	}
	return 0
}
