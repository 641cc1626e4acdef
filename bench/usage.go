package main

import (
	"time"

	"github.com/prometheus/procfs"
)

// usage is what a process has used and uses.
type usage struct {
	cpu      time.Duration // of user and system, since its start
	resident int64         // bytes
	files    int           // descriptors
	threads  int
}

func usageOf(pid int) (usage, error) {
	p, err := procfs.NewProc(pid)
	if err != nil {
		return usage{}, err
	}
	stat, err := p.Stat()
	if err != nil {
		return usage{}, err
	}
	files, err := p.FileDescriptorsLen()
	return usage{
		cpu: time.Duration(stat.CPUTime() * float64(time.Second)), resident: int64(stat.ResidentMemory()), files: files, threads: stat.NumThreads,
	}, err
}
