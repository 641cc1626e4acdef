package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// cutsOf makes cuts whose windows are so many milliseconds.
func cutsOf(windows ...int) []cut {
	var cuts []cut
	for _, w := range windows {
		d := time.Duration(w) * time.Millisecond
		cuts = append(cuts, cut{window: d, stall: d - 5*time.Millisecond, took: 4 * d, steps: []step{{"freeze", d / 2}}})
	}
	return cuts
}

func sampleReport() *report {
	r := &report{rounds: 5, host: host{
		name: "hv1", cpu: "Some CPU, 2 cores", kernel: "6.1.0", memoryMiB: 2048, load: "0.10 0.20 0.30",
		qemus: []string{"QEMU 7.2.22", "QEMU 10.0.2"},
	}}
	r.addWindows("7.2", cutsOf(100, 102, 104, 106, 108), cutsOf(100, 99, 98, 97, 96))
	r.addWindows("10", cutsOf(200, 202, 204, 206, 208), cutsOf(100, 99, 98, 97, 96))
	r.addAPI("10", []time.Duration{480 * time.Microsecond, 520 * time.Microsecond}, []time.Duration{31 * time.Millisecond})
	return r
}

func TestTable(t *testing.T) {
	want := strings.TrimPrefix(`
hv1: Some CPU, 2 cores, 2048 MiB, Linux 6.1.0, QEMU 7.2.22, QEMU 10.0.2; load 0.10 0.20 0.30
Medians and quartiles. Of snapshots without memory there are 5 rounds, and the rival is a bare script that freezes, cuts and thaws.

MEASURE                              QEMU  VMSNAP                    RIVAL                        RATIO  BUDGET  VERDICT
freeze window                        7.2   104 ms [102 ms … 106 ms]  98.0 ms [97.0 ms … 99.0 ms]  1.06   ≤ 1.15  ok
longest stall of the guest's writes  7.2   99.0 ms [97.0 ms … 101 ms]  93.0 ms [92.0 ms … 94.0 ms]  1.06   -       
`, "\n")
	got := sampleReport().table()
	for line := range strings.SplitSeq(strings.TrimSpace(want), "\n") {
		if !strings.Contains(squeeze(got), squeeze(line)) {
			t.Errorf("there is no line %q in\n%s", line, got)
		}
	}
	for _, line := range []string{
		"freeze window 10 204 ms [202 ms … 206 ms] 98.0 ms [97.0 ms … 99.0 ms] 2.08 ≤ 1.15 OVER",
		"ListVMs with 1 VM, p50 10 0.50 ms - - -",
		"vmsnapd, start to ready 10 31.0 ms [31.0 ms … 31.0 ms] - - -",
	} {
		if !strings.Contains(squeeze(got), line) {
			t.Errorf("there is no line %q in\n%s", line, got)
		}
	}
}

// wantRows fails unless the table has these lines.
func wantRows(t *testing.T, r *report, lines ...string) {
	t.Helper()
	table := squeeze(r.table())
	for _, line := range lines {
		if !strings.Contains(table, line) {
			t.Errorf("there is no line %q in\n%s", line, table)
		}
	}
}

// squeeze makes one space of several.
func squeeze(s string) string { return regexp.MustCompile(` +`).ReplaceAllString(s, " ") }

func TestVerdict(t *testing.T) {
	for _, test := range []struct {
		name  string
		row   row
		short bool
		want  verdict
	}{
		{"no budget", row{ratio: 9}, false, ""},
		{"below", row{ratio: 1.1, budget: 1.15, sure: 1}, false, kept},
		{"just kept", row{ratio: 1.15, budget: 1.15, sure: 1}, false, kept},
		{"over", row{ratio: 1.16, budget: 1.15, sure: 1}, false, missed},
		{"over in a short run, perhaps by chance", row{ratio: 1.3, budget: 1.15, sure: 1.1}, true, unsure},
		{"over in a short run for sure", row{ratio: 1.5, budget: 1.15, sure: 1.2}, true, missed},
		{"below in a short run", row{ratio: 1.1, budget: 1.15, sure: 1}, true, kept},
		{"enough", row{ratio: 0.9, budget: 0.9, floor: true}, false, kept},
		{"too little", row{ratio: 0.89, budget: 0.9, floor: true}, false, below},
		{"too little in a short run", row{ratio: 0.89, budget: 0.9, floor: true}, true, unsureBelow},
	} {
		r := &report{short: test.short, rows: []row{test.row}}
		if got := r.verdict(test.row); got != test.want {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
		}
		if got := r.missed(); got != (test.want == missed || test.want == below) {
			t.Errorf("%s: missed is %v", test.name, got)
		}
	}
}

// TestRuns checks what is saved against the benchmark format, which wants a
// name that begins with Benchmark, an iteration count, and values with units.
func TestRuns(t *testing.T) {
	r := sampleReport()
	dir, err := r.save(t.TempDir(), "the table")
	if err != nil {
		t.Fatal(err)
	}
	if table, err := os.ReadFile(filepath.Join(dir, "table.txt")); err != nil || string(table) != "the table" {
		t.Errorf("table.txt: %q, %v", table, err)
	}
	runs, err := os.ReadFile(filepath.Join(dir, "runs.txt"))
	if err != nil {
		t.Fatal(err)
	}
	header, body, _ := strings.Cut(string(runs), "\n\n")
	for line := range strings.SplitSeq(header, "\n") {
		if !regexp.MustCompile(`^[a-z][^A-Z\s:]*: .+$`).MatchString(line) {
			t.Errorf("not a configuration line: %q", line)
		}
	}
	counts := map[string]int{}
	for line := range strings.SplitSeq(strings.TrimSpace(body), "\n") {
		m := regexp.MustCompile(`^(Benchmark[^\s]+)-\d+ 1( \d+ [a-z/-]+)+$`).FindStringSubmatch(line)
		if m == nil {
			t.Fatalf("not a result: %q", line)
		}
		counts[m[1]]++
	}
	want := map[string]int{
		"BenchmarkFreezeWindow/qemu=7.2/by=vmsnap": 5, "BenchmarkFreezeWindow/qemu=7.2/by=bare": 5,
		"BenchmarkFreezeWindow/qemu=10/by=vmsnap": 5, "BenchmarkFreezeWindow/qemu=10/by=bare": 5,
		"BenchmarkListVMs/vms=1": 2, "BenchmarkStart": 1,
	}
	if diff := cmp.Diff(want, counts); diff != "" {
		t.Errorf("runs (-want +got):\n%s", diff)
	}
	if !strings.Contains(body, "BenchmarkFreezeWindow/qemu=7.2/by=vmsnap-") || !strings.Contains(body, " 1 100000000 ns/op 95000000 stall-ns 400000000 total-ns 50000000 freeze-ns\n") {
		t.Errorf("the first run is not there:\n%s", body)
	}
}

// TestMergesBesideTheBetterRival has each of the rivals be the better one.
func TestMergesBesideTheBetterRival(t *testing.T) {
	took := func(ms ...int) []merged {
		var all []merged
		for _, n := range ms {
			all = append(all, merged{took: time.Duration(n) * time.Millisecond, steps: []step{{"commit", time.Millisecond}}})
		}
		return all
	}
	r := sampleReport()
	r.addMerges(mergeRuns{qemu: "7.2", bytes: 2 << 30, live: took(100), stopped: took(102), virsh: took(150), img: took(96)})
	r.addMerges(mergeRuns{qemu: "10", bytes: 2 << 30, live: took(100), stopped: took(110), virsh: took(99), img: took(200)})
	got := r.table()
	for _, line := range []string{
		"merge of 2048 MiB, VM running: rate beside the better rival's 7.2 100 ms [100 ms … 100 ms] virsh blockcommit 150 ms [150 ms … 150 ms] 0.96 ≥ 0.95 ok",
		"merge of 2048 MiB, VM stopped: rate beside the better rival's 7.2 102 ms [102 ms … 102 ms] qemu-img commit 96.0 ms [96.0 ms … 96.0 ms] 0.94 ≥ 0.95 BELOW",
		"merge of 2048 MiB, VM running: rate beside the better rival's 10 100 ms [100 ms … 100 ms] virsh blockcommit 99.0 ms [99.0 ms … 99.0 ms] 0.99 ≥ 0.95 ok",
		"merge of 2048 MiB, VM stopped: rate beside the better rival's 10 110 ms [110 ms … 110 ms] qemu-img commit 200 ms [200 ms … 200 ms] 0.90 ≥ 0.95 BELOW",
	} {
		if !strings.Contains(squeeze(got), line) {
			t.Errorf("there is no line %q in\n%s", line, got)
		}
	}
	if raw := r.raw.String(); !strings.Contains(raw, "BenchmarkMerge/qemu=10/by=vmsnap-running") || !strings.Contains(raw, " 2147483648 merged-bytes 1000000 commit-ns\n") {
		t.Errorf("the raw runs:\n%s", raw)
	}
}
