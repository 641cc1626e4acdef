package main

import (
	"fmt"
	"time"
)

// lastSaves is how many saves at the end of a process's ten stand for its tenth:
// one alone tells little.
const lastSaves = 3

// addMemory adds what was measured of snapshots with memory at one dirty rate.
func (r *report) addMemory(m memoryRuns) {
	add := func(w row, measure string) {
		w.measure, w.qemu = fmt.Sprintf("memory of %d MiB, %d MB/s dirtied: %s", m.memoryMiB, m.rate, measure), m.qemu
		r.rows = append(r.rows, w)
	}
	compare := func(measure string, budget float64, figure func(save) time.Duration) {
		a, b := each(m.ours, figure), each(m.libvirt, figure)
		add(row{ours: spread(a), rival: "libvirt " + spread(b), ratio: float64(median(a)) / float64(median(b)), budget: budget}, measure)
	}
	pause := func(s save) time.Duration { return s.pause }
	pauseBudget := 0.0
	if m.highest {
		pauseBudget = maxPauseRatio
	}
	compare("pause", pauseBudget, pause)
	pauses := each(m.ours, pause)
	if m.memoryMiB == usualMemoryMiB {
		add(row{
			ours: short(median(pauses)), rival: short(maxPause) + " allowed",
			ratio: float64(median(pauses)) / float64(maxPause), budget: 1,
		}, "pause, median")
	}
	if n := len(pauses); n > lastSaves {
		last := pauses[n-lastSaves:]
		add(row{
			ours: spread(last), rival: "its first save " + short(pauses[0]),
			ratio: float64(median(last)) / float64(pauses[0]), budget: maxLaterPause,
		}, fmt.Sprintf("pause, saves %d–%d of a process", n-lastSaves+1, n))
	}
	compare("longest vCPU gap of the whole save", 0, func(s save) time.Duration { return s.gap })
	compare("longest vCPU gap before it, with no save", 0, func(s save) time.Duration { return s.alone })
	compare("snapshot create", 0, func(s save) time.Duration { return s.took })
	size := func(s save) int64 { return s.size }
	ours, theirs := median(each(m.ours, size)), median(each(m.libvirt, size))
	add(row{ours: mib(ours), rival: "libvirt " + mib(theirs), ratio: float64(ours) / float64(theirs)}, "file")
	r.addRates(m, add)
	addSpending(m, add)
	r.runMemory(m)
}

// addRates compares how fast the memory gets to the disk with what is possible.
func (r *report) addRates(m memoryRuns, add func(row, string)) {
	ours := make([]rate, len(m.ours))
	for i, s := range m.ours {
		ours[i] = rate{s.size, s.stream}
	}
	limit, by := middle(m.null), "QEMU to null"
	if disk := middle(m.disk); disk < limit {
		limit, by = disk, "the disk"
	}
	against := func(by string, other float64) {
		add(row{
			ours: mibPerSecond(middle(ours)), rival: by + " " + mibPerSecond(other),
			ratio: middle(ours) / other, budget: minRateRatio, floor: true,
		}, "rate, until durable")
	}
	against("QEMU to a file, no vmsnapd", middle(m.file))
	against("the lesser of null and disk: "+by, limit)
	against("QEMU to a reader that throws it away", middle(m.reader))
	add(row{rival: mibPerSecond(middle(m.null))}, "rate of QEMU to the null device, tracking writes")
	if len(m.plain) > 0 {
		add(row{rival: mibPerSecond(middle(m.plain))}, "rate of QEMU to the null device, a plain migration")
	}
	add(row{rival: mibPerSecond(middle(m.disk))}, "rate of the disk, written to in order, durable")
}

// addSpending compares the CPU time that a save takes, by what it has saved: each
// of its bytes once in ours, some several times in libvirt's.
func addSpending(m memoryRuns, add func(row, string)) {
	perGB := func(saves []save, figure func(save) time.Duration) time.Duration {
		var values []time.Duration
		for _, s := range saves {
			values = append(values, time.Duration(float64(figure(s))/float64(m.bytes())*1e9))
		}
		return median(values)
	}
	seconds := func(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }
	compare := func(measure, rival string, ours, theirs time.Duration) {
		w := row{ours: seconds(ours), rival: rival + " " + seconds(theirs)}
		if theirs > 0 {
			w.ratio = float64(ours) / float64(theirs)
		}
		add(w, measure)
	}
	agent, qemu := func(s save) time.Duration { return s.cpu }, func(s save) time.Duration { return s.qemu }
	compare("CPU time of vmsnapd for each GB", "libvirtd", perGB(m.ours, agent), perGB(m.libvirt, agent))
	compare("CPU time of QEMU for each GB, without the guest", "libvirt's", perGB(m.ours, qemu), perGB(m.libvirt, qemu))
	var alone []time.Duration
	for i, cpu := range m.fileCPU {
		alone = append(alone, time.Duration(float64(cpu)/float64(m.file[i].bytes)*1e9))
	}
	if len(alone) > 0 {
		compare("CPU time of QEMU for each GB, without the guest", "to a file, no vmsnapd", perGB(m.ours, qemu), median(alone))
	}
}

// bytes is how much of a guest's memory is in use: what our file has.
func (m memoryRuns) bytes() int64 { return median(each(m.ours, func(s save) int64 { return s.size })) }

// runMemory adds the raw runs.
func (r *report) runMemory(m memoryRuns) {
	for _, by := range []struct {
		name  string
		saves []save
	}{{"vmsnap", m.ours}, {"libvirt", m.libvirt}} {
		for i, s := range by.saves {
			extra := []measurement{
				{"pause-ns", int64(s.pause)}, {"gap-ns", int64(s.gap)}, {"alone-ns", int64(s.alone)}, {"file-bytes", s.size},
				{"agent-cpu-ns", int64(s.cpu)}, {"qemu-cpu-ns", int64(s.qemu)},
			}
			if s.told > 0 {
				extra = append(extra, measurement{"told-ns", int64(s.told)}, measurement{"stream-ns", int64(s.stream)})
			}
			for _, st := range s.steps {
				extra = append(extra, measurement{st.name + "-ns", int64(st.took)})
			}
			r.run(fmt.Sprintf("MemorySave/qemu=%s/memory=%d/dirty=%d/by=%s/save=%d", m.qemu, m.memoryMiB, m.rate, by.name, i+1), s.took, extra...)
		}
	}
	for _, by := range []struct {
		name  string
		rates []rate
	}{{"null", m.null}, {"reader", m.reader}, {"plain", m.plain}, {"file", m.file}, {"disk", m.disk}} {
		for _, one := range by.rates {
			r.run(fmt.Sprintf("MemoryFloor/qemu=%s/memory=%d/dirty=%d/by=%s", m.qemu, m.memoryMiB, m.rate, by.name), one.took, measurement{"file-bytes", one.bytes})
		}
	}
}

// middle returns the median of rates, in bytes a second.
func middle(rates []rate) float64 {
	var values []int64
	for _, one := range rates {
		values = append(values, int64(one.perSecond()))
	}
	return float64(median(values))
}

func mib(bytes int64) string { return fmt.Sprintf("%d MiB", bytes>>20) }

func mibPerSecond(rate float64) string { return fmt.Sprintf("%.0f MiB/s", rate/(1<<20)) }
