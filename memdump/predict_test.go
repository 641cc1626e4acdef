package memdump

import (
	"errors"
	"math"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/monitor"
)

const mib = 1 << 20

func TestModel(t *testing.T) {
	small := Facts{RAM: 2 * gib, Resident: gib, Running: true}
	huge := small
	huge.Huge = gib
	for name, c := range map[string]struct {
		facts         Facts
		strategy      Strategy
		dirty, target uint64
		pause         [2]time.Duration
		duration      [2]time.Duration
		bytes         [2]uint64
	}{
		"background, huge pages": {huge, Background, 400 * mib, 256 * mib,
			[2]time.Duration{15 * time.Millisecond, 25 * time.Millisecond}, [2]time.Duration{4 * time.Second, 4100 * time.Millisecond}, [2]uint64{gib, gib + 8*mib}},
		"background, small pages": {small, Background, 400 * mib, 256 * mib,
			[2]time.Duration{50 * time.Millisecond, 100 * time.Millisecond}, [2]time.Duration{4 * time.Second, 4200 * time.Millisecond}, [2]uint64{gib, gib + 8*mib}},
		"precopy, idle": {small, Precopy, 0, 256 * mib,
			[2]time.Duration{10 * time.Millisecond, 20 * time.Millisecond}, [2]time.Duration{4 * time.Second, 4100 * time.Millisecond}, [2]uint64{gib, gib}},
		"precopy, converging": {small, Precopy, 25 * mib, 250 * mib,
			[2]time.Duration{15 * time.Millisecond, 70 * time.Millisecond}, [2]time.Duration{4500 * time.Millisecond, 5 * time.Second}, [2]uint64{gib * 11 / 10, gib * 112 / 100}},
		"precopy, too fast": {small, Precopy, 400 * mib, 200 * mib,
			[2]time.Duration{5 * time.Second, 6 * time.Second}, [2]time.Duration{10 * time.Second, 11 * time.Second}, [2]uint64{2 * gib, 2 * gib}},
		"stopped": {small, Stopped, 0, 256 * mib,
			[2]time.Duration{4 * time.Second, 4100 * time.Millisecond}, [2]time.Duration{4 * time.Second, 4100 * time.Millisecond}, [2]uint64{gib, gib + 8*mib}},
		"paused by its owner": {Facts{RAM: gib, Resident: gib}, Stopped, 0, 256 * mib,
			[2]time.Duration{0, 0}, [2]time.Duration{4 * time.Second, 4100 * time.Millisecond}, [2]uint64{gib, gib + 8*mib}},
		"no rate": {small, Background, 0, 0,
			[2]time.Duration{50 * time.Millisecond, 100 * time.Millisecond}, [2]time.Duration{3 * time.Second, 4 * time.Second}, [2]uint64{gib, gib + 8*mib}},
		"absurd": {Facts{RAM: math.MaxUint64, Resident: math.MaxUint64, Running: true}, Precopy, math.MaxUint64, 1,
			[2]time.Duration{time.Hour, math.MaxInt64}, [2]time.Duration{time.Hour, math.MaxInt64}, [2]uint64{0, math.MaxUint64}},
	} {
		p := model(c.facts, c.strategy, c.dirty, c.target)
		if p.Pause < c.pause[0] || p.Pause > c.pause[1] || p.Duration < c.duration[0] || p.Duration > c.duration[1] ||
			p.Bytes < c.bytes[0] || p.Bytes > c.bytes[1] || p.DirtyRate != c.dirty {
			t.Errorf("%s: %+v", name, p)
		}
	}
}

func TestConvergence(t *testing.T) {
	type pass struct {
		left     int64 // MiB when it begins
		expected int64 // milliseconds, QEMU's estimate
		want     time.Duration
		fails    bool
	}
	const ms = time.Millisecond
	for name, c := range map[string]struct {
		maxPause time.Duration
		passes   []pass
	}{
		"converging": {0, []pass{{1000, 0, 0, false}, {400, 400, 0, false}, {160, 160, 0, false}, {64, 64, 0, false}}},
		// The first two say nothing yet.
		"stuck": {0, []pass{{1000, 0, 0, false}, {900, 900, 0, false}, {900, 900, 1125 * ms, false}, {950, 950, 2250 * ms, false}}},
		// No less than twice what did not suffice.
		"stuck at little": {0, []pass{{100, 0, 0, false}, {20, 20, 0, false}, {18, 18, 60 * ms, false}, {17, 17, 120 * ms, false}}},
		"not allowed": {200 * ms, []pass{{1000, 0, 0, false}, {900, 900, 0, false}, {900, 900, 200 * ms, false},
			{900, 900, 0, false}, {900, 900, 0, false}, {900, 900, 0, false}, {900, 900, 0, false}, {900, 900, 0, true}}},
		"allowed in the end": {200 * ms, []pass{{1000, 0, 0, false}, {900, 900, 0, false}, {900, 900, 200 * ms, false}, {400, 400, 0, false}}},
	} {
		d := convergence{maxPause: c.maxPause, limit: firstDowntime}
		for i, p := range c.passes {
			var m monitor.Migration
			m.RAM.DirtySyncCount, m.RAM.Remaining = int64(i+1), p.left*mib
			m.RAM.Mbps, m.ExpectedDowntime = 1000*mib*8/1e6, p.expected
			for n := range 3 { // only the first look at a pass counts
				got, err := d.look(m)
				if n > 0 {
					p.want, p.fails = 0, false
				}
				if got.Round(10*ms) != p.want.Round(10*ms) || errors.Is(err, ErrNotConverging) != p.fails {
					t.Errorf("%s: pass %d: %s, %v; want %s", name, i+1, got, err, p.want)
				}
				m.RAM.Remaining /= 2
			}
		}
	}
}

func TestSamples(t *testing.T) {
	var got []Progress
	s := sampler{report: func(p Progress) { got = append(got, p) }}
	now := time.Now()
	look := func(after time.Duration, left, written, pass int64) Progress {
		t.Helper()
		var m monitor.Migration
		m.RAM.Total, m.RAM.Remaining, m.RAM.Transferred, m.RAM.DirtySyncCount = 100, left, written, pass
		before := len(got)
		s.sample(m, now.Add(after))
		if len(got) != before+1 {
			t.Fatal("no progress")
		}
		return got[before]
	}
	for i, c := range []struct {
		got, want Progress
	}{
		{look(0, 100, 0, 0), Progress{100, 100, 0, 0, 0, 1}},
		{look(time.Second, 60, 50, 1), Progress{100, 60, 40, 50, 50, 1}},
		{look(time.Second+time.Millisecond, 59, 51, 1), Progress{100, 59, 41, 51, 50, 1}}, // too soon for a rate
		{look(2*time.Second, 70, 150, 2), Progress{100, 70, 30, 150, 100, 2}},
		{look(3*time.Second, 200, 140, 2), Progress{100, 100, 0, 140, 0, 2}}, // nonsense
	} {
		if c.got != c.want {
			t.Errorf("%d: %+v, want %+v", i, c.got, c.want)
		}
	}
	s.sample(monitor.Migration{}, now) // nothing is known yet
	(&sampler{}).sample(monitor.Migration{}, now)
	if len(got) != 5 {
		t.Errorf("%d reports", len(got))
	}
}
