package plot

import (
	"math"
	"strconv"
)

// scale maps values to a length in pixels.
type scale struct {
	low, high float64
	log       bool
	length    float64
	ticks     []float64
}

// maxTicks is how many marks an axis has at most, so that their numbers have
// room.
const maxTicks = 6

// Values beyond these are taken for these: no figure means anything there.
const least, most = 1e-12, 1e18

// newScale returns a scale for values up to a highest, and from a lowest if it is
// logarithmic. There need not be any.
func newScale(a Axis, lowest, highest, length float64) scale {
	if highest < least {
		highest = 1
	}
	highest = min(highest, most)
	if a.Log {
		return logScale(max(least, min(lowest, highest)), highest, length)
	}
	step := niceStep(highest / (maxTicks - 1))
	s := scale{high: step * math.Ceil(highest/step-1e-9), length: length}
	for i := 0; float64(i)*step <= s.high*(1+1e-9); i++ {
		s.ticks = append(s.ticks, float64(i)*step)
	}
	return s
}

// logScale goes from a power of ten to a power of ten.
func logScale(lowest, highest, length float64) scale {
	from, to := math.Floor(math.Log10(lowest)), math.Ceil(math.Log10(highest))
	if from == to {
		to++
	}
	s := scale{low: from, high: to, log: true, length: length}
	for e := from; e <= to; e++ {
		s.ticks = append(s.ticks, math.Pow(10, e))
	}
	return s
}

// niceStep returns the least of 1, 2, 5, 10, … (times any power of ten) that is
// not below a step.
func niceStep(step float64) float64 {
	power := math.Pow(10, math.Floor(math.Log10(step)))
	for _, f := range []float64{1, 2, 5} {
		if step <= f*power*(1+1e-9) {
			return f * power
		}
	}
	return 10 * power
}

// at returns where a value is, in pixels from the begin.
func (s scale) at(v float64) float64 {
	v = min(v, most)
	if s.log {
		v = math.Log10(max(v, least))
	}
	return (v - s.low) / (s.high - s.low) * s.length
}

// number shows a mark's value.
func number(v float64) string {
	if v >= 1000 {
		return strconv.FormatFloat(v, 'f', 0, 64)
	}
	return strconv.FormatFloat(v, 'g', 4, 64)
}
