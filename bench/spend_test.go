package main

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/procfs"
)

func TestCPUOfFamily(t *testing.T) {
	used := func(parent int, own, collected uint) procfs.ProcStat {
		return procfs.ProcStat{PPID: parent, UTime: own, STime: own, CUTime: int(collected), CSTime: 0}
	}
	stats := map[int]procfs.ProcStat{
		1: used(0, 1000, 1000), 10: used(1, 50, 100), // libvirtd's ancestors are none of it
		20: used(10, 25, 0), 30: used(20, 100, 0), // a child, and its QEMU
		40: used(20, 0, 50), 50: used(1, 500, 500), // and somebody else
	}
	// 100+100 of 10, 50 of 20, 50 of 40
	if got := cpuOfFamily(stats, 10, 30); got != 3*time.Second {
		t.Errorf("the family has used %s", got)
	}
}

// TestSpent has this process be the agent as well as QEMU, with one thread that
// does not count.
func TestSpent(t *testing.T) {
	s := spender{agent: os.Getpid(), qemu: os.Getpid()}
	before, err := s.spent()
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(50 * time.Millisecond); time.Now().Before(end); {
		_ = strings.Repeat("x", 1000)
	}
	after, err := s.spent()
	if err != nil || after.qemu <= before.qemu {
		t.Errorf("from %+v to %+v, %v", before, after, err)
	}
	threads, err := procfs.AllThreads(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for _, thread := range threads {
		s.guest = append(s.guest, thread.PID)
	}
	rest, err := s.spent()
	if err != nil || rest.qemu > after.qemu/2 {
		t.Errorf("%s are left without the threads, of %s, %v", rest.qemu, after.qemu, err)
	}
	if _, err := namedCPUThreads(os.Getpid()); err == nil {
		t.Error("this process has threads that are a guest's CPUs")
	}
}

func TestLoadRows(t *testing.T) {
	r := &report{}
	r.addLoads("10", usualMemoryMiB,
		[]load{{1 << 30, 2 * time.Second, 3 * time.Second, 9 * time.Second}}, []load{{bytes: 1 << 30, took: time.Second, runs: 2 * time.Second}})
	wantRows(t, r,
		"memory of 2048 MiB, loaded: rate 10 512 MiB/s QEMU alone 1024 MiB/s 0.50 -",
		"memory of 2048 MiB, loaded: from the start of QEMU until it runs 10 3000 ms [3000 ms … 3000 ms] QEMU alone 2000 ms [2000 ms … 2000 ms] 1.50 -",
		"memory of 2048 MiB, loaded: snapshot restore 10 9000 ms [9000 ms … 9000 ms] - - -",
	)
	if !strings.Contains(r.raw.String(), "BenchmarkMemoryLoad/qemu=10/memory=2048/by=vmsnap-") {
		t.Errorf("the raw runs are %s", r.raw.String())
	}
}

func TestPlanMemory(t *testing.T) {
	for text, want := range map[string]string{"1": "1", "2,8": "2,8", "8,1": "8,1"} {
		var s sizes
		if err := s.Set(text); err != nil || s.String() != want {
			t.Errorf("%q is %q, %v", text, s.String(), err)
		}
	}
	for _, bad := range []string{"", "3", "1,", "x"} {
		var s sizes
		if err := s.Set(bad); err == nil {
			t.Errorf("%q is %v", bad, s)
		}
	}
	plans, err := planMemory(config{memory: sizes{1, 2}})
	if err != nil || len(plans) != 2 || plans[1].saves != 10 {
		t.Errorf("the plans are %+v, %v", plans, err)
	}
	if plans, err = planMemory(config{memory: sizes{2}, short: true}); err != nil || len(plans) != 1 || plans[0].saves != 1 || len(plans[0].rates) != 1 {
		t.Errorf("the short plans are %+v, %v", plans, err)
	}
	if err := (memoryPlan{memoryMiB: 1024, filled: 1 << 60}).fits(t.TempDir()); err == nil || !strings.Contains(err.Error(), "-memory") {
		t.Errorf("a file system that is too small: %v", err)
	}
	if err := (memoryPlan{memoryMiB: 1 << 30}).fits(t.TempDir()); err == nil || !strings.Contains(err.Error(), "twice") {
		t.Errorf("a host that is too small: %v", err)
	}
}
