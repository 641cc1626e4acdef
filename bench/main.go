package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

func main() {
	var c config
	flag.IntVar(&c.rounds, "rounds", 20, "how often each of vmsnap and its rival takes a snapshot, on each QEMU")
	flag.BoolVar(&c.short, "short", false, "few rounds, as CI runs it")
	flag.Var(&c.memory, "memory", "GiB of the guests whose memory is saved, with commas between: 1, 2 or 8 (default all, with -short 1)")
	flag.StringVar(&c.only, "only", "", "measure only this: "+strings.Join(parts, ", "))
	flag.StringVar(&c.results, "results", "bench/results", "where to leave the results; empty leaves none")
	flag.StringVar(&c.plot, "plot", "", "measure nothing: draw the results in the directories named behind the options, and leave the plots in this one")
	flag.Parse()
	if c.short {
		c.rounds = shortRounds
	}
	if c.plot != "" {
		if err := replot(c.plot, flag.Args()); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	if flag.NArg() > 0 || c.rounds < 1 || c.only != "" && !slices.Contains(parts, c.only) {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, c); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type config struct {
	rounds  int
	short   bool
	memory  sizes // of guests whose memory is saved; nil for all
	only    string
	results string
	plot    string
}

// replot draws results that are there already.
func replot(to string, results []string) error {
	runs, err := readRuns(results)
	if err != nil {
		return err
	}
	files, err := drawPlots(to, runs)
	if err != nil {
		return err
	}
	if len(files) == 0 {
		return errors.New("the results named have nothing to draw")
	}
	fmt.Println(strings.Join(files, "\n"))
	return nil
}

// The parts of the benchmark.
const (
	partWindows = "windows"
	partAPI     = "api"
	partRestore = "restore"
	partMerge   = "merge"
	partMemory  = "memory"
	partScale   = "scale"
)

var parts = []string{partWindows, partAPI, partRestore, partMerge, partMemory, partScale}

// wants tells whether a part is to be measured.
func (c config) wants(part string) bool { return c.only == "" || c.only == part }

// shortRounds is enough to see a window that has grown by half.
const shortRounds = 5

// errBudget means that something costs more than it may.
var errBudget = errors.New("a budget is missed")

func run(ctx context.Context, c config) error {
	versions, err := testvm.Versions()
	if err != nil {
		return err
	}
	host, err := describeHost()
	if err != nil {
		return err
	}
	r := &report{host: host, rounds: c.rounds, short: c.short}
	for i, q := range versions {
		last := i == len(versions)-1
		if err := measure(ctx, c, r, q, last); err != nil {
			fmt.Print(r.table()) // of what was measured until then
			if ctx.Err() != nil {
				return errors.New("interrupted")
			}
			return fmt.Errorf("on QEMU %s: %w", q.Name, err)
		}
	}
	table := r.table()
	fmt.Print(table)
	if c.results != "" {
		dir, err := r.save(c.results, table)
		if err != nil {
			return err
		}
		fmt.Printf("\n%s\n", dir)
	}
	if r.missed() {
		return errBudget
	}
	return nil
}

// measure takes all measurements on one QEMU; those of vmsnapd alone, with which
// the version has little to do, on the last.
func measure(ctx context.Context, c config, r *report, q testvm.QEMU, last bool) error {
	if api := last && c.wants(partAPI); api || c.wants(partWindows) {
		if err := measureDisks(ctx, c, r, q, api); err != nil {
			return err
		}
	}
	if c.wants(partRestore) {
		if err := measureRestores(ctx, c, r, q); err != nil {
			return err
		}
	}
	if c.wants(partMerge) {
		if err := measureMerges(ctx, c, r, q); err != nil {
			return err
		}
	}
	if c.wants(partMemory) {
		if err := measureMemory(ctx, c, r, q); err != nil {
			return err
		}
	}
	if last && c.wants(partScale) {
		if err := measureScale(ctx, c, r, q); err != nil {
			return err
		}
		return measureCatalog(ctx, c, r, q.Name)
	}
	return nil
}

// measureDisks measures what concerns no memory.
func measureDisks(ctx context.Context, c config, r *report, q testvm.QEMU, api bool) (err error) {
	s, err := newScene(ctx, q, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.end()) }()
	r.host.saw(s.version)
	if c.wants(partWindows) {
		progress("QEMU %s: freeze windows", s.version)
		if err := s.measureWindows(ctx, c, r); err != nil {
			return err
		}
	}
	if !api {
		return nil
	}
	progress("QEMU %s: API", s.version)
	return s.measureAPI(ctx, c, r)
}

// progress tells what is done, for whom it takes too long.
func progress(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
