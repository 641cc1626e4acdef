package agent

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/blockdev"
)

// When space is measured. What of it does not change is not read again, so that
// most of the time goes into the layers that are written to.
const (
	// spaceLook is how often the agent looks for VMs to measure.
	spaceLook = time.Minute
	// spaceAge is how old the numbers in the metrics get.
	spaceAge = 5 * time.Minute
	// spaceShare bounds the share of the time that measuring a VM takes: a disk with
	// millions of clusters is measured less often.
	spaceShare = 100
	// spaceFresh and spaceFreshShare are the same for somebody who asks.
	spaceFresh      = time.Second
	spaceFreshShare = 10
	// spacePatience is how long whoever asks waits for new numbers.
	spacePatience = 250 * time.Millisecond
	// spaceTurn is how long the agent waits for one VM before it measures the next.
	spaceTurn = 10 * time.Second
	// spaceTimeout ends a measurement. A terabyte in clusters of 64 KiB has 128 MiB
	// of tables.
	spaceTimeout = 5 * time.Minute
	// stampAge is how long a file must not have changed for its stamp to tell that
	// it has not changed since: the kernel's clock for it ticks in milliseconds.
	stampAge = 2 * time.Second
)

// spaceReading is what was measured of a VM.
type spaceReading struct {
	vm        VMSpace
	snapshots map[string]SnapshotSpace // by id; without those that could not be measured
	took      time.Duration
}

// spaceMeter measures a VM from a goroutine of its own, of which there is one at
// a time: a file system that hangs holds up that one alone.
type spaceMeter struct {
	mu        sync.Mutex
	last      *spaceReading // never changed once it is here
	measuring chan struct{} // closed when the measurement that goes on has ended; nil when none does
	changed   bool          // layers or snapshots have, since the last began
	known     map[string]uint64
}

// reading returns what was measured last, nil when nothing was.
func (m *spaceMeter) reading() *spaceReading {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.last
}

// outdate has the next who asks measure again.
func (m *spaceMeter) outdate() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.changed = true
}

// due reports whether the last reading is too old.
func (m *spaceMeter) due(age time.Duration, share int) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.changed || m.last == nil || time.Since(m.last.vm.Measured) > max(age, time.Duration(share)*m.last.took)
}

// followSpace keeps what the metrics tell of space up to date.
func (a *Agent) followSpace(ctx context.Context) {
	look := time.NewTicker(spaceLook)
	defer look.Stop()
	for {
		a.mu.RLock()
		all := make([]*vm, 0, len(a.vms))
		for _, v := range a.vms {
			all = append(all, v)
		}
		a.mu.RUnlock()
		for _, v := range all {
			if v.space.due(spaceAge, spaceShare) {
				a.awaitSpace(ctx, v, spaceTurn)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-look.C:
		}
	}
}

// space returns what a VM and its snapshots take, measured anew if that does not
// take long. It is nil when nothing was measured yet.
func (a *Agent) space(ctx context.Context, v *vm) *spaceReading {
	if v.space.due(spaceFresh, spaceFreshShare) {
		a.awaitSpace(ctx, v, spacePatience)
	}
	return v.space.reading()
}

// awaitSpace measures a VM, and waits for the result for a while.
func (a *Agent) awaitSpace(ctx context.Context, v *vm, patience time.Duration) {
	m := &v.space
	m.mu.Lock()
	measuring := m.measuring
	if measuring == nil {
		measuring = make(chan struct{})
		m.measuring, m.changed = measuring, false
		go a.measureSpace(v, measuring)
	}
	m.mu.Unlock()
	select {
	case <-measuring:
	case <-time.After(patience):
	case <-ctx.Done():
	case <-a.stopping:
	}
}

// measureSpace is the goroutine of a spaceMeter.
func (a *Agent) measureSpace(v *vm, done chan struct{}) {
	ctx, cancel := context.WithTimeout(context.Background(), spaceTimeout)
	defer cancel()
	go func() {
		select {
		case <-a.stopping:
			cancel()
		case <-ctx.Done():
		}
	}()
	m := &v.space
	g := &spaceGauge{ctx: ctx, root: v.root(), began: time.Now(), before: m.known, known: map[string]uint64{}, stamps: map[string]blockdev.Stamp{}}
	reading, err := a.readSpace(ctx, v, g)
	if err == nil {
		err = ctx.Err()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.measuring = nil
	close(done)
	if err != nil {
		a.log.Debug("the space of a VM could not be measured", "vm", v.name(), "error", err)
		return
	}
	m.last, m.known = reading, g.known
}

// root is where the paths of a VM's layers begin for this process.
func (v *vm) root() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.runs) == 0 {
		return ""
	}
	return v.runs[0].proc.Root
}

// readSpace measures a VM as the catalog has it.
func (a *Agent) readSpace(ctx context.Context, v *vm, g *spaceGauge) (*spaceReading, error) {
	disks, err := a.catalog.Disks(ctx, v.id)
	if err != nil {
		return nil, err
	}
	layers, err := a.catalog.Layers(ctx, v.id)
	if err != nil {
		return nil, err
	}
	dependants, err := a.catalog.Dependants(ctx, v.id)
	if err != nil {
		return nil, err
	}
	snapshots, err := a.catalog.Snapshots(ctx, v.id)
	if err != nil {
		return nil, err
	}
	h := newHoldings(disks, layers, dependants, snapshots)
	reading := &spaceReading{vm: h.vm(disks, g), snapshots: map[string]SnapshotSpace{}}
	for _, s := range snapshots {
		space, err := h.snapshot(s, g)
		if err != nil {
			a.log.Debug("the space of a snapshot could not be measured", "vm", s.VMName, "snapshot", s.Name, "error", err)
			continue
		}
		space.Measured = g.began
		reading.snapshots[s.ID] = space
	}
	reading.vm.Measured, reading.took = g.began, time.Since(g.began)
	return reading, nil
}

// spaceGauge measures files for one reading. What was measured for the one before
// is taken from there when the files have not changed since.
type spaceGauge struct {
	ctx           context.Context //nolint:containedctx // of the one reading that it is made for
	root          string
	began         time.Time
	before, known map[string]uint64
	stamps        map[string]blockdev.Stamp
}

func (g *spaceGauge) data(l catalog.Layer) (uint64, error) {
	return g.measured("data", []catalog.Layer{l}, func(images []blockdev.Image) (uint64, error) {
		return blockdev.AllocatedBytes(g.ctx, images[0].Path, images[0].Format)
	})
}

func (g *spaceGauge) overlap(lower, upper catalog.Layer) (uint64, error) {
	return g.measured("overlap", []catalog.Layer{lower, upper}, func(images []blockdev.Image) (uint64, error) {
		return blockdev.OverlappedBytes(g.ctx, images[0], images[1])
	})
}

func (g *spaceGauge) merged(chain []catalog.Layer) (uint64, error) {
	return g.measured("merged", chain, func(images []blockdev.Image) (uint64, error) {
		return blockdev.MergedBytes(g.ctx, images)
	})
}

func (g *spaceGauge) file(path string) (uint64, error) {
	info, err := blockdev.StatPath(path)
	return info.Allocated, err
}

// measured measures images, unless that was done already.
func (g *spaceGauge) measured(what string, layers []catalog.Layer, measure func([]blockdev.Image) (uint64, error)) (uint64, error) {
	key, settled := what, true
	var images []blockdev.Image
	for _, l := range layers {
		path := g.root + l.Path
		stamp, seen := g.stamps[path]
		if !seen {
			var err error
			if stamp, err = blockdev.StampOf(path); err != nil {
				return 0, err
			}
			g.stamps[path] = stamp
		}
		key += fmt.Sprint(" ", stamp)
		settled = settled && stamp.Tells(g.began.Add(-stampAge))
		images = append(images, blockdev.Image{Path: path, Format: l.Format})
	}
	if n, known := g.known[key]; known {
		return n, nil
	}
	n, known := g.before[key]
	if !known || !settled {
		var err error
		if n, err = measure(images); err != nil {
			return 0, err
		}
	}
	g.known[key] = n
	return n, nil
}
