package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// report gathers what was measured.
type report struct {
	host   host
	rounds int
	short  bool
	rows   []row
	raw    bytes.Buffer // lines of Go's benchmark format
}

// row is a line of the table. What is empty is shown as "-".
type row struct {
	measure, qemu, ours, rival string
	ratio, budget              float64 // 0 if there is none
	floor                      bool    // the budget is the least, not the most
	sure                       float64 // the ratio is hardly below this
}

// verdict says whether a budget is kept. A short run has too few rounds to tell
// a ratio to a few percent: it calls a budget missed only when it is sure.
func (r *report) verdict(row row) verdict {
	switch {
	case row.budget == 0:
		return ""
	case row.floor && row.ratio >= row.budget, !row.floor && row.ratio <= row.budget:
		return kept
	case row.floor && r.short:
		return unsureBelow
	case row.floor:
		return below
	case r.short && row.sure <= row.budget:
		return unsure
	}
	return missed
}

type verdict string

const (
	kept   verdict = "ok"
	missed verdict = "OVER"
	below  verdict = "BELOW"
	unsure verdict = "over, unsure"

	unsureBelow verdict = "below, unsure"
)

func (r *report) addWindows(qemu string, ours, bare []cut) {
	compare := func(measure string, budget float64, figure func(cut) time.Duration) {
		a, b := each(ours, figure), each(bare, figure)
		r.rows = append(r.rows, row{
			measure: measure, qemu: qemu, ours: spread(a), rival: spread(b),
			ratio: float64(median(a)) / float64(median(b)), budget: budget, sure: leastRatio(a, b),
		})
	}
	compare("freeze window", maxWindowRatio, func(c cut) time.Duration { return c.window })
	compare("longest stall of the guest's writes", 0, func(c cut) time.Duration { return c.stall })
	r.rows = append(r.rows, row{measure: "snapshot create", qemu: qemu, ours: spread(each(ours, func(c cut) time.Duration { return c.took }))})
	for _, by := range []struct {
		name string
		cuts []cut
	}{{"vmsnap", ours}, {"bare", bare}} {
		for _, c := range by.cuts {
			extra := []measurement{{"stall-ns", int64(c.stall)}, {"total-ns", int64(c.took)}}
			for _, s := range c.steps {
				extra = append(extra, measurement{s.name + "-ns", int64(s.took)})
			}
			r.run(fmt.Sprintf("FreezeWindow/qemu=%s/by=%s", qemu, by.name), c.window, extra...)
		}
	}
}

func (r *report) addAPI(qemu string, lists, ready []time.Duration) {
	r.rows = append(r.rows,
		row{measure: "ListVMs with 1 VM, p50", qemu: qemu, ours: short(quantile(lists, 0.5))},
		row{measure: "ListVMs with 1 VM, p99", qemu: qemu, ours: short(quantile(lists, 0.99))},
		row{measure: "vmsnapd, start to ready", qemu: qemu, ours: spread(ready)})
	for _, d := range lists {
		r.run("ListVMs/vms=1", d)
	}
	for _, d := range ready {
		r.run("Start", d)
	}
}

// measurement is a further figure of a run.
type measurement struct {
	unit  string
	value int64
}

// run adds a raw run (golang.org/design/14313-benchmark-format).
func (r *report) run(name string, d time.Duration, extra ...measurement) {
	_, _ = fmt.Fprintf(&r.raw, "Benchmark%s-%d 1 %d ns/op", name, runtime.GOMAXPROCS(0), d.Nanoseconds())
	for _, m := range extra {
		_, _ = fmt.Fprintf(&r.raw, " %d %s", m.value, m.unit)
	}
	r.raw.WriteByte('\n')
}

// spread shows the median and the quartiles around it.
func spread(values []time.Duration) string {
	return fmt.Sprintf("%s [%s … %s]", short(median(values)), short(quantile(values, 0.25)), short(quantile(values, 0.75)))
}

// short shows a duration with three digits.
func short(d time.Duration) string {
	switch ms := float64(d) / float64(time.Millisecond); {
	case ms < 10:
		return fmt.Sprintf("%.2f ms", ms)
	case ms < 100:
		return fmt.Sprintf("%.1f ms", ms)
	default:
		return fmt.Sprintf("%.0f ms", ms)
	}
}

func (r *report) missed() bool {
	return slices.ContainsFunc(r.rows, func(row row) bool {
		v := r.verdict(row)
		return v == missed || v == below
	})
}

func (r *report) table() string {
	var b strings.Builder
	h := r.host
	_, _ = fmt.Fprintf(&b, "%s: %s, %d MiB, Linux %s, %s; load %s\n", h.name, h.cpu, h.memoryMiB, h.kernel, strings.Join(h.qemus, ", "), h.load)
	_, _ = fmt.Fprintf(&b, "Medians and quartiles. Of snapshots without memory there are %d rounds, and the rival is a bare script that freezes, cuts and thaws.\n\n", r.rounds)
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(w, "MEASURE\tQEMU\tVMSNAP\tRIVAL\tRATIO\tBUDGET\tVERDICT")
	for _, row := range r.rows {
		ratio, budget := "-", "-"
		if row.ratio > 0 {
			ratio = fmt.Sprintf("%.2f", row.ratio)
		}
		if row.budget > 0 {
			budget = fmt.Sprintf("≤ %.2f", row.budget)
		}
		if row.floor {
			budget = fmt.Sprintf("≥ %.2f", row.budget)
		}
		_, _ = fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", row.measure, row.qemu, orDash(row.ours), orDash(row.rival), ratio, budget, r.verdict(row))
	}
	_ = w.Flush() // to memory
	if slices.ContainsFunc(r.rows, func(row row) bool { v := r.verdict(row); return v == unsure || v == unsureBelow }) {
		b.WriteString("\nunsure: these few rounds do not tell it from chance; run it without -short\n")
	}
	return b.String()
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// save leaves the table, the raw runs and the plots in a new directory, and
// returns it.
func (r *report) save(results, table string) (string, error) {
	dir := filepath.Join(results, time.Now().Format("2006-01-02-150405")+"-"+r.host.name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(dir, "table.txt"), []byte(table), 0o644); err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(dir, runsFile), append(r.header(), r.raw.Bytes()...), 0o644); err != nil {
		return "", err
	}
	runs, err := parseRuns(r.raw.String())
	if err == nil {
		_, err = drawPlots(dir, runs)
	}
	return dir, err
}

// header is the configuration block of the raw runs.
func (r *report) header() []byte {
	h := r.host
	return fmt.Appendf(nil, "goos: %s\ngoarch: %s\npkg: github.com/vmsnap/vmsnap/bench\ncpu: %s\nhost: %s\nmemory: %d MiB\nkernel: Linux %s\nqemu: %s\nload: %s\n\n",
		runtime.GOOS, runtime.GOARCH, h.cpu, h.name, h.memoryMiB, h.kernel, strings.Join(h.qemus, ", "), h.load)
}
