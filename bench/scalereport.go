package main

import (
	"fmt"
	"math"
	"time"
)

// burstName says what is asked of a hundred VMs of a kind at once.
var burstName = map[string]string{kindIdle: "snapshots at once", kindScripted: "dry runs at once"}

// addScale adds what was measured with ever more VMs of a kind. The budgets are
// those of real ones.
func (r *report) addScale(qemu, kind string, all []scaled) {
	for _, one := range all {
		r.addScaled(qemu, kind, one)
		r.runScaled(qemu, kind, one)
	}
	first, last := all[0], all[len(all)-1]
	r.rows = append(r.rows, row{
		measure: fmt.Sprintf("%d %s VMs: %d %s", last.vms, kind, min(atOnce, last.vms), burstName[kind]), qemu: qemu, ours: short(last.burst),
	})
	growth := func(measure string, figure func(scaled) float64) {
		share := func(s scaled) float64 { return figure(s) / float64(s.vms) }
		r.rows = append(r.rows, row{
			measure: fmt.Sprintf("a VM's share with %d %s VMs: %s", last.vms, kind, measure), qemu: qemu,
			rival: fmt.Sprintf("with %d VMs", first.vms), ratio: share(last) / share(first), budget: maxGrowth,
		})
	}
	growth("discovery", func(s scaled) float64 { return float64(s.discovery) })
	growth("resident memory", func(s scaled) float64 { return float64(s.idle.resident) })
	growth("ListVMs, median", func(s scaled) float64 { return float64(median(s.lists)) })
	growth("/metrics, median", func(s scaled) float64 { return float64(median(s.scrapes)) })
	r.addHeld(qemu, kind, first, last)
}

func (r *report) addScaled(qemu, kind string, one scaled) {
	budgeted := one.vms == fullFleet && kind == kindIdle
	add := func(measure, ours string, allowed string, ratio float64) {
		w := row{measure: fmt.Sprintf("%d %s VMs: %s", one.vms, kind, measure), qemu: qemu, ours: ours}
		if budgeted && ratio > 0 {
			w.rival, w.ratio, w.budget = allowed+" allowed", ratio, 1
		}
		r.rows = append(r.rows, w)
	}
	lasts := func(measure string, d, allowed time.Duration) {
		add(measure, short(d), short(allowed), float64(d)/float64(allowed))
	}
	lasts("discovery, from a cold start", one.discovery, maxDiscovery)
	lasts("ready, known before", one.ready, maxReady)
	add("resident memory", mib(one.idle.resident), mib(maxResident), float64(one.idle.resident)/maxResident)
	cpu := one.cpuShare()
	add("CPU", fmt.Sprintf("%.2f%% of a core", 100*cpu), fmt.Sprintf("%.0f%%", 100*maxIdleCPU), cpu/maxIdleCPU)
	lasts("ListVMs, p99", quantile(one.lists, 0.99), maxList)
	lasts("/metrics, p99", quantile(one.scrapes, 0.99), maxScrape)
	add("descriptors, goroutines, threads", fmt.Sprintf("%d, %d, %d", one.idle.files, one.goroutines, one.idle.threads), "", 0)
}

// cpuShare is the CPU time beside the time in which nobody asked for anything.
func (one scaled) cpuShare() float64 { return one.idle.cpu.Seconds() / one.watched.Seconds() }

// addHeld adds what is held for each VM: how much more there is with more of
// them. What is there without any does not count.
func (r *report) addHeld(qemu, kind string, first, last scaled) {
	held := func(what, format string, allowed float64, figure func(scaled) int64) {
		each := float64(figure(last)-figure(first)) / float64(last.vms-first.vms)
		each = math.Round(10*each) / 10 // what vmsnapd has for itself varies by a few
		r.rows = append(r.rows, row{
			measure: fmt.Sprintf("held for a VM, with %d to %d %s VMs: %s", first.vms, last.vms, kind, what), qemu: qemu,
			ours: fmt.Sprintf(format, each), rival: fmt.Sprintf(format+" allowed", allowed), ratio: each / allowed, budget: 1,
		})
	}
	held("descriptors", "%.1f", maxHeldFiles, func(s scaled) int64 { return int64(s.idle.files) })
	held("goroutines", "%.1f", maxHeldGoroutines, func(s scaled) int64 { return int64(s.goroutines) })
	held("resident memory", "%.0f KiB", maxHeld>>10, func(s scaled) int64 { return s.idle.resident >> 10 })
}

// runScaled adds the raw runs. Of calls there are too many: their median and
// their p99 stand for them.
func (r *report) runScaled(qemu, kind string, one scaled) {
	r.run(fmt.Sprintf("Scale/qemu=%s/kind=%s/vms=%d", qemu, kind, one.vms), one.discovery,
		measurement{"ready-ns", int64(one.ready)}, measurement{"resident-bytes", one.idle.resident},
		measurement{"idle-cpu-ns/s", int64(one.cpuShare() * 1e9)},
		measurement{"list-ns", int64(median(one.lists))}, measurement{"list-p99-ns", int64(quantile(one.lists, 0.99))},
		measurement{"metrics-ns", int64(median(one.scrapes))}, measurement{"metrics-p99-ns", int64(quantile(one.scrapes, 0.99))},
		measurement{"fds", int64(one.idle.files)}, measurement{"goroutines", int64(one.goroutines)},
		measurement{"threads", int64(one.idle.threads)})
}
