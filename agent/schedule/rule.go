package schedule

import (
	"time"
)

// Rule is a timing that was checked: it finds the instants at which to run.
type Rule struct {
	once   time.Time // the only instant, unless zero
	fields fields
	zone   *time.Location
}

// horizon is how far Next looks: the 29th of February is at most eight years
// away.
const horizon = 9 * 366 * 24 * time.Hour

// Zone returns the time zone of the rule.
func (r *Rule) Zone() *time.Location { return r.zone }

// Next returns the first instant after a time at which the rule runs, in the
// rule's time zone, and the zero time when there is none any more. See the
// package's documentation for what happens where clocks change.
func (r *Rule) Next(after time.Time) time.Time {
	if !r.once.IsZero() {
		if r.once.After(after) {
			return r.once.In(r.zone)
		}
		return time.Time{}
	}
	t := after.Round(0).In(r.zone).Truncate(time.Second).Add(time.Second)
	end := t.Add(horizon)
	for t.Before(end) {
		start, stop := t.ZoneBounds()
		if stop.IsZero() || stop.After(end) {
			stop = end
		}
		if at, ok := r.within(t, start, stop); ok {
			return time.Unix(at, 0).In(r.zone)
		}
		t = stop
	}
	return time.Time{}
}

// within looks for an instant from t on and before stop; from start to stop the
// wall clock runs steadily.
func (r *Rule) within(t, start, stop time.Time) (int64, bool) {
	_, o := t.Zone()
	offset := int64(o)
	from := t.Unix() + offset
	if !start.IsZero() {
		_, o := start.Add(-time.Second).Zone()
		before := int64(o)
		if before < offset && !t.After(start) {
			// The wall times in between do not exist.
			if _, ok := r.fields.next(start.Unix()+before, start.Unix()+offset); ok {
				return start.Unix(), true
			}
		}
		if before > offset && !r.fields.everyHour() {
			// Those from here to there have been before.
			from = max(from, start.Unix()+before)
		}
	}
	wall, ok := r.fields.next(from, stop.Unix()+offset)
	return wall - offset, ok
}
