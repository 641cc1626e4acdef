package main

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// rawRun is a line of the raw runs.
type rawRun struct {
	name    string            // without Benchmark, its labels and the number of cores
	labels  map[string]string // KEY=VALUE parts of the name
	figures map[string]float64
}

// runsFile is where results have their raw runs.
const runsFile = "runs.txt"

// readRuns reads the raw runs of results.
func readRuns(dirs []string) ([]rawRun, error) {
	var all []rawRun
	for _, dir := range dirs {
		text, err := os.ReadFile(filepath.Join(dir, runsFile))
		if err != nil {
			return nil, err
		}
		runs, err := parseRuns(string(text))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", filepath.Join(dir, runsFile), err)
		}
		all = append(all, runs...)
	}
	return all, nil
}

// parseRuns reads Go's benchmark format. What configures the runs is passed over.
func parseRuns(text string) ([]rawRun, error) {
	var runs []rawRun
	for line := range strings.SplitSeq(text, "\n") {
		rest, is := strings.CutPrefix(line, "Benchmark")
		if !is {
			continue
		}
		run, err := parseRun(strings.Fields(rest))
		if err != nil {
			return nil, fmt.Errorf("run %q: %w", line, err)
		}
		runs = append(runs, run)
	}
	return runs, nil
}

// parseRun reads a line's words: a name, how often it was run, and figures with
// their units.
func parseRun(words []string) (rawRun, error) {
	if len(words) < 4 || len(words)%2 != 0 {
		return rawRun{}, fmt.Errorf("%d words", len(words))
	}
	name := words[0]
	if dash := strings.LastIndexByte(name, '-'); dash >= 0 {
		name = name[:dash] // the number of cores
	}
	parts := strings.Split(name, "/")
	run := rawRun{parts[0], map[string]string{}, map[string]float64{}}
	for _, part := range parts[1:] {
		key, value, _ := strings.Cut(part, "=")
		run.labels[key] = value
	}
	for i := 2; i < len(words); i += 2 {
		value, err := strconv.ParseFloat(words[i], 64)
		if err != nil || math.IsNaN(value) || value < 0 || value > math.MaxInt64/2 {
			return rawRun{}, fmt.Errorf("%q is no figure", words[i])
		}
		run.figures[words[i+1]] = value
	}
	return run, nil
}
