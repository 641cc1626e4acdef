package schedule

import (
	"crypto/sha256"
	"encoding/binary"
	"time"
)

// Missed is what becomes of a run whose time has passed unused.
type Missed string

// The policies for missed runs.
const (
	CatchUp Missed = "catch-up" // run once for all that were missed
	Skip    Missed = "skip"     // let them go
)

// Grace is how late a run may be without counting as missed: a daemon that is
// restarted at the wrong moment is no reason to let it go.
const Grace = time.Minute

// maxCounted bounds how many missed runs are counted.
const maxCounted = 1000

// Jitter returns by how much the runs of a key are put off: at least nothing,
// less than the maximum, in whole seconds, and always the same for the same
// key. Being constant, it changes neither order nor distance of the runs.
func Jitter(key string, maximum time.Duration) time.Duration {
	seconds := uint64(maximum / time.Second)
	if seconds == 0 {
		return 0
	}
	sum := sha256.Sum256([]byte(key))
	return time.Duration(binary.BigEndian.Uint64(sum[:8])%seconds) * time.Second
}

// History is what is known of the runs so far. Times are those of the rule,
// without jitter.
type History struct {
	// Handled is the last time that was run or let go, and at first the time
	// from which on the schedule runs.
	Handled time.Time
	// Ran reports whether a time was run. It matters where the clock was set
	// back.
	Ran func(time.Time) bool
}

// Decision is what is to be done now.
type Decision struct {
	Run     time.Time // the time to run for, now; zero: nothing
	Late    bool      // the run was missed, and is caught up
	Missed  int       // how many times are let go; at most 1000 are counted
	Handled time.Time // from now on the last time dealt with
	Wake    time.Time // when to decide again, jitter included; zero: never
}

// Due decides what to run at a time.
func (r *Rule) Due(now time.Time, h History, jitter time.Duration, policy Missed) Decision {
	until := now.Add(-jitter)
	d := Decision{Handled: h.Handled}
	if h.Handled.After(now) {
		// The clock was set back. What lies ahead comes again; Ran knows what of
		// it has had its run.
		d.Handled = until
	}
	latest, count := r.latest(d.Handled, until)
	if count > 0 {
		d.Handled = latest
		late := now.Sub(latest.Add(jitter)) > Grace
		switch {
		case h.Ran(latest):
			d.Missed = 0
		case late && policy == Skip:
			d.Missed = count
		default:
			d.Run, d.Late, d.Missed = latest, late, count-1
		}
	}
	if next := r.upcoming(later(d.Handled, until), h.Ran); !next.IsZero() {
		d.Wake = next.Add(jitter)
	}
	return d
}

// upcoming returns the first time after another that has had no run.
func (r *Rule) upcoming(after time.Time, ran func(time.Time) bool) time.Time {
	for {
		next := r.Next(after)
		if next.IsZero() || !ran(next) {
			return next
		}
		after = next
	}
}

// latest returns the last time of the rule after from and up to until, and how
// many there are. Where there are many, it does not go through all.
func (r *Rule) latest(from, until time.Time) (last time.Time, count int) {
	for t := r.Next(from); !t.IsZero() && !t.After(until); t = r.Next(t) {
		last, count = t, count+1
		if count == maxCounted {
			break
		}
	}
	if count < maxCounted {
		return last, count
	}
	for span := time.Hour; ; span *= 2 {
		begin := later(until.Add(-span), last)
		t := r.Next(begin)
		if t.IsZero() || t.After(until) {
			if begin.Equal(last) {
				return last, count
			}
			continue
		}
		for ; !t.IsZero() && !t.After(until); t = r.Next(t) {
			last = t
		}
		return last, count
	}
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
