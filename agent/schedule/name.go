package schedule

import (
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// DefaultName is the template of the names of snapshots where none is given.
const DefaultName = "{{.Schedule}}-{{.Time}}"

// Naming is what a name is made of.
type Naming struct {
	VM       string
	Schedule string
	Time     time.Time // for which it was run, in the schedule's zone
}

// namings are what a template may name.
var namings = map[string]func(Naming) string{
	"VM":       func(n Naming) string { return fit(n.VM) },
	"Schedule": func(n Naming) string { return fit(n.Schedule) },
	// In UTC, so that the hour that is there twice gives two names.
	"Time":    func(n Naming) string { return n.Time.UTC().Format("20060102T150405Z") },
	"Date":    func(n Naming) string { return n.Time.Format("2006-01-02") },
	"Weekday": func(n Naming) string { return strings.ToLower(n.Time.Format("Mon")) },
}

// maxField bounds a VM's name, in bytes, within that of a snapshot.
const maxField = 48

// fit makes a name fit to be a part of another: the guest's owner chose it.
func fit(name string) string {
	var b strings.Builder
	for _, r := range name {
		if r == '/' || r == unicode.ReplacementChar || unicode.IsSpace(r) || !unicode.IsPrint(r) {
			r = '-'
		}
		if b.Len()+utf8.RuneLen(r) > maxField {
			break
		}
		b.WriteRune(r)
	}
	return b.String()
}

// Template is a name with {{.VM}}, {{.Schedule}}, {{.Time}} (UTC), {{.Date}} or
// {{.Weekday}} in it. It is no program.
type Template struct{ parts []part }

// part is a text, or a field when its name is set.
type part struct{ text, field string }

// ParseTemplate reads a template.
func ParseTemplate(text string) (Template, error) {
	var t Template
	for rest := text; rest != ""; {
		before, after, found := strings.Cut(rest, "{{")
		if strings.Contains(before, "}}") {
			return Template{}, fmt.Errorf("the name %q has a }} without its {{", text)
		}
		if before != "" {
			t.parts = append(t.parts, part{text: before})
		}
		if !found {
			break
		}
		inside, next, closed := strings.Cut(after, "}}")
		if !closed {
			return Template{}, fmt.Errorf("the name %q has a {{ without its }}", text)
		}
		name, dotted := strings.CutPrefix(strings.TrimSpace(inside), ".")
		if !dotted || namings[name] == nil {
			return Template{}, fmt.Errorf("the name %q: {{%s}} is none of {{.VM}}, {{.Schedule}}, {{.Time}}, {{.Date}}, {{.Weekday}}", text, inside)
		}
		t.parts = append(t.parts, part{field: name})
		rest = next
	}
	return t, nil
}

// Name returns the name of one snapshot.
func (t Template) Name(n Naming) string {
	var b strings.Builder
	for _, p := range t.parts {
		if p.field == "" {
			b.WriteString(p.text)
			continue
		}
		b.WriteString(namings[p.field](n))
	}
	return b.String()
}

// distinctRuns is how many runs have to have names of their own.
const distinctRuns = 100

// Distinct returns an error if two of the next runs of a rule would have the
// same name.
func (t Template) Distinct(r *Rule, after time.Time) error {
	names := map[string]time.Time{}
	run := r.Next(after)
	for range distinctRuns {
		if run.IsZero() {
			break
		}
		name := t.Name(Naming{VM: "vm", Schedule: "schedule", Time: run})
		if before, taken := names[name]; taken {
			return fmt.Errorf("the runs at %s and %s would have the same name; {{.Time}} in it tells them apart",
				before.UTC().Format(stampFormat), run.UTC().Format(stampFormat))
		}
		names[name] = run
		run = r.Next(run)
	}
	return nil
}
