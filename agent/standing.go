package agent

import (
	"context"
	"maps"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/blockdev"
)

// SchedulerView is how the schedules stand.
type SchedulerView struct {
	Looked  time.Time // when they were last looked at; zero before the first time
	Waiting int       // runs that were due and have not begun
	Oldest  time.Time // when the oldest of them was to begin; zero when there is none
}

// Scheduler tells how the schedules stand, without asking the catalog.
func (a *Agent) Scheduler() SchedulerView { return a.scheduler.stands() }

// Ledger is how large the catalog is, and what it says of the last success.
type Ledger struct {
	catalog.Size
	LastSnapshots map[string]time.Time // of each VM that has one, by id: the cut of its newest valid snapshot
}

// Ledger reads the catalog.
func (a *Agent) Ledger(ctx context.Context) (Ledger, error) {
	size, err := a.catalog.Size(ctx)
	if err != nil {
		return Ledger{}, err
	}
	last, err := a.catalog.LastSnapshots(ctx)
	return Ledger{size, last}, err
}

// VMUsage is what a VM takes of its host at the moment.
type VMUsage struct {
	ID, Name string
	Disks    []DiskUsage
	Group    *discover.Usage // nil without a control group of its own
}

// DiskUsage is the layer that a disk grows in. Sizes are bytes.
type DiskUsage struct {
	Device string
	Active uint64 // of the layer, on its file system
	Free   uint64 // on that file system
}

// Usage returns what the VMs take, by name. File systems that do not answer
// within statPatience are told as they were last seen.
func (a *Agent) Usage(ctx context.Context) []VMUsage {
	views := a.sketches()
	groups := a.ownGroups()
	ctx, cancel := context.WithTimeout(ctx, statPatience)
	defer cancel()
	all := make([]VMUsage, 0, len(views))
	seen := map[string]bool{}
	var looking sync.WaitGroup
	for _, view := range views {
		v := a.byID(view.ID)
		if v == nil || seen[view.ID] {
			continue // forgotten at this moment, or another process of one identity
		}
		seen[view.ID] = true
		all = append(all, VMUsage{ID: view.ID, Name: view.Name})
		u := &all[len(all)-1] // the capacity is for all of them
		looking.Go(func() {
			u.Disks = v.diskUsage(ctx, view.Disks)
			if path, own := groups[view.ID]; own {
				u.Group = discover.ReadUsage(path)
			}
		})
	}
	looking.Wait()
	return all
}

// ownGroups returns the control groups that hold one VM and no other, by the ids
// of these VMs.
func (a *Agent) ownGroups() map[string]string {
	a.mu.RLock()
	defer a.mu.RUnlock()
	own, others := map[string]string{}, map[string]int{}
	for id, v := range a.vms {
		v.mu.Lock()
		for _, r := range v.runs {
			if c := r.proc.Cgroup; c.Mode == discover.CgroupV2 && c.Unit != "" {
				own[id] = c.Path
				others[c.Path]++
			}
		}
		v.mu.Unlock()
	}
	maps.DeleteFunc(own, func(_, path string) bool { return others[path] > 1 })
	return own
}

// diskUsage looks at the active layers of disks. Those on block devices take
// no more than they have.
func (v *vm) diskUsage(ctx context.Context, disks []DiskView) []DiskUsage {
	root := v.root()
	var paths []string
	for _, d := range disks {
		if len(d.Layers) > 0 {
			paths = append(paths, root+d.Layers[0].Path)
		}
	}
	rooms := v.rooms.look(ctx, paths)
	var all []DiskUsage
	for _, d := range disks {
		if len(d.Layers) == 0 {
			continue
		}
		if r, known := rooms[root+d.Layers[0].Path]; known {
			all = append(all, DiskUsage{Device: d.Device, Active: r.allocated, Free: r.free})
		}
	}
	return all
}

// roomStats is a fileStats that looks at the space around the files.
type roomStats struct{ fileStats }

func (s *roomStats) look(ctx context.Context, paths []string) map[string]fileStat {
	s.mu.Lock()
	if s.stat == nil {
		s.stat = statRoom
	}
	s.mu.Unlock()
	return s.fileStats.look(ctx, paths)
}

// statRoom looks at a file and at the space around it.
func statRoom(path string) (fileStat, error) {
	info, err := blockdev.StatPath(path)
	if err != nil {
		return fileStat{}, err
	}
	if !info.Regular {
		return fileStat{}, unix.ENOTSUP // a block device grows nowhere
	}
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(path), &st); err != nil {
		return fileStat{}, err
	}
	return fileStat{allocated: info.Allocated, free: st.Bavail * uint64(st.Bsize), size: uint64(info.Size)}, nil
}
