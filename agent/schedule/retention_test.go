package schedule

import (
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// judged returns one line a snapshot.
func judged(r Retention, zone *time.Location, now string, points ...Point) []string {
	var lines []string
	for _, v := range r.Judge(points, clock(now), zone) {
		word := "goes"
		if v.Stays {
			word = "stays"
		}
		lines = append(lines, fmt.Sprintf("%s %s: %s", v.ID, word, strings.Join(v.Reasons, "; ")))
	}
	return lines
}

func point(id, at string) Point { return Point{ID: id, Time: clock(at), Size: 10} }

func TestJudge(t *testing.T) {
	zone, err := time.LoadLocation(berlin)
	if err != nil {
		t.Fatal(err)
	}
	week := []Point{
		point("a", "2026-01-01 02:00:00"), point("b", "2026-01-02 02:00:00"), point("c", "2026-01-02 14:00:00"),
		point("d", "2026-01-03 02:00:00"), point("e", "2026-01-05 02:00:00"),
	}
	keep := func(i int, change func(*Point)) []Point {
		points := append([]Point(nil), week...)
		change(&points[i])
		return points
	}
	for name, c := range map[string]struct {
		keep   Retention
		points []Point
		want   []string
	}{
		"nothing set": {Retention{}, week[:1], []string{"a stays: no rule limits the number"}},
		"last": {Retention{Last: 2}, week, []string{
			"e stays: last 1 of 2", "d stays: last 2 of 2", "c goes: no rule keeps it", "b goes: no rule keeps it", "a goes: no rule keeps it",
		}},
		"daily": {Retention{Last: 1, Daily: 3}, week, []string{
			"e stays: last 1 of 1; newest of 2026-01-05, daily 1 of 3", "d stays: newest of 2026-01-03, daily 2 of 3",
			"c stays: newest of 2026-01-02, daily 3 of 3", "b goes: no rule keeps it", "a goes: no rule keeps it",
		}},
		"weekly over a new year": {Retention{Weekly: 5}, week, []string{
			"e stays: newest of 2026-W02, weekly 1 of 5", "d stays: newest of 2026-W01, weekly 2 of 5",
			"c goes: no rule keeps it", "b goes: no rule keeps it", "a goes: no rule keeps it",
		}},
		"monthly and yearly": {Retention{Monthly: 1, Yearly: 9}, []Point{
			point("a", "2024-12-31 22:59:00"), point("b", "2024-12-31 23:00:00"), point("c", "2026-01-02 14:00:00"),
		}, []string{
			"c stays: newest of 2026-01, monthly 1 of 1; newest of 2026, yearly 1 of 9",
			"b stays: newest of 2025, yearly 2 of 9", "a stays: newest of 2024, yearly 3 of 9",
		}},
		"hourly in the hour that is there twice": {Retention{Hourly: 9}, []Point{
			point("a", "2026-10-25 00:10:00"), point("b", "2026-10-25 00:30:00"), point("c", "2026-10-25 01:30:00"),
		}, []string{
			"c stays: newest of 2026-10-25 02h +0100, hourly 1 of 9",
			"b stays: newest of 2026-10-25 02h +0200, hourly 2 of 9", "a goes: no rule keeps it",
		}},
		"age": {Retention{Last: 9, MaxAge: 48 * time.Hour}, week, []string{
			"e stays: last 1 of 9", "d goes: it is older than 2 days", "c goes: it is older than 2 days",
			"b goes: it is older than 2 days", "a goes: it is older than 2 days",
		}},
		"space": {Retention{MaxSpace: 25}, week, []string{
			"e stays: no rule limits the number", "d stays: no rule limits the number", "c goes: the space of 25 bytes does not hold it",
			"b goes: the space of 25 bytes does not hold it", "a goes: the space of 25 bytes does not hold it",
		}},
		"no space at all": {Retention{MaxSpace: 1}, week[:2], []string{
			"b stays: no rule limits the number", "a goes: the space of 1 bytes does not hold it",
		}},
		"protected": {Retention{Last: 1, MaxAge: 2 * time.Hour, MaxSpace: 15}, keep(0, func(p *Point) { p.Protected = "it is a template" }), []string{
			"e stays: last 1 of 1", "d goes: it is older than 2h0m0s", "c goes: it is older than 2h0m0s",
			"b goes: it is older than 2h0m0s", "a stays: it is a template",
		}},
		"protected takes no place": {Retention{Last: 1}, keep(4, func(p *Point) { p.Protected = "label keep" })[3:], []string{
			"e stays: label keep", "d stays: last 1 of 1",
		}},
		"expired": {Retention{Last: 9}, keep(4, func(p *Point) { p.Expires = clock("2026-01-05 02:30:00") })[3:], []string{
			"e goes: it expired at 2026-01-05 02:30:00 UTC", "d stays: last 1 of 9",
		}},
		"expires later": {Retention{Last: 9}, keep(4, func(p *Point) { p.Expires = clock("2026-01-06 02:30:00") })[3:], []string{
			"e stays: last 1 of 9", "d stays: last 2 of 9",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, judged(c.keep, zone, "2026-01-05 03:30:00", c.points...)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestRetentionCheck(t *testing.T) {
	if err := (Retention{Weekly: -1}).Check(); err == nil || !strings.Contains(err.Error(), "keep-weekly is -1") {
		t.Error(err)
	}
	if err := (Retention{MaxAge: -1}).Check(); err == nil {
		t.Error("no error")
	}
	if err := (Retention{Last: 3, MaxSpace: math.MaxUint64}).Check(); err != nil {
		t.Error(err)
	}
	if n, counted := (Retention{Last: 3, Daily: 7}).Most(); n != 10 || !counted {
		t.Error(n, counted)
	}
	if _, counted := (Retention{MaxAge: 1}).Most(); counted {
		t.Error("an age is no count")
	}
}

func TestNames(t *testing.T) {
	n := Naming{VM: "web/1 ü\x1b", Schedule: "nightly", Time: clock("2026-10-25 01:30:00").In(time.FixedZone("", 3600))}
	for template, want := range map[string]string{
		DefaultName:                  "nightly-20261025T013000Z",
		"{{.VM}}-{{ .Date }}":        "web-1-ü--2026-10-25",
		"x-{{.Weekday}}":             "x-sun",
		"plain":                      "plain",
		strings.Repeat("{{.VM}}", 2): "web-1-ü-web-1-ü-",
	} {
		parsed, err := ParseTemplate(template)
		if err != nil {
			t.Errorf("%s: %v", template, err)
		} else if got := parsed.Name(n); got != want {
			t.Errorf("%s: %q; want %q", template, got, want)
		}
	}
	for _, wrong := range []string{"{{.VM", "VM}}", "{{VM}}", "{{.Vm}}", "{{}}", "{{printf \"%d\" 1}}", "a{{.VM}}b}}"} {
		if _, err := ParseTemplate(wrong); err == nil {
			t.Errorf("%s is taken", wrong)
		}
	}
	long := Naming{VM: strings.Repeat("ü", 100)}
	parsed, err := ParseTemplate("{{.VM}}")
	if err != nil || len(parsed.Name(long)) != maxField {
		t.Errorf("%d bytes, %v", len(parsed.Name(long)), err)
	}
}

func TestDistinctNames(t *testing.T) {
	now := clock("2026-01-01 00:00:00")
	for _, c := range []struct {
		template string
		timing   Timing
		want     bool
	}{
		{"{{.Time}}", Timing{Kind: Hourly, Zone: berlin}, true},
		{"{{.Date}}", Timing{Kind: Daily, Zone: berlin}, true},
		{"{{.Date}}", Timing{Kind: Hourly}, false},
		{"{{.Weekday}}", Timing{Kind: Daily}, false},
		{"fixed", Timing{Kind: Daily}, false},
		{"fixed", Timing{Kind: Once, At: now.Add(time.Hour)}, true},
	} {
		template, err := ParseTemplate(c.template)
		if err != nil {
			t.Fatal(err)
		}
		rule, err := c.timing.Rule()
		if err != nil {
			t.Fatal(err)
		}
		if err := template.Distinct(rule, now); (err == nil) != c.want {
			t.Errorf("%s, %s: %v", c.template, c.timing, err)
		}
	}
}
