package main

import (
	"strings"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// savesOf makes saves whose pauses are so many milliseconds.
func savesOf(pauses ...int) []save {
	var saves []save
	for _, p := range pauses {
		d := time.Duration(p) * time.Millisecond
		saves = append(saves, save{
			pause: d, gap: 2 * d, alone: time.Millisecond, took: 4 * time.Second, size: 1 << 30, stream: 4 * time.Second, told: d,
			cpu: time.Second / 2, qemu: 3 * time.Second,
		})
	}
	return saves
}

func sampleMemory() memoryRuns {
	return memoryRuns{
		qemu: "10", memoryMiB: usualMemoryMiB, rate: 400, highest: true,
		ours: savesOf(20, 30, 30, 30, 30, 30, 30, 40, 41, 42), libvirt: savesOf(1000, 1200),
		null: []rate{{1 << 30, time.Second}}, reader: []rate{{1 << 30, time.Second}}, disk: []rate{{1 << 30, 2 * time.Second}}, file: []rate{{1 << 30, 4 * time.Second}}, fileCPU: []time.Duration{2500 * time.Millisecond},
	}
}

func TestMemoryRows(t *testing.T) {
	r := &report{}
	r.addMemory(sampleMemory())
	table := squeeze(r.table())
	for _, line := range []string{
		"memory of 2048 MiB, 400 MB/s dirtied: pause 10 30.0 ms [30.0 ms … 37.5 ms] libvirt 1100 ms [1050 ms … 1150 ms] 0.03 ≤ 0.05 ok",
		"memory of 2048 MiB, 400 MB/s dirtied: pause, median 10 30.0 ms 60.0 ms allowed 0.50 ≤ 1.00 ok",
		"memory of 2048 MiB, 400 MB/s dirtied: pause, saves 8–10 of a process 10 41.0 ms [40.5 ms … 41.5 ms] its first save 20.0 ms 2.05 ≤ 1.50 OVER",
		"memory of 2048 MiB, 400 MB/s dirtied: file 10 1024 MiB libvirt 1024 MiB 1.00 -",
		"memory of 2048 MiB, 400 MB/s dirtied: CPU time of vmsnapd for each GB 10 0.47 s libvirtd 0.47 s 1.00 -",
		"memory of 2048 MiB, 400 MB/s dirtied: CPU time of QEMU for each GB, without the guest 10 2.79 s to a file, no vmsnapd 2.33 s 1.20 -",
		"memory of 2048 MiB, 400 MB/s dirtied: rate, until durable 10 256 MiB/s QEMU to a file, no vmsnapd 256 MiB/s 1.00 ≥ 0.90 ok",
		"memory of 2048 MiB, 400 MB/s dirtied: rate, until durable 10 256 MiB/s the lesser of null and disk: the disk 512 MiB/s 0.50 ≥ 0.90 BELOW",
		"memory of 2048 MiB, 400 MB/s dirtied: rate, until durable 10 256 MiB/s QEMU to a reader that throws it away 1024 MiB/s 0.25 ≥ 0.90 BELOW",
	} {
		if !strings.Contains(table, line) {
			t.Errorf("there is no line %q in\n%s", line, table)
		}
	}
	if !r.missed() {
		t.Error("no budget is missed")
	}
}

// TestMemoryRowsOfOneSave looks for what cannot be told from one save.
func TestMemoryRowsOfOneSave(t *testing.T) {
	r := &report{short: true}
	m := sampleMemory()
	m.ours = m.ours[:1]
	r.addMemory(m)
	if table := r.table(); strings.Contains(table, "of a process") || !strings.Contains(table, "below, unsure") {
		t.Errorf("the table of one save is\n%s", table)
	}
	if r.missed() {
		t.Error("a budget is missed for sure")
	}
}

func TestMemoryRuns(t *testing.T) {
	r := &report{}
	r.addMemory(sampleMemory())
	want := "BenchmarkMemorySave/qemu=10/memory=2048/dirty=400/by=vmsnap/save=10-"
	var line string
	for l := range strings.SplitSeq(r.raw.String(), "\n") {
		if strings.HasPrefix(l, want) {
			line = l
		}
	}
	const figures = " 1 4000000000 ns/op 42000000 pause-ns 84000000 gap-ns 1000000 alone-ns 1073741824 file-bytes 500000000 agent-cpu-ns 3000000000 qemu-cpu-ns 42000000 told-ns 4000000000 stream-ns"
	if !strings.HasSuffix(line, figures) {
		t.Errorf("the tenth run is %q", line)
	}
}

func TestLongestIn(t *testing.T) {
	at := func(ms int) time.Time { return time.UnixMilli(int64(ms)) }
	gaps := []testvm.Gap{{From: at(0), To: at(50)}, {From: at(60), To: at(70)}, {From: at(95), To: at(120)}, {From: at(130), To: at(200)}}
	for _, test := range []struct {
		from, to, want int
	}{
		{60, 100, 25},  // two, the later one in part
		{40, 65, 50},   // in part at the beginning
		{71, 94, 0},    // between two
		{0, 1000, 70},  // all
		{200, 1000, 0}, // what only touches
	} {
		got := longestIn(gaps, span{at(test.from), at(test.to)})
		if want := time.Duration(test.want) * time.Millisecond; got != want {
			t.Errorf("from %d to %d: %v, want %v", test.from, test.to, got, want)
		}
	}
}
