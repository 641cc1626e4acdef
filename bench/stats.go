package main

import (
	"math"
	"slices"
	"time"
)

// quantile returns the value that a share q of the values does not exceed,
// between neighbours in proportion. There is at least one value.
func quantile[T ~int64](values []T, q float64) T {
	sorted := slices.Sorted(slices.Values(values))
	at := q * float64(len(sorted)-1)
	below := int(at)
	above := min(below+1, len(sorted)-1)
	return sorted[below] + T((at-float64(below))*float64(sorted[above]-sorted[below]))
}

func median[T ~int64](values []T) T { return quantile(values, 0.5) }

// each returns one figure of every run.
func each[R, F any](runs []R, figure func(R) F) []F {
	var values []F
	for _, r := range runs {
		values = append(values, figure(r))
	}
	return values
}

// leastRatio returns a ratio that the typical one of a to b, which were measured
// in pairs, exceeds with a confidence of 95%, whatever their distribution (the
// lower end of the sign test's interval). It is 0 for fewer than five pairs,
// which can tell nothing with that confidence.
func leastRatio(a, b []time.Duration) float64 {
	ratios := make([]float64, len(a))
	for i := range a {
		ratios[i] = float64(a[i]) / float64(b[i])
	}
	slices.Sort(ratios)
	// sum is the chance that at most k of n ratios fall below the typical one.
	n := len(ratios)
	term := math.Pow(0.5, float64(n))
	least := 0.0
	for k, sum := 0, term; k < n && sum <= 0.05; k++ {
		least = ratios[k]
		term *= float64(n-k) / float64(k+1)
		sum += term
	}
	return least
}
