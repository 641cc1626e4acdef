package schedule

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Retention says which snapshots of a schedule stay. Of the counts, 0 means
// that there is no such rule; a snapshot stays when one of the rules holds it.
// Without any count all stay that are within the limits of age and space.
type Retention struct {
	Last     int           `json:"last,omitempty"`      // the newest ones
	Hourly   int           `json:"hourly,omitempty"`    // the newest of each of so many hours that have one
	Daily    int           `json:"daily,omitempty"`     // … days
	Weekly   int           `json:"weekly,omitempty"`    // … weeks (ISO 8601, from Monday)
	Monthly  int           `json:"monthly,omitempty"`   // … months
	Yearly   int           `json:"yearly,omitempty"`    // … years
	MaxAge   time.Duration `json:"max_age,omitempty"`   // none that is older; 0: no limit
	MaxSpace uint64        `json:"max_space,omitempty"` // bytes of all together; the oldest go first, the newest never; 0: no limit
}

// None reports whether everything stays for ever.
func (r Retention) None() bool { return r == Retention{} }

// Check refuses what cannot be meant.
func (r Retention) Check() error {
	for _, rule := range r.rules() {
		if rule.count < 0 {
			return fmt.Errorf("keep-%s is %d; it cannot be less than 0", rule.name, rule.count)
		}
	}
	if r.MaxAge < 0 {
		return errors.New("the maximum age is less than 0")
	}
	return nil
}

// Most returns the most snapshots of one VM that the counts keep, and whether
// there are counts at all.
func (r Retention) Most() (int, bool) {
	sum := 0
	for _, rule := range r.rules() {
		sum += rule.count
	}
	return sum, sum > 0
}

// Point is a snapshot that a retention is applied to.
type Point struct {
	ID        string
	Name      string
	Time      time.Time // of the cut
	Size      uint64    // bytes that it takes
	Expires   time.Time // it goes then, whatever the rules say; zero: never
	Protected string    // why it never goes ("it is a template"); empty: it may
}

// Verdict is what becomes of a snapshot, and why.
type Verdict struct {
	Point
	Stays   bool
	Reasons []string
}

// rule keeps the newest snapshot of each of a number of periods.
type rule struct {
	name   string
	count  int
	period func(time.Time) string // tells the period of a time in the schedule's zone
}

func (r Retention) rules() []rule {
	return []rule{
		{"last", r.Last, nil},
		// With the offset, so that the hour that is there twice counts twice.
		{"hourly", r.Hourly, func(t time.Time) string { return t.Format("2006-01-02 15h -0700") }},
		{"daily", r.Daily, func(t time.Time) string { return t.Format("2006-01-02") }},
		{"weekly", r.Weekly, func(t time.Time) string {
			year, week := t.ISOWeek()
			return fmt.Sprintf("%d-W%02d", year, week)
		}},
		{"monthly", r.Monthly, func(t time.Time) string { return t.Format("2006-01") }},
		{"yearly", r.Yearly, func(t time.Time) string { return t.Format("2006") }},
	}
}

// Judge says for each snapshot of one VM whether it stays, the newest first.
// Protected ones stay, and take no place of a rule; their size counts.
func (r Retention) Judge(points []Point, now time.Time, zone *time.Location) []Verdict {
	verdicts := make([]Verdict, len(points))
	for i, p := range points {
		verdicts[i] = Verdict{Point: p}
	}
	slices.SortStableFunc(verdicts, func(x, y Verdict) int {
		if c := y.Time.Compare(x.Time); c != 0 {
			return c
		}
		return strings.Compare(y.ID, x.ID)
	})
	var open []*Verdict // those that the rules decide on
	for i := range verdicts {
		v := &verdicts[i]
		switch {
		case v.Protected != "":
			v.Stays, v.Reasons = true, []string{v.Protected}
		case !v.Expires.IsZero() && !v.Expires.After(now):
			v.Reasons = []string{"it expired at " + v.Expires.UTC().Format(stampFormat)}
		case r.MaxAge > 0 && now.Sub(v.Time) > r.MaxAge:
			v.Reasons = []string{"it is older than " + age(r.MaxAge)}
		default:
			open = append(open, v)
		}
	}
	r.count(open, zone)
	r.fit(verdicts)
	return verdicts
}

const stampFormat = "2006-01-02 15:04:05 UTC"

// count applies the rules that count.
func (r Retention) count(open []*Verdict, zone *time.Location) {
	if _, counted := r.Most(); !counted {
		for _, v := range open {
			v.Stays, v.Reasons = true, []string{"no rule limits the number"}
		}
		return
	}
	for _, rule := range r.rules() {
		kept, period := 0, ""
		for i, v := range open {
			if kept == rule.count {
				break
			}
			reason := ""
			if rule.period != nil {
				current := rule.period(v.Time.In(zone))
				if i > 0 && current == period {
					continue
				}
				period, reason = current, "newest of "+current+", "
			}
			kept++
			v.Stays = true
			v.Reasons = append(v.Reasons, fmt.Sprintf("%s%s %d of %d", reason, rule.name, kept, rule.count))
		}
	}
	for _, v := range open {
		if !v.Stays {
			v.Reasons = []string{"no rule keeps it"}
		}
	}
}

// fit lets the oldest go until those that stay fit into the space.
func (r Retention) fit(verdicts []Verdict) {
	if r.MaxSpace == 0 {
		return
	}
	var total uint64
	newest := -1
	for i, v := range verdicts {
		if v.Stays {
			total += v.Size
			if newest < 0 {
				newest = i
			}
		}
	}
	for i := len(verdicts) - 1; i > newest && total > r.MaxSpace; i-- {
		v := &verdicts[i]
		if !v.Stays || v.Protected != "" {
			continue
		}
		total -= v.Size
		v.Stays, v.Reasons = false, []string{fmt.Sprintf("the space of %d bytes does not hold it", r.MaxSpace)}
	}
}

// age tells a duration in days where it is whole days.
func age(d time.Duration) string {
	const day = 24 * time.Hour
	switch {
	case d == day:
		return "1 day"
	case d%day == 0:
		return fmt.Sprintf("%d days", d/day)
	default:
		return d.String()
	}
}
