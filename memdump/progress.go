package memdump

import (
	"time"

	"github.com/vmsnap/vmsnap/monitor"
)

// Progress is how far a save has come, in QEMU's figures.
type Progress struct {
	Total     uint64 // bytes of memory
	Remaining uint64 // bytes of memory still to be saved in this pass
	Done      uint64 // Total without Remaining; with precopy a new pass takes some back
	Written   uint64 // bytes written
	Rate      uint64 // bytes written per second, since the last progress
	Pass      int    // over memory, from 1; background and stopped make one
}

// sampler makes progress of what QEMU says.
type sampler struct {
	report func(Progress) // may be nil
	at     time.Time      // of the sample that rates are measured from
	since  uint64         // bytes written then
	rate   uint64
}

// sample reports progress.
func (s *sampler) sample(m monitor.Migration, now time.Time) {
	if s.report == nil || m.RAM.Total <= 0 {
		return
	}
	p := Progress{
		Total:     positive(m.RAM.Total),
		Remaining: min(positive(m.RAM.Remaining), positive(m.RAM.Total)),
		Written:   positive(m.RAM.Transferred),
		Pass:      int(max(m.RAM.DirtySyncCount, 1)),
	}
	p.Done = p.Total - p.Remaining
	switch took := now.Sub(s.at); {
	case s.at.IsZero():
		s.at, s.since = now, p.Written
	case took >= progressEvery/2: // what is measured in less is noise
		s.rate = uint64(float64(p.Written-min(s.since, p.Written)) / took.Seconds())
		s.at, s.since = now, p.Written
	}
	p.Rate = s.rate
	s.report(p)
}

func positive(n int64) uint64 { return uint64(max(n, 0)) }
