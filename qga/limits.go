package qga

// Limits bound what one reply of a guest may cost. A zero field means the value
// of DefaultLimits.
type Limits struct {
	ReplyBytes   int // longest reply
	DiscardBytes int // most that is thrown away in one resynchronisation
	Depth        int // deepest nesting of objects and lists
	Items        int // longest list that is decoded
	TextBytes    int // longest text kept; longer ones are cut
}

// DefaultLimits hold a guest with thousands of mounts, and nothing that would
// trouble the host.
var DefaultLimits = Limits{
	ReplyBytes:   4 << 20,
	DiscardBytes: 64 << 20,
	Depth:        32,
	Items:        8192,
	TextBytes:    1024,
}

func (l Limits) withDefaults() Limits {
	d := DefaultLimits
	for _, f := range []struct{ value, preset *int }{
		{&l.ReplyBytes, &d.ReplyBytes},
		{&l.DiscardBytes, &d.DiscardBytes},
		{&l.Depth, &d.Depth},
		{&l.Items, &d.Items},
		{&l.TextBytes, &d.TextBytes},
	} {
		if *f.value <= 0 {
			*f.value = *f.preset
		}
	}
	return l
}
