package main

import (
	"testing"
	"time"
)

func durations(values ...int) []time.Duration {
	var list []time.Duration
	for _, v := range values {
		list = append(list, time.Duration(v))
	}
	return list
}

func TestQuantile(t *testing.T) {
	for _, test := range []struct {
		values []time.Duration
		q      float64
		want   time.Duration
	}{
		{durations(7), 0.5, 7},
		{durations(30, 10, 20), 0.5, 20},
		{durations(40, 10, 30, 20), 0.5, 25},
		{durations(40, 10, 30, 20), 0, 10},
		{durations(40, 10, 30, 20), 1, 40},
		{durations(10, 20, 30, 40, 50), 0.25, 20},
		{durations(10, 20), 0.99, 19},
	} {
		if got := quantile(test.values, test.q); got != test.want {
			t.Errorf("quantile(%v, %v) = %v, want %v", test.values, test.q, got, test.want)
		}
	}
}

func TestQuantileLeavesTheOrder(t *testing.T) {
	values := durations(3, 1, 2)
	median(values)
	if values[0] != 3 || values[1] != 1 || values[2] != 2 {
		t.Errorf("now %v", values)
	}
}

// TestLeastRatio checks against the tables of the sign test: of 5 pairs the
// lowest ratio, of 8 the second, of 20 the sixth.
func TestLeastRatio(t *testing.T) {
	for n, want := range map[int]float64{1: 0, 4: 0, 5: 1, 7: 1, 8: 2, 10: 2, 11: 3, 20: 6} {
		var a, b []time.Duration
		for i := range n {
			a, b = append(a, time.Duration(10*(n-i))), append(b, 10) // ratios n … 1
		}
		if got := leastRatio(a, b); got != want {
			t.Errorf("of %d pairs: %v, want %v", n, got, want)
		}
	}
}
