package schedule

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// runs returns the first runs of a timing after an instant, in its zone.
func runs(t *testing.T, timing Timing, after string, n int) []string {
	t.Helper()
	r, err := timing.Rule()
	if err != nil {
		t.Fatal(err)
	}
	at, err := time.Parse(time.RFC3339, after)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for range n {
		if at = r.Next(at); at.IsZero() {
			return append(all, "never")
		}
		all = append(all, at.Format("2006-01-02 15:04:05 -0700"))
	}
	return all
}

func cron(expression, zone string) Timing { return Timing{Kind: Cron, Cron: expression, Zone: zone} }

const berlin = "Europe/Berlin"

// TestClockChanges has the changes of clocks, by the documented rule.
func TestClockChanges(t *testing.T) {
	for name, c := range map[string]struct {
		timing Timing
		after  string
		want   []string
	}{
		"a time in the gap runs at its end": {
			Timing{Kind: Daily, Hour: 2, Minute: 30, Zone: berlin}, "2026-03-28T00:00:00Z",
			[]string{"2026-03-28 02:30:00 +0100", "2026-03-29 03:00:00 +0200", "2026-03-30 02:30:00 +0200"},
		},
		"several in the gap run once": {
			cron("10,20,30 2 * * *", berlin), "2026-03-28T01:25:00Z",
			[]string{"2026-03-28 02:30:00 +0100", "2026-03-29 03:00:00 +0200", "2026-03-30 02:10:00 +0200"},
		},
		"one in the gap and one at its end run once": {
			cron("0 2,3 * * *", berlin), "2026-03-28T12:00:00Z",
			[]string{"2026-03-29 03:00:00 +0200", "2026-03-30 02:00:00 +0200"},
		},
		"a time that is there twice runs at its first": {
			Timing{Kind: Daily, Hour: 2, Minute: 30, Zone: berlin}, "2026-10-24T00:00:00Z",
			[]string{"2026-10-24 02:30:00 +0200", "2026-10-25 02:30:00 +0200", "2026-10-26 02:30:00 +0100"},
		},
		"between the two": {
			Timing{Kind: Daily, Hour: 2, Minute: 30, Zone: berlin}, "2026-10-25T00:45:00Z",
			[]string{"2026-10-26 02:30:00 +0100"},
		},
		"minutes of named hours stand still": {
			cron("*/30 1-3 * * *", berlin), "2026-10-24T23:45:00Z",
			[]string{
				"2026-10-25 02:00:00 +0200", "2026-10-25 02:30:00 +0200", "2026-10-25 03:00:00 +0100", "2026-10-25 03:30:00 +0100",
			},
		},
		"every hour runs in both passes": {
			Timing{Kind: Hourly, Minute: 30, Zone: berlin}, "2026-10-24T23:00:00Z",
			[]string{"2026-10-25 01:30:00 +0200", "2026-10-25 02:30:00 +0200", "2026-10-25 02:30:00 +0100", "2026-10-25 03:30:00 +0100"},
		},
		"every hour in the gap": {
			Timing{Kind: Hourly, Zone: berlin}, "2026-03-29T00:00:00Z",
			[]string{"2026-03-29 03:00:00 +0200", "2026-03-29 04:00:00 +0200"},
		},
		"midnight that does not exist": {
			Timing{Kind: Daily, Zone: "America/Santiago"}, "2026-09-05T12:00:00Z",
			[]string{"2026-09-06 01:00:00 -0300", "2026-09-07 00:00:00 -0300"},
		},
		"half an hour": {
			Timing{Kind: Daily, Hour: 2, Minute: 15, Zone: "Australia/Lord_Howe"}, "2026-10-02T16:00:00Z",
			[]string{"2026-10-04 02:30:00 +1100", "2026-10-05 02:15:00 +1100"},
		},
		"half an hour twice": {
			Timing{Kind: Daily, Hour: 1, Minute: 45, Zone: "Australia/Lord_Howe"}, "2026-04-04T00:00:00Z",
			[]string{"2026-04-05 01:45:00 +1100", "2026-04-06 01:45:00 +1030"},
		},
		"a day that does not exist": {
			Timing{Kind: Daily, Hour: 12, Zone: "Pacific/Apia"}, "2011-12-29T20:00:00Z",
			[]string{"2011-12-29 12:00:00 -1000", "2011-12-31 00:00:00 +1400", "2011-12-31 12:00:00 +1400"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, runs(t, c.timing, c.after, len(c.want))); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestTimings(t *testing.T) {
	for name, c := range map[string]struct {
		timing Timing
		want   []string
	}{
		"hourly":           {Timing{Kind: Hourly, Minute: 59, Second: 30}, []string{"2026-01-31 12:59:30 +0000", "2026-01-31 13:59:30 +0000"}},
		"daily":            {Timing{Kind: Daily, Hour: 12}, []string{"2026-02-01 12:00:00 +0000"}},
		"weekly":           {Timing{Kind: Weekly, Weekdays: []time.Weekday{time.Monday, time.Saturday}, Hour: 23}, []string{"2026-01-31 23:00:00 +0000", "2026-02-02 23:00:00 +0000"}},
		"monthly":          {Timing{Kind: Monthly, Day: 1}, []string{"2026-02-01 00:00:00 +0000", "2026-03-01 00:00:00 +0000"}},
		"monthly, 31":      {Timing{Kind: Monthly, Day: 31, Hour: 13}, []string{"2026-01-31 13:00:00 +0000", "2026-02-28 13:00:00 +0000", "2026-03-31 13:00:00 +0000", "2026-04-30 13:00:00 +0000"}},
		"monthly, 29":      {Timing{Kind: Monthly, Day: 29}, []string{"2026-02-28 00:00:00 +0000", "2026-03-29 00:00:00 +0000"}},
		"monthly, last":    {Timing{Kind: Monthly, Hour: 1}, []string{"2026-02-28 01:00:00 +0000", "2026-03-31 01:00:00 +0000"}},
		"once":             {Timing{Kind: Once, At: time.Date(2026, 2, 1, 3, 4, 5, 0, time.UTC)}, []string{"2026-02-01 03:04:05 +0000", "never"}},
		"every minute":     {cron("* * * * *", ""), []string{"2026-01-31 12:01:00 +0000", "2026-01-31 12:02:00 +0000"}},
		"steps":            {cron("*/25 9-17/4 * * *", ""), []string{"2026-01-31 13:00:00 +0000", "2026-01-31 13:25:00 +0000", "2026-01-31 13:50:00 +0000", "2026-01-31 17:00:00 +0000"}},
		"a step alone":     {cron("50/5 12 * * *", ""), []string{"2026-01-31 12:50:00 +0000", "2026-01-31 12:55:00 +0000", "2026-02-01 12:50:00 +0000"}},
		"names":            {cron("0 0 * FEB-apr Mon", ""), []string{"2026-02-02 00:00:00 +0000"}},
		"sunday is 7":      {cron("0 0 * * 5-7", ""), []string{"2026-02-01 00:00:00 +0000", "2026-02-06 00:00:00 +0000"}},
		"fri-sun":          {cron("0 0 * * fri-sun", ""), []string{"2026-02-01 00:00:00 +0000", "2026-02-06 00:00:00 +0000"}},
		"last day":         {cron("0 0 L * *", ""), []string{"2026-02-28 00:00:00 +0000", "2026-03-31 00:00:00 +0000"}},
		"first and last":   {cron("0 0 1,L * *", ""), []string{"2026-02-01 00:00:00 +0000", "2026-02-28 00:00:00 +0000"}},
		"day or weekday":   {cron("0 0 13 * fri", ""), []string{"2026-02-06 00:00:00 +0000", "2026-02-13 00:00:00 +0000", "2026-02-20 00:00:00 +0000"}},
		"star and weekday": {cron("0 0 */2 * fri", ""), []string{"2026-02-13 00:00:00 +0000", "2026-02-27 00:00:00 +0000"}},
		"31st":             {cron("0 0 31 * *", ""), []string{"2026-03-31 00:00:00 +0000", "2026-05-31 00:00:00 +0000"}},
		"leap day":         {cron("0 0 29 2 *", ""), []string{"2028-02-29 00:00:00 +0000", "2032-02-29 00:00:00 +0000"}},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, runs(t, c.timing, "2026-01-31T12:00:00Z", len(c.want))); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestRefusedTimings(t *testing.T) {
	for _, c := range []struct {
		timing Timing
		want   string
	}{
		{cron("* * * *", ""), "has 4 fields"},
		{cron("@daily", ""), "has 1 fields"},
		{cron("60 * * * *", ""), "60 is not between 0 and 59"},
		{cron("* 24 * * *", ""), "24 is not between 0 and 23"},
		{cron("* * 0 * *", ""), "0 is not between 1 and 31"},
		{cron("* * * 13 *", ""), "13 is not between 1 and 12"},
		{cron("* * * * 8", ""), "8 is not between 0 and 7"},
		{cron("*/0 * * * *", ""), "the step 0"},
		{cron("*/90 * * * *", ""), "the step 90"},
		{cron("5-1 * * * *", ""), "ends before it begins"},
		{cron("-1 * * * *", ""), "not a number"},
		{cron("+1 * * * *", ""), "not a number"},
		{cron("1,,2 * * * *", ""), "not a number"},
		{cron("L * * * *", ""), "not a number"},
		{cron("99999999999999999999 * * * *", ""), "not a number"},
		{cron("0 0 30 2 *", ""), "names no day that there is"},
		{cron("* * * * *", "Local"), "not the name of a time zone"},
		{cron("* * * * *", "Mars/Olympus"), "not the name of a time zone"},
		{cron("* * * * *", "../../etc/passwd"), "not the name of a time zone"},
		{Timing{Kind: Daily, Hour: 24}, "the hour 24"},
		{Timing{Kind: Daily, Minute: -1}, "the minute -1"},
		{Timing{Kind: Hourly, Second: 60}, "the second 60"},
		{Timing{Kind: Monthly, Day: 32}, "the day 32"},
		{Timing{Kind: Weekly}, "needs a weekday"},
		{Timing{Kind: Weekly, Weekdays: []time.Weekday{7}}, "no weekday 7"},
		{Timing{Kind: Once}, "needs a time"},
		{Timing{Kind: "fortnightly"}, "no kind of schedule"},
	} {
		if _, err := c.timing.Rule(); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v; want %q in it", c.timing, err, c.want)
		}
	}
}

func TestWords(t *testing.T) {
	for want, timing := range map[string]Timing{
		"hourly at :05, UTC":                    {Kind: Hourly, Minute: 5},
		"hourly at :05:30, Europe/Berlin":       {Kind: Hourly, Minute: 5, Second: 30, Zone: berlin},
		"daily at 02:30, Europe/Berlin":         {Kind: Daily, Hour: 2, Minute: 30, Zone: berlin},
		"weekly on Mon,Fri at 02:00:10, UTC":    {Kind: Weekly, Weekdays: []time.Weekday{1, 5}, Hour: 2, Second: 10},
		"monthly on the last day at 00:00, UTC": {Kind: Monthly},
		"monthly on day 3 at 00:00, UTC":        {Kind: Monthly, Day: 3},
		"cron 0 3 * * 1, UTC":                   {Kind: Cron, Cron: "0 3 * * 1"},
		"once at 2026-02-01 03:04:05 UTC":       {Kind: Once, At: time.Date(2026, 2, 1, 3, 4, 5, 0, time.UTC)},
	} {
		if got := timing.String(); got != want {
			t.Errorf("%q; want %q", got, want)
		}
	}
}

// FuzzCron reads any expression. What it takes has a next run, after the one
// before, that the fields name.
func FuzzCron(f *testing.F) {
	for _, seed := range []string{"* * * * *", "*/5 8-18 1,L jan-mar 1-5", "0 0 29 2 *", "0 0 31 4 *", "59 23 31 12 7", "0-59/7 */3 * * sun-sat"} {
		f.Add(seed, int64(1772000000))
	}
	f.Fuzz(func(t *testing.T, expression string, after int64) {
		r, err := Timing{Kind: Cron, Cron: expression, Zone: berlin}.Rule()
		if err != nil {
			return
		}
		from := time.Unix(after%(1<<32), 0)
		next := r.Next(from)
		if next.IsZero() || !next.After(from) || next.Second() != 0 {
			t.Errorf("%q after %s: %s", expression, from, next)
		}
	})
}
