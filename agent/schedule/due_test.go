package schedule

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func clock(text string) time.Time {
	t, err := time.Parse("2006-01-02 15:04:05", text)
	if err != nil {
		panic(err)
	}
	return t
}

func daily(t *testing.T) *Rule {
	t.Helper()
	r, err := Timing{Kind: Daily, Hour: 2}.Rule()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func ran(times ...string) func(time.Time) bool {
	return func(at time.Time) bool {
		for _, text := range times {
			if clock(text).Equal(at) {
				return true
			}
		}
		return false
	}
}

func TestDue(t *testing.T) {
	for name, c := range map[string]struct {
		now, handled string
		ran          func(time.Time) bool
		jitter       time.Duration
		policy       Missed
		want         Decision
	}{
		"not yet": {
			now: "2026-01-02 01:59:59", handled: "2026-01-01 02:00:00",
			want: Decision{Handled: clock("2026-01-01 02:00:00"), Wake: clock("2026-01-02 02:00:00")},
		},
		"now": {
			now: "2026-01-02 02:00:00", handled: "2026-01-01 02:00:00",
			want: Decision{Run: clock("2026-01-02 02:00:00"), Handled: clock("2026-01-02 02:00:00"), Wake: clock("2026-01-03 02:00:00")},
		},
		"a moment late": {
			now: "2026-01-02 02:01:00", handled: "2026-01-01 02:00:00", policy: Skip,
			want: Decision{Run: clock("2026-01-02 02:00:00"), Handled: clock("2026-01-02 02:00:00"), Wake: clock("2026-01-03 02:00:00")},
		},
		"missed, let go": {
			now: "2026-01-04 03:00:00", handled: "2026-01-01 02:00:00", policy: Skip,
			want: Decision{Missed: 3, Handled: clock("2026-01-04 02:00:00"), Wake: clock("2026-01-05 02:00:00")},
		},
		"missed, caught up once": {
			now: "2026-01-04 03:00:00", handled: "2026-01-01 02:00:00", policy: CatchUp,
			want: Decision{
				Run: clock("2026-01-04 02:00:00"), Late: true, Missed: 2,
				Handled: clock("2026-01-04 02:00:00"), Wake: clock("2026-01-05 02:00:00"),
			},
		},
		"put off by jitter": {
			now: "2026-01-02 02:09:00", handled: "2026-01-01 02:00:00", jitter: 10 * time.Minute,
			want: Decision{Handled: clock("2026-01-01 02:00:00"), Wake: clock("2026-01-02 02:10:00")},
		},
		"after jitter": {
			now: "2026-01-02 02:10:30", handled: "2026-01-01 02:00:00", jitter: 10 * time.Minute, policy: Skip,
			want: Decision{Run: clock("2026-01-02 02:00:00"), Handled: clock("2026-01-02 02:00:00"), Wake: clock("2026-01-03 02:10:00")},
		},
		"made after its time, within jitter": {
			now: "2026-01-02 02:05:00", handled: "2026-01-02 02:05:00", jitter: 10 * time.Minute,
			want: Decision{Handled: clock("2026-01-02 02:05:00"), Wake: clock("2026-01-03 02:10:00")},
		},
		"the clock was set back over a run": {
			now: "2026-01-02 01:30:00", handled: "2026-01-02 02:00:00", ran: ran("2026-01-02 02:00:00"),
			want: Decision{Handled: clock("2026-01-02 01:30:00"), Wake: clock("2026-01-03 02:00:00")},
		},
		"and comes to it again": {
			now: "2026-01-02 02:00:00", handled: "2026-01-02 01:30:00", ran: ran("2026-01-02 02:00:00"),
			want: Decision{Handled: clock("2026-01-02 02:00:00"), Wake: clock("2026-01-03 02:00:00")},
		},
		"the clock was years ahead, and is right again": {
			now: "2026-01-02 01:00:00", handled: "2036-01-02 02:00:00", ran: ran("2036-01-02 02:00:00"),
			want: Decision{Handled: clock("2026-01-02 01:00:00"), Wake: clock("2026-01-02 02:00:00")},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if c.ran == nil {
				c.ran = ran()
			}
			got := daily(t).Due(clock(c.now), History{Handled: clock(c.handled), Ran: c.ran}, c.jitter, c.policy)
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestDueAfterYears does not go through each of the millions of missed runs.
func TestDueAfterYears(t *testing.T) {
	r, err := Timing{Kind: Cron, Cron: "* * * * *", Zone: berlin}.Rule()
	if err != nil {
		t.Fatal(err)
	}
	now := clock("2036-01-01 00:00:30")
	began := time.Now()
	d := r.Due(now, History{Handled: clock("2026-01-01 00:00:00"), Ran: ran()}, 0, CatchUp)
	if !d.Run.Equal(clock("2036-01-01 00:00:00")) || d.Missed != maxCounted-1 || !d.Wake.Equal(clock("2036-01-01 00:01:00")) {
		t.Errorf("%+v", d)
	}
	if took := time.Since(began); took > time.Second {
		t.Errorf("it took %s", took)
	}
	yearly, err := Timing{Kind: Cron, Cron: "0 0 1 1 *"}.Rule()
	if err != nil {
		t.Fatal(err)
	}
	if d := yearly.Due(clock("4026-06-01 00:00:00"), History{Handled: clock("2026-01-01 00:00:00"), Ran: ran()}, 0, CatchUp); !d.Run.Equal(clock("4026-01-01 00:00:00")) {
		t.Errorf("%+v", d)
	}
}

func TestDueOnce(t *testing.T) {
	at := clock("2026-01-02 02:00:00")
	r, err := Timing{Kind: Once, At: at}.Rule()
	if err != nil {
		t.Fatal(err)
	}
	before := clock("2026-01-01 00:00:00")
	if d := r.Due(before, History{Handled: before, Ran: ran()}, 0, CatchUp); !d.Run.IsZero() || !d.Wake.Equal(at) {
		t.Errorf("before: %+v", d)
	}
	d := r.Due(at, History{Handled: before, Ran: ran()}, 0, CatchUp)
	if !d.Run.Equal(at) || !d.Wake.IsZero() {
		t.Errorf("then: %+v", d)
	}
	if d := r.Due(at.Add(time.Hour), History{Handled: d.Handled, Ran: ran("2026-01-02 02:00:00")}, 0, CatchUp); !d.Run.IsZero() || !d.Wake.IsZero() {
		t.Errorf("after: %+v", d)
	}
}

func TestJitter(t *testing.T) {
	seen := map[time.Duration]bool{}
	for i := range 1000 {
		key := string(rune('a'+i%26)) + string(rune('a'+i/26))
		j := Jitter(key, time.Minute)
		if j != Jitter(key, time.Minute) || j < 0 || j >= time.Minute || j%time.Second != 0 {
			t.Fatalf("%q: %s", key, j)
		}
		seen[j] = true
	}
	if len(seen) != 60 {
		t.Errorf("of 60 seconds, %d are used", len(seen))
	}
	if Jitter("a", 0) != 0 || Jitter("a", time.Millisecond) != 0 {
		t.Error("jitter without room")
	}
}
