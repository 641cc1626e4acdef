package schedule

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// The year that is simulated has both clock changes in every zone that has them.
var (
	yearBegin = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	yearEnd   = time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
)

var yearZones = []string{
	"UTC", berlin, "America/New_York", "Australia/Lord_Howe", "America/Santiago", "Asia/Kathmandu", "Africa/Casablanca",
	"Pacific/Chatham", "America/St_Johns", "Asia/Tokyo", "Africa/Cairo", "Asia/Beirut", "America/Havana", "Atlantic/Azores",
}

// plan is a schedule as the test chose it: the sets are those that the timing
// was written from.
type plan struct {
	timing           Timing
	zone             *time.Location
	hours, minutes   []int
	second           int
	day              func(time.Time) bool
	retention        Retention
	jitter           time.Duration
	every            int           // how many runs go by between deletions
	down, downLength time.Duration // when the daemon does not run
}

// TestYear runs 1,000 schedules for a year against a clock that the test moves
// on, and compares each run and each deletion with an independent calculation:
// the runs with the wall times of each day, looked up one by one, the deletions
// with a retention by sets.
func TestYear(t *testing.T) {
	began := time.Now()
	random := rand.New(rand.NewPCG(7, 2026))
	runs, gone := 0, 0
	for i := range 1000 {
		p := randomPlan(t, random)
		r, g := p.live(t, fmt.Sprint("schedule ", i))
		runs, gone = runs+r, gone+g
		if t.Failed() {
			t.Fatalf("schedule %d: %s, %+v", i, p.timing, p.retention)
		}
	}
	t.Logf("%d runs and %d deletions in %s", runs, gone, time.Since(began))
	if runs < 200000 || gone < 50000 {
		t.Errorf("only %d runs and %d deletions were looked at", runs, gone)
	}
}

func randomPlan(t *testing.T, random *rand.Rand) plan {
	t.Helper()
	name := yearZones[random.IntN(len(yearZones))]
	zone, err := time.LoadLocation(name)
	if err != nil {
		t.Fatal(err)
	}
	p := plan{zone: zone, day: func(time.Time) bool { return true }, jitter: time.Duration(random.IntN(3)) * 10 * time.Minute}
	// Clocks change in the night, mostly.
	hour, minute := []int{0, 1, 2, 3, random.IntN(24)}[random.IntN(5)], random.IntN(60)
	p.hours, p.minutes = []int{hour}, []int{minute}
	p.timing = Timing{Hour: hour, Minute: minute, Zone: name}
	switch random.IntN(20) {
	case 0:
		p.timing.Kind = Hourly
		p.hours = span(0, 23)
	case 1, 2, 3, 4, 5:
		p.timing.Kind = Daily
		p.second = random.IntN(60)
	case 6, 7, 8, 9:
		p.timing.Kind = Weekly
		a, b := time.Weekday(random.IntN(7)), time.Sunday
		p.timing.Weekdays = []time.Weekday{a, b}
		p.day = func(d time.Time) bool { return d.Weekday() == a || d.Weekday() == b }
	case 10, 11, 12, 13:
		p.timing.Kind, p.timing.Day = Monthly, random.IntN(32)
		day := p.timing.Day
		p.day = func(d time.Time) bool {
			last := d.AddDate(0, 0, 1).Day() == 1
			return day == 0 && last || d.Day() == day || last && d.Day() < day
		}
	default:
		p.cron(random)
	}
	p.timing.Second = p.second
	p.retention, p.every = randomRetention(random), 1
	if len(p.hours)*len(p.minutes) > 2 {
		p.every = 6 + random.IntN(24)
		p.retention.MaxAge /= 10
	}
	if random.IntN(4) == 0 {
		p.down, p.downLength = time.Duration(random.IntN(300*24))*time.Hour, time.Duration(random.IntN(20*24*60))*time.Minute
	}
	return p
}

func span(from, to int) (all []int) {
	for v := from; v <= to; v++ {
		all = append(all, v)
	}
	return all
}

// cron writes an expression from sets.
func (p *plan) cron(random *rand.Rand) {
	first := random.IntN(20)
	p.hours = span(first, first+random.IntN(4))
	step := []int{20, 30, 45}[random.IntN(3)]
	p.minutes = nil
	for m := 0; m < 60; m += step {
		p.minutes = append(p.minutes, m)
	}
	month := time.Month(1 + random.IntN(12))
	date := 1 + random.IntN(28)
	p.timing.Kind = Cron
	hours := fmt.Sprintf("%d-%d", p.hours[0], p.hours[len(p.hours)-1])
	switch random.IntN(4) {
	case 0:
		p.timing.Cron = fmt.Sprintf("*/%d %s * * *", step, hours)
	case 1:
		p.timing.Cron = fmt.Sprintf("*/%d %s * %d-12 mon-fri", step, hours, month)
		p.day = func(d time.Time) bool {
			return d.Month() >= month && d.Weekday() != time.Sunday && d.Weekday() != time.Saturday
		}
	case 2:
		p.timing.Cron = fmt.Sprintf("*/%d %s %d,L * SUN", step, hours, date)
		p.day = func(d time.Time) bool {
			return d.Day() == date || d.AddDate(0, 0, 1).Day() == 1 || d.Weekday() == time.Sunday
		}
	default:
		p.timing.Cron = fmt.Sprintf("*/%d */4 %d/3 %s *", step, date, strings.ToLower(month.String()[:3]))
		p.hours = []int{0, 4, 8, 12, 16, 20}
		p.day = func(d time.Time) bool { return d.Month() == month && d.Day() >= date && (d.Day()-date)%3 == 0 }
	}
}

func randomRetention(random *rand.Rand) Retention {
	r := Retention{Last: random.IntN(5)}
	if random.IntN(2) == 0 {
		r.Daily, r.Weekly, r.Monthly = random.IntN(8), random.IntN(5), random.IntN(7)
	}
	if random.IntN(3) == 0 {
		r.Hourly, r.Yearly = random.IntN(25), random.IntN(2)
	}
	if random.IntN(4) == 0 || r.None() {
		r.MaxAge = time.Duration(1+random.IntN(40)) * 24 * time.Hour
	}
	if random.IntN(4) == 0 {
		r.MaxSpace = uint64(1000 + random.IntN(5000))
	}
	return r
}

// live lets the schedule live through the year.
func (p plan) live(t *testing.T, key string) (runs, deletions int) {
	t.Helper()
	rule, err := p.timing.Rule()
	if err != nil {
		t.Fatal(err)
	}
	jitter := Jitter(key, p.jitter)
	want := p.expected(jitter)
	h := History{Handled: yearBegin, Ran: func(time.Time) bool { return false }}
	var points []Point
	downFrom := yearBegin.Add(p.down)
	downTo := downFrom.Add(p.downLength)
	for now := yearBegin; now.Before(yearEnd); {
		d := rule.Due(now, h, jitter, CatchUp)
		h.Handled = d.Handled
		if !d.Run.IsZero() {
			if len(want) == 0 || !want[0].Equal(d.Run) {
				t.Errorf("at %s it runs for %s; expected are %v", now, d.Run, want[:min(2, len(want))])
				return runs, deletions
			}
			want = want[1:]
			points = append(points, Point{ID: fmt.Sprintf("%06d", runs), Time: now, Size: uint64(100 + runs%7*30)})
			before := len(points)
			if runs%p.every == 0 {
				points = p.expire(t, points, now)
			}
			runs, deletions = runs+1, deletions+before-len(points)
		}
		if d.Wake.IsZero() {
			break
		}
		now = d.Wake
		if !now.Before(downFrom) && now.Before(downTo) {
			now = downTo
		}
	}
	if len(want) > 0 {
		t.Errorf("%d runs did not come, the first is %s", len(want), want[0])
	}
	return runs, deletions
}

// expected returns the times of the year's runs, found by looking at every day.
func (p plan) expected(jitter time.Duration) (want []time.Time) {
	for day := yearBegin.AddDate(0, 0, -2); day.Before(yearEnd.AddDate(0, 0, 2)); day = day.AddDate(0, 0, 1) {
		if !p.day(day) {
			continue
		}
		for _, h := range p.hours {
			for _, m := range p.minutes {
				want = append(want, p.instants(day.Add(time.Duration(h)*time.Hour+time.Duration(m)*time.Minute+time.Duration(p.second)*time.Second))...)
			}
		}
	}
	slices.SortFunc(want, time.Time.Compare)
	want = slices.CompactFunc(want, time.Time.Equal)
	downFrom := yearBegin.Add(p.down)
	downTo := downFrom.Add(p.downLength)
	var missed, kept []time.Time
	for _, w := range want {
		due := w.Add(jitter)
		switch {
		case !w.After(yearBegin) || !due.Before(yearEnd):
		case !due.Before(downFrom) && due.Before(downTo):
			missed = append(missed, w)
		default:
			kept = append(kept, w)
		}
	}
	// Of those that were missed, the last is caught up, unless another is due at
	// that very moment.
	if len(missed) > 0 && downTo.Before(yearEnd) && !slices.ContainsFunc(kept, func(w time.Time) bool { return w.Add(jitter).Equal(downTo) }) {
		kept = append(kept, missed[len(missed)-1])
	}
	slices.SortFunc(kept, time.Time.Compare)
	return kept
}

// instants returns when a wall time, written as if it were UTC, runs: each
// offset that the zone has around it is tried.
func (p plan) instants(wall time.Time) []time.Time {
	var found, offsets []time.Time
	for _, around := range []time.Duration{-30 * time.Hour, 30 * time.Hour} {
		_, offset := wall.Add(around).In(p.zone).Zone()
		at := wall.Add(-time.Duration(offset) * time.Second)
		offsets = append(offsets, at)
		if p.wall(at) == wall.Unix() {
			found = append(found, at)
		}
	}
	slices.SortFunc(found, time.Time.Compare)
	found = slices.CompactFunc(found, time.Time.Equal)
	switch {
	case len(found) == 0:
		return []time.Time{p.afterGap(slices.MinFunc(offsets, time.Time.Compare), wall)}
	case len(p.hours) == 24:
		return found
	default:
		return found[:1]
	}
}

// wall returns what the wall clock shows, as seconds.
func (p plan) wall(at time.Time) int64 {
	_, offset := at.In(p.zone).Zone()
	return at.Unix() + int64(offset)
}

// afterGap returns the first second from a time on whose wall clock is past one
// that does not exist.
func (p plan) afterGap(from, wall time.Time) time.Time {
	low, high := int64(0), int64(48*3600)
	for low < high {
		middle := (low + high) / 2
		if p.wall(from.Add(time.Duration(middle)*time.Second)) > wall.Unix() {
			high = middle
		} else {
			low = middle + 1
		}
	}
	return from.Add(time.Duration(low) * time.Second)
}

// expire applies the retention, and compares what stays with what the sets say.
func (p plan) expire(t *testing.T, points []Point, now time.Time) []Point {
	t.Helper()
	want := p.stay(points, now)
	var left []Point
	for _, v := range p.retention.Judge(points, now, p.zone) {
		if len(v.Reasons) == 0 {
			t.Errorf("%s: no reason is given", v.ID)
		}
		if v.Stays != want[v.ID] {
			t.Errorf("at %s: snapshot of %s: it stays: %v (%v); expected: %v", now, v.Time, v.Stays, v.Reasons, want[v.ID])
		}
		if v.Stays {
			left = append(left, v.Point)
		}
	}
	slices.Reverse(left)
	return left
}

// stay returns the ids of the points, given oldest first, that stay.
func (p plan) stay(points []Point, now time.Time) map[string]bool {
	r := p.retention
	stays := map[string]bool{}
	var young []Point
	for _, x := range points {
		if r.MaxAge == 0 || !x.Time.Before(now.Add(-r.MaxAge)) {
			young = append(young, x)
		}
	}
	if r.Last+r.Hourly+r.Daily+r.Weekly+r.Monthly+r.Yearly == 0 {
		for _, x := range young {
			stays[x.ID] = true
		}
	}
	for i, x := range young {
		if len(young)-i <= r.Last {
			stays[x.ID] = true
		}
	}
	for _, c := range []struct {
		count int
		same  func(a, b time.Time) bool
	}{
		{r.Hourly, func(a, b time.Time) bool {
			_, ao := a.Zone()
			_, bo := b.Zone()
			return a.Day() == b.Day() && a.Hour() == b.Hour() && ao == bo && a.Sub(b).Abs() < 2*time.Hour
		}},
		{r.Daily, func(a, b time.Time) bool { return a.YearDay() == b.YearDay() && a.Year() == b.Year() }},
		{r.Weekly, func(a, b time.Time) bool {
			monday := func(t time.Time) int64 { return p.wall(t)/86400 - (int64(t.Weekday())+6)%7 }
			return monday(a) == monday(b)
		}},
		{r.Monthly, func(a, b time.Time) bool { return a.Year() == b.Year() && a.Month() == b.Month() }},
		{r.Yearly, func(a, b time.Time) bool { return a.Year() == b.Year() }},
	} {
		kept := 0
		for i, x := range slices.Backward(young) {
			newest := i == len(young)-1 || !c.same(x.Time.In(p.zone), young[i+1].Time.In(p.zone))
			if newest && kept < c.count {
				kept++
				stays[x.ID] = true
			}
		}
	}
	if r.MaxSpace > 0 {
		var used uint64
		over := false
		seen := 0
		for _, x := range slices.Backward(points) {
			if !stays[x.ID] {
				continue
			}
			seen++
			used += x.Size
			over = over || used > r.MaxSpace
			if over && seen > 1 {
				delete(stays, x.ID)
			}
		}
	}
	return stays
}
