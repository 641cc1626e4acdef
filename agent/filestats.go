package agent

import (
	"context"
	"maps"
	"sync"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/blockdev"
)

// statPatience is how long what is shown of VMs waits for the file systems of
// their layers: a healthy one answers within microseconds, and one that hangs
// would take the answer for all VMs with it. What was last seen is shown then.
const statPatience = 250 * time.Millisecond

// fileStat is what is shown of a layer's file.
type fileStat struct {
	file      file
	allocated uint64 // bytes on the file system
	free      uint64 // bytes that are left there; only statRoom asks
	size      uint64 // where the file ends; the same
}

// statFile looks at a file. Its error is that of a file that is not there.
func statFile(path string) (fileStat, error) {
	info, err := blockdev.StatPath(path)
	if err != nil {
		return fileStat{}, err
	}
	f := fileStat{file: file{FileID: info.FileID}, allocated: info.Allocated}
	if info.Device {
		f.file.device, err = blockdev.DeviceID(path)
	}
	return f, err
}

// fileStats looks at a VM's files from a goroutine of its own, of which there is
// one at a time: a file system that hangs holds up that one alone.
type fileStats struct {
	mu      sync.Mutex
	known   map[string]fileStat // by path; never changed once it is here
	looking chan struct{}       // closed when the look that goes on has ended; nil when none does
	stat    func(path string) (fileStat, error)
}

// look returns what is known of files, after another look at them unless that
// takes longer than ctx lasts.
func (s *fileStats) look(ctx context.Context, paths []string) map[string]fileStat {
	return s.begin(paths).await(ctx)
}

// looked is a look that was begun.
type looked struct {
	stats *fileStats
	paths []string
	ended chan struct{} // closed when the look that goes on has ended; nil when there is nothing to look at
	mine  bool          // else it may have begun before what the caller wants to see
}

// begin begins a look at files, unless one goes on.
func (s *fileStats) begin(paths []string) looked {
	l := looked{stats: s, paths: paths}
	if len(paths) == 0 {
		return l
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	l.ended, l.mine = s.looking, s.looking == nil
	if l.mine {
		l.ended = make(chan struct{})
		s.looking = l.ended
		go s.lookAt(paths, l.ended)
	}
	return l
}

// await returns what is known when the look has ended, or with ctx.
func (l looked) await(ctx context.Context) map[string]fileStat {
	if l.ended == nil {
		return nil
	}
	for {
		select {
		case <-l.ended:
			if !l.mine {
				l = l.stats.begin(l.paths)
				continue
			}
		case <-ctx.Done():
		}
		l.stats.mu.Lock()
		defer l.stats.mu.Unlock()
		return l.stats.known
	}
}

// seen returns what the latest look has found at a path.
func (s *fileStats) seen(path string) (fileStat, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f, ok := s.known[path]
	return f, ok
}

func (s *fileStats) lookAt(paths []string, done chan struct{}) {
	stat := s.stat
	if stat == nil {
		stat = statFile
	}
	s.mu.Lock()
	known := s.known
	s.mu.Unlock()
	var changed map[string]fileStat // a copy of what is known, once that is not true any more
	for _, p := range paths {
		f, err := stat(p)
		if before, is := known[p]; is == (err == nil) && before == f {
			continue
		}
		if changed == nil {
			changed = make(map[string]fileStat, len(paths))
			maps.Copy(changed, known)
		}
		if err == nil {
			changed[p] = f
		} else {
			delete(changed, p)
		}
	}
	s.mu.Lock()
	if changed != nil {
		s.known = changed
	}
	s.looking = nil
	s.mu.Unlock()
	close(done)
}

// fill adds what the catalog and the file system know of a layer, whose file the
// agent finds at path.
func (v LayerView) fill(path string, stats map[string]fileStat, layers []catalog.Layer) LayerView {
	f, seen := stats[path]
	v.Allocated = f.allocated
	for _, l := range layers {
		if seen && f.file.is(l) || !seen && l.Path == v.Path {
			v.ID, v.Path, v.Foreign, v.Immutable = l.ID, l.Path, l.Foreign, l.Immutable
		}
	}
	return v
}
