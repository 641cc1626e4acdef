package main

import (
	"bytes"
	"fmt"
	"strings"
	"time"
	"unicode"

	"golang.org/x/text/width"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// page is where results for people are written.
type page struct {
	out    *bytes.Buffer
	header bool
	now    time.Time
}

func (p page) line(format string, args ...any) {
	_, _ = fmt.Fprintln(p.out, printable(fmt.Sprintf(format, args...)))
}

// advice writes an entry of a list, and below it what to do about it.
func (p page) advice(text, hint string) {
	p.line("  %s", text)
	if hint != "" {
		p.line("    hint: %s", hint)
	}
}

// table writes rows in aligned columns, the first row being the header. An
// empty cell is shown as "-", so that columns can be counted.
func (p page) table(rows [][]string) {
	if !p.header {
		rows = rows[1:]
	}
	p.columns("", rows)
}

// columns writes aligned rows, each after an indent.
func (p page) columns(indent string, rows [][]string) {
	var widths []int
	for _, row := range rows {
		for i, cell := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], columnsOf(shown(cell)))
		}
	}
	var line []byte
	for _, row := range rows {
		line = append(line[:0], indent...)
		for i, cell := range row {
			text := shown(cell)
			line = append(line, text...)
			if i < len(row)-1 {
				line = append(line, spaces(widths[i]-columnsOf(text)+2)...)
			}
		}
		p.out.Write(append(bytes.TrimRight(line, " "), '\n'))
	}
}

// spaces returns so many spaces.
func spaces(n int) string {
	const some = "                                "
	if n <= len(some) {
		return some[:n]
	}
	return strings.Repeat(" ", n)
}

func shown(cell string) string {
	if cell == "" {
		return "-"
	}
	return printable(cell)
}

// fields writes names and values, leaving out the values that are empty.
func (p page) fields(pairs ...string) {
	var rows [][]string
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			rows = append(rows, []string{pairs[i] + ":", pairs[i+1]})
		}
	}
	p.columns("", rows)
}

// ago returns how long ago a time was, in one unit.
func (p page) ago(t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	d := p.now.Sub(t.AsTime())
	if d < time.Second {
		return "now"
	}
	return unit(d) + " ago"
}

// when returns a time in full, and how far away it is.
func (p page) when(t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	full := t.AsTime().Format("2006-01-02 15:04:05 UTC")
	if d := t.AsTime().Sub(p.now); d >= time.Second {
		return fmt.Sprintf("%s (in %s)", full, unit(d))
	}
	return fmt.Sprintf("%s (%s)", full, p.ago(t))
}

func unit(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", d/time.Hour)
	default:
		return fmt.Sprintf("%dd", d/(24*time.Hour))
	}
}

// brief prints a short duration with the digits that matter.
func brief(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return d.Round(time.Microsecond).String()
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	case d < time.Minute:
		return d.Round(100 * time.Millisecond).String()
	default:
		return d.Round(time.Second).String()
	}
}

// size prints a number of bytes.
func size(n uint64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	value, i := float64(n)/1024, 0
	for value >= 1023.95 && i < 5 {
		value, i = value/1024, i+1
	}
	return strings.TrimSuffix(fmt.Sprintf("%.1f", value), ".0") + " " + "KMGTPE"[i:i+1] + "iB"
}

// printable replaces what would command the terminal instead of being read.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case unicode.IsControl(r), unicode.Is(unicode.Bidi_Control, r):
			return unicode.ReplacementChar
		default:
			return r
		}
	}, s)
}

// columnsOf returns how many columns of a terminal a printable text takes.
func columnsOf(s string) int {
	n := 0
	for _, r := range s {
		switch {
		case r < unicode.MaxASCII:
			n++
		case unicode.In(r, unicode.Mn, unicode.Me, unicode.Cf):
			// drawn on the character before
		case isWide(r):
			n += 2
		default:
			n++
		}
	}
	return n
}

func isWide(r rune) bool {
	kind := width.LookupRune(r).Kind()
	return kind == width.EastAsianWide || kind == width.EastAsianFullwidth
}
