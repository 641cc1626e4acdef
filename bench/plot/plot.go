package plot

// Figure is a title over panels.
type Figure struct {
	Title   string
	Panels  []Panel
	Columns int // how many panels stand side by side
}

// Panel is one chart.
type Panel struct {
	Title  string
	X, Y   Axis
	Series []Series
	// Limit is a line across the chart, and what it is called; 0 for none.
	Limit     float64
	LimitName string
}

// Axis is a scale. It begins at 0, or at a power of ten if it is logarithmic, and
// ends behind the largest value.
type Axis struct {
	Label string
	Log   bool // values are positive
}

// Series is a line through points.
type Series struct {
	Name   string
	Points []Point // by rising X
}

// Point is a value with the span in which most of what it stands for lies; both
// are 0 where there is no span.
type Point struct {
	X, Y      float64
	Low, High float64
}
