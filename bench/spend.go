package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/procfs"
)

// spender is who spends CPU time on a save.
type spender struct {
	agent int   // process id of vmsnapd, or of what libvirtd is a descendant of
	qemu  int   // process id
	guest []int // QEMU's threads that are the guest's CPUs
}

// spending is CPU time, of user and system.
type spending struct {
	agent time.Duration // with its children, those that have ended too; without QEMU
	qemu  time.Duration // without the guest's CPUs
}

// spent returns what was spent so far.
func (s spender) spent() (spending, error) {
	agent, err := s.family()
	if err != nil {
		return spending{}, err
	}
	qemu, err := procfs.NewProc(s.qemu)
	if err != nil {
		return spending{}, err
	}
	stat, err := qemu.Stat()
	if err != nil {
		return spending{}, err
	}
	seconds := stat.CPUTime()
	for _, tid := range s.guest {
		thread, err := threadStat(s.qemu, tid)
		if err != nil {
			return spending{}, err
		}
		seconds -= thread.CPUTime()
	}
	return spending{agent, time.Duration(seconds * float64(time.Second))}, nil
}

func threadStat(pid, tid int) (procfs.ProcStat, error) {
	fs, err := procfs.NewFS(procfs.DefaultMountPoint)
	if err != nil {
		return procfs.ProcStat{}, err
	}
	thread, err := fs.Thread(pid, tid)
	if err != nil {
		return procfs.ProcStat{}, err
	}
	return thread.Stat()
}

// family returns what the agent and its descendants have used.
func (s spender) family() (time.Duration, error) {
	all, err := procfs.AllProcs()
	if err != nil {
		return 0, err
	}
	stats := map[int]procfs.ProcStat{}
	for _, p := range all {
		if stat, err := p.Stat(); err == nil { // else it has ended
			stats[p.PID] = stat
		}
	}
	if _, lives := stats[s.agent]; !lives {
		return 0, fmt.Errorf("process %d has ended", s.agent)
	}
	return cpuOfFamily(stats, s.agent, s.qemu), nil
}

// cpuOfFamily returns what a process and its descendants have used, with those of
// which they have collected the end. One of them is left out.
func cpuOfFamily(stats map[int]procfs.ProcStat, root, but int) time.Duration {
	hertz := 100.0 // ticks a second, on every Linux
	var ticks float64
	for pid, stat := range stats {
		if pid == but {
			continue
		}
		for at := pid; at > 1; at = stats[at].PPID {
			if at == root {
				ticks += float64(stat.UTime+stat.STime) + float64(stat.CUTime+stat.CSTime)
				break
			}
		}
	}
	return time.Duration(ticks / hertz * float64(time.Second))
}

// cpuThreads asks QEMU which of its threads are the guest's CPUs.
func (s *scene) cpuThreads(ctx context.Context) ([]int, error) {
	ctx, cancel := context.WithTimeout(ctx, roundDeadline)
	defer cancel()
	qmp, err := dialQMP(ctx, s.guest.ExtraQMPSockets()[0])
	if err != nil {
		return nil, err
	}
	defer qmp.close()
	var cpus []struct {
		Thread int `json:"thread-id"`
	}
	if err := qmp.call("query-cpus-fast", object{}, &cpus); err != nil {
		return nil, err
	}
	var threads []int
	for _, one := range cpus {
		threads = append(threads, one.Thread)
	}
	return threads, nil
}

// namedCPUThreads returns the threads that are called as QEMU calls the guest's
// CPUs if it names its threads, which libvirt has it do.
func namedCPUThreads(pid int) ([]int, error) {
	all, err := procfs.AllThreads(pid)
	if err != nil {
		return nil, err
	}
	var threads []int
	for _, thread := range all {
		name, err := thread.Comm()
		if err != nil {
			return nil, err
		}
		if strings.HasPrefix(name, "CPU ") {
			threads = append(threads, thread.PID)
		}
	}
	if len(threads) == 0 {
		return nil, fmt.Errorf("QEMU %d names no threads", pid)
	}
	slices.Sort(threads)
	return threads, nil
}
