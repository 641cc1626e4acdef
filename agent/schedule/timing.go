package schedule

import (
	"errors"
	"fmt"
	"strings"
	"time"
	_ "time/tzdata" // a host need not have the database of time zones
)

// Kind is how a timing is told.
type Kind string

// The kinds of timing.
const (
	Once    Kind = "once"
	Hourly  Kind = "hourly"
	Daily   Kind = "daily"
	Weekly  Kind = "weekly"
	Monthly Kind = "monthly"
	Cron    Kind = "cron"
)

// Timing says when a schedule runs. It is what people gave; Rule is what comes
// of it.
type Timing struct {
	Kind     Kind           `json:"kind"`
	At       time.Time      `json:"at,omitzero"`        // once
	Cron     string         `json:"cron,omitempty"`     // cron: five fields
	Weekdays []time.Weekday `json:"weekdays,omitempty"` // weekly: at least one
	// Day is that of the month: 1 to 31, or 0 for the last. A month that is too
	// short has it on its last.
	Day    int    `json:"day,omitempty"`
	Hour   int    `json:"hour,omitempty"`   // daily, weekly and monthly
	Minute int    `json:"minute,omitempty"` // also hourly
	Second int    `json:"second,omitempty"`
	Zone   string `json:"zone,omitempty"` // of the IANA database; empty: UTC
}

// Rule checks a timing.
func (t Timing) Rule() (*Rule, error) {
	zone, err := loadZone(t.Zone)
	if err != nil {
		return nil, err
	}
	r := &Rule{zone: zone}
	switch t.Kind {
	case Once:
		if t.At.IsZero() {
			return nil, errors.New("a schedule that runs once needs a time")
		}
		r.once = t.At.Round(0)
		return r, nil
	case Cron:
		if r.fields, err = parseCron(t.Cron); err != nil {
			return nil, err
		}
		if r.Next(time.Date(2000, 1, 1, 0, 0, 0, 0, zone)).IsZero() {
			return nil, fmt.Errorf("the cron expression %q names no day that there is", t.Cron)
		}
		return r, nil
	}
	r.fields, err = t.fields()
	return r, err
}

// loadZone returns the zone of a name. "Local" would change its meaning with
// the host.
func loadZone(name string) (*time.Location, error) {
	if name == "" {
		return time.UTC, nil
	}
	zone, err := time.LoadLocation(name)
	if err != nil || name == "Local" {
		return nil, fmt.Errorf("%q is not the name of a time zone, such as Europe/Berlin", name)
	}
	return zone, nil
}

// fields returns the wall times of a plain timing.
func (t Timing) fields() (fields, error) {
	for _, part := range []struct {
		name       string
		value, max int
	}{{"hour", t.Hour, 23}, {"minute", t.Minute, 59}, {"second", t.Second, 59}} {
		if part.value < 0 || part.value > part.max {
			return fields{}, fmt.Errorf("the %s %d is not between 0 and %d", part.name, part.value, part.max)
		}
	}
	f := fields{
		second: int64(t.Second), minutes: 1 << t.Minute, hours: 1 << t.Hour,
		days: uint32(all(1, 31)), months: uint16(all(1, 12)), weekdays: uint8(all(0, 6)),
	}
	switch t.Kind {
	case Hourly:
		f.hours = uint32(all(0, 23))
	case Daily:
	case Weekly:
		f.weekdays = 0
		for _, w := range t.Weekdays {
			if w < time.Sunday || w > time.Saturday {
				return fields{}, fmt.Errorf("there is no weekday %d", w)
			}
			f.weekdays |= 1 << w
		}
		if f.weekdays == 0 {
			return fields{}, errors.New("a weekly schedule needs a weekday")
		}
	case Monthly:
		if t.Day < 0 || t.Day > 31 {
			return fields{}, fmt.Errorf("the day %d is not between 1 and 31", t.Day)
		}
		f.days, f.last, f.short = 1<<t.Day, t.Day == 0, true
	default:
		return fields{}, fmt.Errorf("there is no kind of schedule %q", t.Kind)
	}
	return f, nil
}

// String tells a timing in words.
func (t Timing) String() string {
	zone := t.Zone
	if zone == "" {
		zone = "UTC"
	}
	at := fmt.Sprintf("at %02d:%02d", t.Hour, t.Minute)
	seconds := ""
	if t.Second != 0 {
		seconds = fmt.Sprintf(":%02d", t.Second)
	}
	switch t.Kind {
	case Once:
		return "once at " + t.At.UTC().Format("2006-01-02 15:04:05") + " UTC"
	case Cron:
		return "cron " + t.Cron + ", " + zone
	case Hourly:
		return fmt.Sprintf("hourly at :%02d%s, %s", t.Minute, seconds, zone)
	case Weekly:
		days := make([]string, len(t.Weekdays))
		for i, w := range t.Weekdays {
			days[i] = w.String()[:3]
		}
		return "weekly on " + strings.Join(days, ",") + " " + at + seconds + ", " + zone
	case Monthly:
		day := "the last day"
		if t.Day > 0 {
			day = fmt.Sprintf("day %d", t.Day)
		}
		return "monthly on " + day + " " + at + seconds + ", " + zone
	default:
		return string(t.Kind) + " " + at + seconds + ", " + zone
	}
}
