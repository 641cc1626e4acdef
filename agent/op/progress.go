package op

import "time"

// The window over which a rate is measured, and how often it is sampled.
const (
	rateWindow = 5 * time.Second
	rateSample = 250 * time.Millisecond
	maxETA     = 10000 * time.Hour // more than that is as good as unknown
)

// meter measures the rate of a counter over the last seconds.
type meter struct {
	unit    string
	samples []sample // oldest first, one more than the window holds
}

type sample struct {
	at   time.Time
	done uint64
}

// progress returns the progress at a count. A counter that changes its unit or
// runs backwards is measured anew.
func (m *meter) progress(now time.Time, done, total uint64, unit string) Progress {
	last := len(m.samples) - 1
	if unit != m.unit || last >= 0 && done < m.samples[last].done {
		m.unit, m.samples, last = unit, m.samples[:0], -1
	}
	if last < 0 || now.Sub(m.samples[last].at) >= rateSample {
		m.samples = append(m.samples, sample{now, done})
	}
	for len(m.samples) > 1 && now.Sub(m.samples[1].at) >= rateWindow {
		m.samples = m.samples[1:]
	}
	p := Progress{Done: done, Total: total, Unit: unit}
	first := m.samples[0]
	if elapsed := now.Sub(first.at).Seconds(); elapsed > 0 {
		p.Rate = float64(done-first.done) / elapsed
	}
	if p.Rate > 0 && total > done {
		if left := float64(total-done) / p.Rate; left < maxETA.Seconds() {
			p.ETA = time.Duration(left * float64(time.Second))
		}
	}
	return p
}
