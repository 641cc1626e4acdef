package plot

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"math"
	"strings"
)

// Sizes in pixels.
const (
	panelWidth  = 400
	panelHeight = 260
	titleHeight = 28 // of the figure's
	marginLeft  = 62
	marginRight = 16
	marginTop   = 52 // the panel's title, and below it the names of its lines
	marginBelow = 46
	plotWidth   = panelWidth - marginLeft - marginRight
	plotHeight  = panelHeight - marginTop - marginBelow
)

// Colours: each has a contrast of 3 and more with white and with black, and those
// of text and of the lines' names one of 4 and more.
const (
	textColour = "#767676"
	gridColour = "#888888"
)

// lineColours tell series apart, also for who does not see red and green as
// different; dashes tell them apart without colours.
var (
	lineColours = []string{"#0f7bc4", "#c75000", "#8a63d2"}
	lineDashes  = []string{"", "6 3", "2 3"}
)

// SVG draws the figure.
func (f Figure) SVG() []byte {
	columns := max(1, min(f.Columns, len(f.Panels)))
	rows := (len(f.Panels) + columns - 1) / columns
	d := &drawing{}
	width, height := columns*panelWidth, titleHeight+rows*panelHeight
	d.printf(`<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12" fill="%s">`,
		width, height, width, height, textColour)
	d.printf(`<title>%s</title>`, escape(f.Title))
	d.text(float64(width)/2, 18, "middle", `font-size="15" font-weight="bold"`, f.Title)
	for i, p := range f.Panels {
		d.printf(`<g transform="translate(%d %d)">`, i%columns*panelWidth, titleHeight+i/columns*panelHeight)
		d.panel(p)
		d.printf(`</g>`)
	}
	d.printf(`</svg>`)
	return d.Bytes()
}

type drawing struct{ bytes.Buffer }

func (d *drawing) printf(format string, args ...any) { _, _ = fmt.Fprintf(d, format+"\n", args...) }

func (d *drawing) text(x, y float64, anchor, extra, s string) {
	d.printf(`<text x="%s" y="%s" text-anchor="%s" %s>%s</text>`, px(x), px(y), anchor, extra, escape(s))
}

func (d *drawing) panel(p Panel) {
	x, y := p.scales()
	d.text(marginLeft+plotWidth/2, 18, "middle", `font-weight="bold"`, p.Title)
	d.printf(`<g transform="translate(%d %d)">`, marginLeft, marginTop)
	d.axes(p, x, y)
	if p.Limit > 0 {
		at := px(plotHeight - y.at(p.Limit))
		d.printf(`<path d="M0 %s H%d" stroke="%s" stroke-dasharray="1 3" stroke-width="1.5"/>`, at, plotWidth, textColour)
		d.text(4, plotHeight-y.at(p.Limit)-4, "start", `font-size="11"`, p.LimitName)
	}
	for i, s := range p.Series {
		d.series(i, s, x, y)
	}
	d.printf(`</g>`)
	d.legend(p.Series)
}

// scales returns those of a panel's data.
func (p Panel) scales() (x, y scale) {
	lowX, highX := math.Inf(1), 0.0
	lowY, highY := math.Inf(1), p.Limit
	if p.Limit > 0 {
		lowY = p.Limit
	}
	for _, s := range p.Series {
		for _, pt := range s.Points {
			lowX, highX = min(lowX, pt.X), max(highX, pt.X)
			highY = max(highY, pt.Y, pt.High)
			lowY = min(lowY, pt.Y)
			if pt.Low > 0 {
				lowY = min(lowY, pt.Low)
			}
		}
	}
	return newScale(p.X, lowX, highX, plotWidth), newScale(p.Y, lowY, highY, plotHeight)
}

func (d *drawing) axes(p Panel, x, y scale) {
	for _, v := range y.ticks {
		at := plotHeight - y.at(v)
		d.printf(`<path d="M0 %s H%d" stroke="%s" stroke-opacity="0.35"/>`, px(at), plotWidth, gridColour)
		d.text(-6, at+4, "end", "", number(v))
	}
	for _, v := range x.ticks {
		d.printf(`<path d="M%s %d v4" stroke="%s"/>`, px(x.at(v)), plotHeight, gridColour)
		d.text(x.at(v), plotHeight+17, "middle", "", number(v))
	}
	d.printf(`<path d="M0 0 V%d H%d" fill="none" stroke="%s"/>`, plotHeight, plotWidth, gridColour)
	d.text(plotWidth/2, plotHeight+36, "middle", "", p.X.Label)
	d.text(-plotHeight/2, 14-marginLeft, "middle", `transform="rotate(-90)"`, p.Y.Label)
}

func (d *drawing) series(i int, s Series, x, y scale) {
	colour := lineColours[i%len(lineColours)]
	var line strings.Builder
	for j, p := range s.Points {
		command := "L"
		if j == 0 {
			command = "M"
		}
		at, up := px(x.at(p.X)), px(plotHeight-y.at(p.Y))
		_, _ = fmt.Fprintf(&line, "%s%s %s ", command, at, up)
		d.printf(`<circle cx="%s" cy="%s" r="3" fill="%s"/>`, at, up, colour)
		if p.High > p.Low && p.Low > 0 {
			d.printf(`<path d="M%s %s V%s" stroke="%s" stroke-width="1.5"/>`, at, px(plotHeight-y.at(p.Low)), px(plotHeight-y.at(p.High)), colour)
		}
	}
	if line.Len() > 0 {
		d.printf(`<path d="%s" fill="none" stroke="%s" stroke-width="2" %s/>`, strings.TrimSpace(line.String()), colour, dashes(i))
	}
}

func dashes(i int) string {
	if dash := lineDashes[i%len(lineDashes)]; dash != "" {
		return `stroke-dasharray="` + dash + `"`
	}
	return ""
}

// legend names the lines, side by side.
func (d *drawing) legend(series []Series) {
	each := plotWidth / float64(max(1, len(series)))
	for i, s := range series {
		at, colour := marginLeft+float64(i)*each, lineColours[i%len(lineColours)]
		d.printf(`<path d="M%s 34 h20" stroke="%s" stroke-width="2" %s/>`, px(at), colour, dashes(i))
		d.text(at+25, 38, "start", `fill="`+colour+`"`, s.Name)
	}
}

// px shows a length, to a tenth of a pixel.
func px(v float64) string { return strings.TrimSuffix(fmt.Sprintf("%.1f", v), ".0") }

func escape(s string) string {
	var b bytes.Buffer
	_ = xml.EscapeText(&b, []byte(s)) // to memory
	return b.String()
}
