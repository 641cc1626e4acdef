package memdump

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/vmsnap/vmsnap/monitor"
)

// A Prediction is what a save will cost, roughly.
type Prediction struct {
	Pause     time.Duration
	Duration  time.Duration // the pause included
	Bytes     uint64        // written
	DirtyRate uint64        // bytes of memory that the guest changes per second; 0 if unknown
}

// Predict measures for a second at most how fast a running guest changes its
// memory, and says what a save will cost. targetRate is what the target takes,
// in bytes per second; 0 if unknown.
func Predict(ctx context.Context, s *monitor.Session, f Facts, c Choice, targetRate uint64) (Prediction, error) {
	var dirty uint64
	if c.Strategy != Stopped && f.Running {
		var err error
		if dirty, err = measureDirtyRate(ctx, s); err != nil {
			return Prediction{}, fmt.Errorf("predict the save of memory: %w", err)
		}
	}
	return model(f, c.Strategy, dirty, targetRate), nil
}

// What the model is made of, as measured with guests of 0.5 to 8 GiB.
const (
	// fallbackRate is taken for the target's when it is unknown, in bytes per
	// second: what a single SATA drive with flash takes.
	fallbackRate = 300 << 20
	// cutCost is stop, the transaction, the devices' state and the round trips.
	cutCost = 15 * time.Millisecond
	// Before it protects memory QEMU reads it all, and then the kernel changes
	// each page table entry: by the page, of which there are 512 in a huge one.
	trackHuge  = 3 * time.Millisecond  // per GiB
	trackSmall = 55 * time.Millisecond // per GiB
)

const gib = 1 << 30

// model says what a save costs.
func model(f Facts, strategy Strategy, dirtyRate, targetRate uint64) Prediction {
	if targetRate == 0 {
		targetRate = fallbackRate
	}
	resident := min(f.Resident, f.RAM)
	p := Prediction{Bytes: resident + resident/pageSize*pageHeader, DirtyRate: dirtyRate}
	whole := transfer(p.Bytes, targetRate)
	switch strategy {
	case Background:
		huge := min(f.Huge, resident)
		p.Pause = cutCost + per(huge, trackHuge) + per(resident-huge, trackSmall)
		p.Duration = p.Pause + whole
	case Precopy:
		p.Bytes, p.Pause = passes(resident, dirtyRate, targetRate)
		p.Pause += cutCost
		p.Duration = transfer(p.Bytes, targetRate) + cutCost
	default:
		p.Duration = cutCost + whole
		if f.Running {
			p.Pause = p.Duration
		}
	}
	return p
}

// passes returns what precopy writes and how long its last pass takes: each
// pass saves what was changed during the one before it, until that is little
// enough, or does not become less.
func passes(resident, dirtyRate, targetRate uint64) (written uint64, last time.Duration) {
	left := resident
	for range maxPasses {
		written += left
		took := transfer(left, targetRate)
		next := min(uint64(float64(dirtyRate)*took.Seconds()), resident)
		if need := transfer(next, targetRate); need <= firstDowntime || next >= left/4*3 {
			return written + next, need
		}
		left = next
	}
	return written, transfer(left, targetRate)
}

// maxPasses is beyond what any guest takes whose passes become shorter by a
// quarter each.
const maxPasses = 100

func transfer(bytes, rate uint64) time.Duration { return seconds(float64(bytes) / float64(rate)) }

func per(bytes uint64, gibCost time.Duration) time.Duration {
	return seconds(float64(bytes) / gib * gibCost.Seconds())
}

// seconds bounds what a slow rate makes of a large memory.
func seconds(s float64) time.Duration {
	return time.Duration(min(s*float64(time.Second), math.MaxInt64/4))
}
