package main

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/vmsnap/vmsnap/bench/plot"
)

func TestParseRuns(t *testing.T) {
	runs, err := parseRuns("goos: linux\n\nBenchmarkScale/kind=idle/vms=125-2 1 2500 ns/op 7 fds\nBenchmarkStart-2 1 9 ns/op\n")
	if err != nil {
		t.Fatal(err)
	}
	want := []rawRun{
		{"Scale", map[string]string{"kind": "idle", "vms": "125"}, map[string]float64{"ns/op": 2500, "fds": 7}},
		{"Start", map[string]string{}, map[string]float64{"ns/op": 9}},
	}
	if diff := cmp.Diff(want, runs, cmp.AllowUnexported(rawRun{})); diff != "" {
		t.Errorf("runs (-want +got):\n%s", diff)
	}
	for _, bad := range []string{"BenchmarkX", "BenchmarkX-2 1 ns/op", "BenchmarkX-2 1 many ns/op"} {
		if runs, err := parseRuns(bad); err == nil {
			t.Errorf("%q is %v", bad, runs)
		}
	}
}

// FuzzParseRuns: the files are what somebody left in a directory.
func FuzzParseRuns(f *testing.F) {
	f.Add("BenchmarkScale/kind=idle/vms=125-2 1 2500 ns/op 7 fds")
	f.Add("BenchmarkMemorySave/qemu=10/dirty=400/memory=2048/by=vmsnap/save=1-2 1 9 ns/op 5 pause-ns")
	f.Add("BenchmarkCatalog/snapshots=NaN-2 1 -Inf ns/op")
	f.Fuzz(func(_ *testing.T, text string) {
		if runs, err := parseRuns(text); err == nil {
			pauseFigure(runs).SVG()
			growthFigure(runs).SVG()
		}
	})
}

// TestPauseFigure draws what the report of a run of two sizes and rates says.
func TestPauseFigure(t *testing.T) {
	r := &report{}
	for _, memory := range []int{1024, usualMemoryMiB} {
		for _, mbs := range []int{0, 400} {
			r.addMemory(memoryRuns{
				qemu: "10", memoryMiB: memory, rate: mbs, ours: savesOf(20+mbs/10, 30+mbs/10, 40+mbs/10), libvirt: savesOf(memory),
				null: []rate{{1 << 30, time.Second}}, reader: []rate{{1 << 30, time.Second}}, disk: []rate{{1 << 30, time.Second}}, file: []rate{{1 << 30, time.Second}},
			})
		}
	}
	runs, err := parseRuns(r.raw.String())
	if err != nil {
		t.Fatal(err)
	}
	f := pauseFigure(runs)
	if len(f.Panels) != 2 {
		t.Fatalf("there are %d panels: %+v", len(f.Panels), f)
	}
	want := []plot.Panel{
		{
			Title: "QEMU 10, 2 GiB of memory",
			Series: []plot.Series{
				{Name: "vmsnap", Points: []plot.Point{{X: 0, Y: 30, Low: 25, High: 35}, {X: 400, Y: 70, Low: 65, High: 75}}},
				{Name: "libvirt", Points: []plot.Point{{X: 0, Y: 2048}, {X: 400, Y: 2048}}},
			},
		},
		{
			Title: "QEMU 10, 400 MB changed a second",
			Series: []plot.Series{
				{Name: "vmsnap", Points: []plot.Point{{X: 1, Y: 70, Low: 65, High: 75}, {X: 2, Y: 70, Low: 65, High: 75}}},
				{Name: "libvirt", Points: []plot.Point{{X: 1, Y: 1024}, {X: 2, Y: 2048}}},
			},
		},
	}
	for i, p := range f.Panels {
		got := plot.Panel{Title: p.Title, Series: p.Series}
		if diff := cmp.Diff(want[i], got); diff != "" {
			t.Errorf("panel %d (-want +got):\n%s", i, diff)
		}
	}
}

func sampleScale(vms int) scaled {
	return scaled{
		vms: vms, discovery: time.Duration(vms) * time.Millisecond, ready: 300 * time.Millisecond,
		lists: []time.Duration{time.Duration(vms) * time.Microsecond}, scrapes: []time.Duration{time.Duration(vms) * 10 * time.Microsecond},
		idle: usage{cpu: 10 * time.Millisecond, resident: int64(30+vms/5) << 20, files: 20 + 2*vms, threads: 9}, watched: 10 * time.Second,
		goroutines: 15 + 3*vms, burst: time.Second,
	}
}

func TestGrowthFigure(t *testing.T) {
	r := &report{}
	r.addScale("10", kindIdle, []scaled{sampleScale(125), sampleScale(fullFleet)})
	r.addScale("10", kindScripted, []scaled{sampleScale(500), sampleScale(2000)})
	r.addCatalog("10", large{snapshots: 50000, ready: time.Second, resident: 1 << 20, lists: []time.Duration{time.Millisecond}})
	runs, err := parseRuns(r.raw.String())
	if err != nil {
		t.Fatal(err)
	}
	f := growthFigure(runs)
	points := map[string][]plot.Point{}
	for _, p := range f.Panels {
		for _, s := range p.Series {
			points[p.Title+", "+s.Name] = s.Points
		}
	}
	want := map[string][]plot.Point{
		"All are known, from a cold start, idle QEMUs":           {{X: 125, Y: 0.125}, {X: 500, Y: 0.5}},
		"All are known, from a cold start, scripted VMs":         {{X: 500, Y: 0.5}, {X: 2000, Y: 2}},
		"Ready, known before, idle QEMUs":                        {{X: 125, Y: 0.3}, {X: 500, Y: 0.3}},
		"Ready, known before, scripted VMs":                      {{X: 500, Y: 0.3}, {X: 2000, Y: 0.3}},
		"Memory, idle QEMUs":                                     {{X: 125, Y: 55}, {X: 500, Y: 130}},
		"Memory, scripted VMs":                                   {{X: 500, Y: 130}, {X: 2000, Y: 430}},
		"CPU while nobody asks, idle QEMUs":                      {{X: 125, Y: 0.1}, {X: 500, Y: 0.1}},
		"CPU while nobody asks, scripted VMs":                    {{X: 500, Y: 0.1}, {X: 2000, Y: 0.1}},
		"The list of VMs, median, idle QEMUs":                    {{X: 125, Y: 0.125}, {X: 500, Y: 0.5}},
		"The list of VMs, median, scripted VMs":                  {{X: 500, Y: 0.5}, {X: 2000, Y: 2}},
		"/metrics, median, idle QEMUs":                           {{X: 125, Y: 1.25}, {X: 500, Y: 5}},
		"/metrics, median, scripted VMs":                         {{X: 500, Y: 5}, {X: 2000, Y: 20}},
		"Ready, 100 of each VM":                                  {{X: 50, Y: 1}},
		"The list of one VM's snapshots, median, 100 of each VM": {{X: 50, Y: 1}},
	}
	near := cmp.Comparer(func(a, b float64) bool { return a-b < 1e-9 && b-a < 1e-9 })
	if diff := cmp.Diff(want, points, near); diff != "" {
		t.Errorf("points (-want +got):\n%s", diff)
	}
}

func TestScaleRows(t *testing.T) {
	r := &report{}
	r.addScale("10", kindIdle, []scaled{sampleScale(125), sampleScale(fullFleet)})
	wantRows(t, r,
		"500 idle VMs: discovery, from a cold start 10 500 ms 5000 ms allowed 0.10 ≤ 1.00 ok",
		"500 idle VMs: resident memory 10 130 MiB 150 MiB allowed 0.87 ≤ 1.00 ok",
		"500 idle VMs: CPU 10 0.10% of a core 1% allowed 0.10 ≤ 1.00 ok",
		"500 idle VMs: descriptors, goroutines, threads 10 1020, 1515, 9 - - -",
		"500 idle VMs: 100 snapshots at once 10 1000 ms - - -",
		"a VM's share with 500 idle VMs: discovery 10 - with 125 VMs 1.00 ≤ 1.20 ok",
		"held for a VM, with 125 to 500 idle VMs: descriptors 10 2.0 2.0 allowed 1.00 ≤ 1.00 ok",
		"held for a VM, with 125 to 500 idle VMs: goroutines 10 3.0 3.0 allowed 1.00 ≤ 1.00 ok",
		"held for a VM, with 125 to 500 idle VMs: resident memory 10 205 KiB 307 KiB allowed 0.67 ≤ 1.00 ok",
	)
}

// TestDrawPlots leaves no plot of what was not measured, and the same plot of the
// same runs.
func TestDrawPlots(t *testing.T) {
	r := &report{}
	r.addScale("10", kindIdle, []scaled{sampleScale(125), sampleScale(fullFleet)})
	results, err := r.save(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	runs, err := readRuns([]string{results})
	if err != nil {
		t.Fatal(err)
	}
	again := t.TempDir()
	files, err := drawPlots(again, runs)
	if err != nil || len(files) != 1 || filepath.Base(files[0]) != "growth.svg" {
		t.Fatalf("the plots are %v, %v", files, err)
	}
	first, err := os.ReadFile(filepath.Join(results, "growth.svg"))
	if err != nil {
		t.Fatal(err)
	}
	second, err := os.ReadFile(files[0])
	if err != nil || string(first) != string(second) {
		t.Errorf("a plot changes when it is drawn again, %v", err)
	}
}
