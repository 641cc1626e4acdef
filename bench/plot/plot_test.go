package plot

import (
	"encoding/xml"
	"errors"
	"io"
	"math"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func sample() Figure {
	return Figure{
		Title: "A & B", Columns: 2,
		Panels: []Panel{
			{
				Title: "first", X: Axis{Label: "x"}, Y: Axis{Label: "ms", Log: true}, Limit: 60, LimitName: "allowed",
				Series: []Series{
					{"ours", []Point{{0, 50, 40, 60}, {400, 55, 50, 59}}},
					{"theirs", []Point{{X: 0, Y: 500}, {X: 400, Y: 1700}}},
				},
			},
			{Title: "second <>", X: Axis{Label: "x"}, Y: Axis{Label: "s"}, Series: []Series{{"ours", []Point{{X: 100, Y: 1}, {X: 200, Y: 2}}}}},
			{Title: "nothing in it"},
		},
	}
}

// TestIsXML also looks that everything lies inside of the picture.
func TestIsXML(t *testing.T) {
	svg := sample().SVG()
	dec := xml.NewDecoder(strings.NewReader(string(svg)))
	var texts []string
	for {
		token, err := dec.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, svg)
		}
		if text, ok := token.(xml.CharData); ok && strings.TrimSpace(string(text)) != "" {
			texts = append(texts, string(text))
		}
	}
	for _, want := range []string{"A & B", "second <>", "ours", "theirs", "allowed", "10000"} {
		if !strings.Contains(strings.Join(texts, "\n"), want) {
			t.Errorf("there is no %q in %q", want, texts)
		}
	}
	if strings.Contains(string(svg), "NaN") || strings.Contains(string(svg), "Inf") {
		t.Errorf("a place is no number:\n%s", svg)
	}
}

func TestScale(t *testing.T) {
	for name, test := range map[string]struct {
		axis     Axis
		low, top float64
		ticks    []float64
		of, at   float64 // of 100 pixels
	}{
		"round":           {Axis{}, 0, 500, []float64{0, 100, 200, 300, 400, 500}, 250, 50},
		"not round":       {Axis{}, 0, 43, []float64{0, 10, 20, 30, 40, 50}, 25, 50},
		"small":           {Axis{}, 0, 0.43, []float64{0, 0.1, 0.2, 0.3, 0.4, 0.5}, 0.25, 50},
		"nothing":         {Axis{}, math.Inf(1), 0, []float64{0, 0.2, 0.4, 0.6, 0.8, 1}, 0.5, 50},
		"logarithmic":     {Axis{Log: true}, 54, 1678, []float64{10, 100, 1000, 10000}, 100, 100.0 / 3},
		"powers of ten":   {Axis{Log: true}, 10, 1000, []float64{10, 100, 1000}, 100, 50},
		"one power":       {Axis{Log: true}, 100, 100, []float64{100, 1000}, 1000, 100},
		"logarithmic, no": {Axis{Log: true}, math.Inf(1), 0, []float64{1, 10}, 10, 100},
	} {
		s := newScale(test.axis, test.low, test.top, 100)
		near := cmp.Comparer(func(a, b float64) bool { return math.Abs(a-b) < 1e-9 })
		if diff := cmp.Diff(test.ticks, s.ticks, near); diff != "" {
			t.Errorf("%s: ticks (-want +got):\n%s", name, diff)
		}
		if got := s.at(test.of); math.Abs(got-test.at) > 1e-9 {
			t.Errorf("%s: %g is at %g, not at %g", name, test.of, got, test.at)
		}
	}
}

// TestColoursOnAnyBackground: documents are shown on white, on black and on dark
// grey. The contrast is that of WCAG 2.
func TestColoursOnAnyBackground(t *testing.T) {
	for _, colour := range append([]string{textColour}, lineColours...) {
		for _, ground := range []string{"#ffffff", "#0d1117", "#000000"} {
			if c := contrast(t, colour, ground); c < 4 {
				t.Errorf("%s on %s has a contrast of %.1f", colour, ground, c)
			}
		}
	}
	used := regexp.MustCompile(`#[0-9a-f]{6}`).FindAllString(string(sample().SVG()), -1)
	for _, colour := range used {
		if c := min(contrast(t, colour, "#ffffff"), contrast(t, colour, "#000000")); c < 3 {
			t.Errorf("%s has a contrast of %.1f", colour, c)
		}
	}
}

func contrast(t *testing.T, a, b string) float64 {
	x, y := luminance(t, a), luminance(t, b)
	return (max(x, y) + 0.05) / (min(x, y) + 0.05)
}

func luminance(t *testing.T, colour string) float64 {
	sum := 0.0
	for i, weight := range []float64{0.2126, 0.7152, 0.0722} {
		n, err := strconv.ParseUint(colour[1+2*i:3+2*i], 16, 8)
		if err != nil {
			t.Fatal(err)
		}
		c := float64(n) / 255
		if c <= 0.03928 {
			c /= 12.92
		} else {
			c = math.Pow((c+0.055)/1.055, 2.4)
		}
		sum += weight * c
	}
	return sum
}
