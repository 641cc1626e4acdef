package schedule

import (
	"fmt"
	"math/bits"
	"strconv"
	"strings"
)

// fields are the wall times that a timing names: those that match all fields.
type fields struct {
	second   int64
	minutes  uint64 // bit 0 to 59
	hours    uint32 // bit 0 to 23
	days     uint32 // bit 1 to 31
	last     bool   // the last day of the month
	short    bool   // a month that is too short has the day on its last
	months   uint16 // bit 1 to 12
	weekdays uint8  // bit 0, Sunday, to 6
	// either means that a day matches by its number or by its weekday, as cron
	// has it when both are restricted; else it has to match both.
	either bool
}

// field is one field of a cron expression.
type field struct {
	name     string
	min, max int
	names    []string // of the values from min on
	last     bool     // it may say L
}

var cronFields = []field{
	{name: "minute", max: 59},
	{name: "hour", max: 23},
	{name: "day", min: 1, max: 31, last: true},
	{name: "month", min: 1, max: 12, names: []string{"jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"}},
	{name: "weekday", max: 7, names: []string{"sun", "mon", "tue", "wed", "thu", "fri", "sat", "sun"}},
}

// parseCron reads an expression of five fields: minute, hour, day of the month,
// month, weekday. Each is a list of *, values, ranges and steps (*/5, 8-18/2);
// months and weekdays may be named, 0 and 7 are Sunday, and L is the last day
// of the month. Where neither day nor weekday begins with *, a day that matches
// one of them matches (crontab(5)).
func parseCron(expression string) (fields, error) {
	texts := strings.Fields(expression)
	if len(texts) != len(cronFields) {
		return fields{}, fmt.Errorf("the cron expression %q has %d fields, not the 5: minute hour day month weekday", expression, len(texts))
	}
	var sets [5]uint64
	var last bool
	for i, f := range cronFields {
		set, l, err := f.parse(texts[i])
		if err != nil {
			return fields{}, fmt.Errorf("the cron expression %q: %w", expression, err)
		}
		sets[i], last = set, last || l
	}
	weekdays := sets[4]
	if weekdays&(1<<7) != 0 {
		weekdays |= 1 // 7 is Sunday, too
	}
	return fields{
		minutes: sets[0], hours: uint32(sets[1]), days: uint32(sets[2]), last: last, months: uint16(sets[3]), weekdays: uint8(weekdays & 0x7f),
		either: !strings.HasPrefix(texts[2], "*") && !strings.HasPrefix(texts[4], "*"),
	}, nil
}

// parse returns the values of a field, and whether L is among them.
func (f field) parse(text string) (set uint64, last bool, err error) {
	for part := range strings.SplitSeq(text, ",") {
		if f.last && strings.EqualFold(part, "l") {
			last = true
			continue
		}
		values, err := f.part(part)
		if err != nil {
			return 0, false, fmt.Errorf("%s %q: %w", f.name, text, err)
		}
		set |= values
	}
	return set, last, nil
}

// part returns the values of one part of a list: a value, a range, or * — each
// perhaps with a step.
func (f field) part(text string) (uint64, error) {
	text, stepText, stepped := strings.Cut(text, "/")
	from, to, err := f.span(text, stepped)
	if err != nil {
		return 0, err
	}
	step := 1
	if stepped {
		if step, err = number(stepText); err != nil {
			return 0, fmt.Errorf("the step %q: %w", stepText, err)
		}
		if step < 1 || step > f.max-f.min+1 {
			return 0, fmt.Errorf("the step %d is not between 1 and %d", step, f.max-f.min+1)
		}
	}
	var set uint64
	for v := from; v <= to; v += step {
		set |= 1 << v
	}
	return set, nil
}

// span returns the first and the last value of a part. A single value with a
// step goes on to the field's end.
func (f field) span(text string, stepped bool) (from, to int, err error) {
	if text == "*" {
		return f.min, f.max, nil
	}
	first, end, ranged := strings.Cut(text, "-")
	if from, err = f.value(first); err != nil {
		return 0, 0, err
	}
	switch {
	case ranged:
		if to, err = f.value(end); err != nil {
			return 0, 0, err
		}
		if to == 0 && f.max == 7 && strings.EqualFold(end, "sun") {
			to = 7 // fri-sun
		}
	case stepped:
		to = f.max
	default:
		to = from
	}
	if to < from {
		return 0, 0, fmt.Errorf("the range %s ends before it begins", text)
	}
	return from, to, nil
}

// value returns the number that a text or a name stands for.
func (f field) value(text string) (int, error) {
	for i, name := range f.names {
		if strings.EqualFold(text, name) {
			return f.min + i, nil
		}
	}
	v, err := number(text)
	if err != nil {
		return 0, fmt.Errorf("%q: %w", text, err)
	}
	if v < f.min || v > f.max {
		return 0, fmt.Errorf("%d is not between %d and %d", v, f.min, f.max)
	}
	return v, nil
}

// number reads digits only: no sign, no space.
func number(text string) (int, error) {
	if text == "" || len(text) > 4 || strings.Trim(text, "0123456789") != "" {
		return 0, fmt.Errorf("not a number that is allowed here")
	}
	return strconv.Atoi(text)
}

// all returns a set of the bits from min to max.
func all(minimum, maximum int) uint64 { return (1<<(maximum+1) - 1) &^ (1<<minimum - 1) }

// everyHour reports whether no hour of the day is left out.
func (f *fields) everyHour() bool { return bits.OnesCount32(f.hours) == 24 }
