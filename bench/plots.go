package main

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/vmsnap/vmsnap/bench/plot"
)

// drawPlots writes the plots of runs to a directory, and returns their files. What
// was not measured has none.
func drawPlots(dir string, runs []rawRun) ([]string, error) {
	var files []string
	for name, figure := range map[string]plot.Figure{
		"pause.svg": pauseFigure(runs), "growth.svg": growthFigure(runs),
	} {
		if len(figure.Panels) == 0 {
			continue
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, figure.SVG(), 0o644); err != nil {
			return nil, err
		}
		files = append(files, file)
	}
	slices.Sort(files)
	return files, nil
}

// savers are those who save memory, as the raw runs and the plots call them.
var savers = []struct{ label, name string }{{"vmsnap", "vmsnap"}, {"libvirt", "libvirt"}}

// pauseFigure shows the pause of snapshots with memory, against what the guest
// changes and against its memory.
func pauseFigure(runs []rawRun) plot.Figure {
	f := plot.Figure{Title: "How long a guest stands still for a snapshot with memory", Columns: 2}
	saves := selectRuns(runs, "MemorySave", nil)
	for _, qemu := range valuesOf(saves, "qemu") {
		of := selectRuns(saves, "MemorySave", map[string]string{"qemu": qemu})
		memory := strconv.Itoa(usualMemoryMiB)
		if sizes := valuesOf(of, "memory"); !slices.Contains(sizes, memory) {
			memory = sizes[0]
		}
		rates := valuesOf(of, "dirty")
		highest := rates[len(rates)-1]
		f.Panels = append(f.Panels,
			pausePanel(fmt.Sprintf("QEMU %s, %s GiB of memory", qemu, gib(memory)), "MB changed a second", 1,
				of, map[string]string{"memory": memory}, "dirty"),
			pausePanel(fmt.Sprintf("QEMU %s, %s MB changed a second", qemu, highest), "GiB of memory", 1024,
				of, map[string]string{"dirty": highest}, "memory"))
	}
	return f
}

// gib shows MiB as GiB.
func gib(mib string) string {
	return strconv.FormatFloat(numberOf(mib)/1024, 'g', 3, 64)
}

func pausePanel(title, label string, unit float64, runs []rawRun, labels map[string]string, x string) plot.Panel {
	p := plot.Panel{Title: title, X: plot.Axis{Label: label}, Y: plot.Axis{Label: "pause, ms", Log: true}}
	if labels["memory"] == strconv.Itoa(usualMemoryMiB) {
		p.Limit, p.LimitName = milliseconds(float64(maxPause)), short(maxPause)+" allowed"
	}
	for _, by := range savers {
		labels := maps.Clone(labels)
		labels["by"] = by.label
		points := pointsOf(selectRuns(runs, "MemorySave", labels), x, unit, "pause-ns", milliseconds(1))
		p.Series = append(p.Series, plot.Series{Name: by.name, Points: points})
	}
	return p
}

func milliseconds(ns float64) float64 { return ns / 1e6 }

// kinds are those of many VMs, as the raw runs and the plots call them.
var kinds = []struct{ label, name string }{{kindIdle, "idle QEMUs"}, {kindScripted, "scripted VMs"}}

// growthFigure shows what vmsnapd takes with ever more VMs, and with ever more
// snapshots.
func growthFigure(runs []rawRun) plot.Figure {
	f := plot.Figure{Title: "What vmsnapd takes with ever more VMs", Columns: 2}
	if scale := selectRuns(runs, "Scale", nil); len(scale) > 0 {
		for _, one := range []struct {
			title, label, figure string
			factor               float64
		}{
			{"All are known, from a cold start", "s", "ns/op", 1e-9},
			{"Ready, known before", "s", "ready-ns", 1e-9},
			{"Memory", "MiB resident", "resident-bytes", 1.0 / (1 << 20)},
			{"CPU while nobody asks", "% of a core", "idle-cpu-ns/s", 1e-7},
			{"The list of VMs, median", "ms", "list-ns", 1e-6},
			{"/metrics, median", "ms", "metrics-ns", 1e-6},
		} {
			p := plot.Panel{Title: one.title, X: plot.Axis{Label: "VMs"}, Y: plot.Axis{Label: one.label}}
			for _, kind := range kinds {
				points := pointsOf(selectRuns(scale, "Scale", map[string]string{"kind": kind.label}), "vms", 1, one.figure, one.factor)
				if len(points) > 0 {
					p.Series = append(p.Series, plot.Series{Name: kind.name, Points: points})
				}
			}
			f.Panels = append(f.Panels, p)
		}
	}
	if catalog := selectRuns(runs, "Catalog", nil); len(catalog) > 0 {
		for _, one := range []struct {
			title, label, figure string
			factor               float64
		}{
			{"Ready", "s", "ready-ns", 1e-9},
			{"The list of one VM's snapshots, median", "ms", "ns/op", 1e-6},
		} {
			f.Panels = append(f.Panels, plot.Panel{
				Title: one.title, X: plot.Axis{Label: "thousand snapshots in the catalog"}, Y: plot.Axis{Label: one.label},
				Series: []plot.Series{{Name: fmt.Sprintf("%d of each VM", catalogSnapshots), Points: pointsOf(catalog, "snapshots", 1000, one.figure, one.factor)}},
			})
		}
	}
	return f
}

// selectRuns returns the runs of a name that have these labels.
func selectRuns(runs []rawRun, name string, labels map[string]string) []rawRun {
	var selected []rawRun
	for _, r := range runs {
		fits := r.name == name
		for key, value := range labels {
			fits = fits && r.labels[key] == value
		}
		if fits {
			selected = append(selected, r)
		}
	}
	return selected
}

// valuesOf returns the values that a label has, by their number.
func valuesOf(runs []rawRun, label string) []string {
	seen := map[string]bool{}
	for _, r := range runs {
		seen[r.labels[label]] = true
	}
	return slices.SortedFunc(maps.Keys(seen), func(a, b string) int {
		return cmp.Or(cmp.Compare(numberOf(a), numberOf(b)), cmp.Compare(a, b))
	})
}

// numberOf returns the number that a label's value is; 0 for what is none.
func numberOf(value string) float64 {
	n, err := strconv.ParseFloat(value, 64)
	if err != nil || math.IsNaN(n) || n < 0 {
		return 0
	}
	return n
}

// pointsOf returns the median and the quartiles of a figure at each value of a
// label, which is counted in units.
func pointsOf(runs []rawRun, label string, unit float64, figure string, factor float64) []plot.Point {
	var points []plot.Point
	for _, at := range valuesOf(runs, label) {
		var values []int64
		for _, r := range selectRuns(runs, runs[0].name, map[string]string{label: at}) {
			values = append(values, int64(r.figures[figure]))
		}
		p := plot.Point{X: numberOf(at) / unit, Y: float64(median(values)) * factor}
		if len(values) > 1 {
			p.Low, p.High = float64(quantile(values, 0.25))*factor, float64(quantile(values, 0.75))*factor
		}
		points = append(points, p)
	}
	return points
}
