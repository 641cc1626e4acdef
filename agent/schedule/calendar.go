package schedule

import (
	"math/bits"
	"time"
)

// A wall time is counted in seconds since 1970-01-01 00:00 of the same wall
// clock, as if it never changed.

const daySeconds = 24 * 60 * 60

// next returns the first wall time from from on, and before limit, that matches.
func (f *fields) next(from, limit int64) (int64, bool) {
	day := from / daySeconds
	if from%daySeconds < 0 {
		day--
	}
	clock := from - day*daySeconds
	for day*daySeconds < limit {
		year, month, d := date(day)
		if f.months&(1<<month) == 0 {
			day, clock = dayOf(year, month+1, 1), 0
			continue
		}
		if f.onDay(year, month, d, weekday(day)) {
			if t, ok := f.inDay(clock); ok {
				t += day * daySeconds
				return t, t < limit
			}
		}
		day, clock = day+1, 0
	}
	return 0, false
}

// onDay reports whether a day of a matching month matches.
func (f *fields) onDay(year int, month time.Month, day, weekday int) bool {
	byNumber := f.days&(1<<day) != 0
	if !byNumber && (f.last || f.short) && day >= 28 && day == daysIn(year, month) {
		byNumber = f.last || f.days>>day != 0 // of the days to come, the month has none
	}
	byWeekday := f.weekdays&(1<<weekday) != 0
	if f.either {
		return byNumber || byWeekday
	}
	return byNumber && byWeekday
}

// inDay returns the first matching second of a day from a second on.
func (f *fields) inDay(from int64) (int64, bool) {
	minute := from / 60
	if from%60 > f.second {
		minute++
	}
	hour := minute / 60
	if hour < 24 && f.hours&(1<<hour) != 0 {
		if later := f.minutes >> (minute % 60); later != 0 {
			return (minute+int64(bits.TrailingZeros64(later)))*60 + f.second, true
		}
	}
	if hour >= 23 {
		return 0, false
	}
	later := f.hours >> (hour + 1)
	if later == 0 {
		return 0, false
	}
	hour += 1 + int64(bits.TrailingZeros32(later))
	return hour*3600 + int64(bits.TrailingZeros64(f.minutes))*60 + f.second, true
}

func date(day int64) (year int, month time.Month, d int) {
	return time.Unix(day*daySeconds, 0).UTC().Date()
}

func dayOf(year int, month time.Month, day int) int64 {
	return time.Date(year, month, day, 0, 0, 0, 0, time.UTC).Unix() / daySeconds
}

func daysIn(year int, month time.Month) int {
	return time.Date(year, month+1, 0, 0, 0, 0, 0, time.UTC).Day()
}

// weekday returns 0 for a Sunday. 1970-01-01 was a Thursday.
func weekday(day int64) int { return int(((day+4)%7 + 7) % 7) }
