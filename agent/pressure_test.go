package agent

import "testing"

func TestParsePressure(t *testing.T) {
	for text, want := range map[string]float64{
		"some avg10=23.50 avg60=1.00 avg300=0.00 total=12345\nfull avg10=3.00 avg60=0.00 avg300=0.00 total=1\n": 23.5,
		"some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n":                                                      0,
		"":                 -1,
		"full avg10=3.00 ": -1,
		"some avg10=x ":    -1,
	} {
		got, err := parsePressure(text)
		if err != nil {
			got = -1
		}
		if got != want {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
}
