package catalog

import (
	"time"

	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
)

// The parts of an operation's record that are kept as JSON have types of their
// own, so that the format does not change with the names of Go fields.

type storedStep struct {
	Name    string `json:"name"`
	Started int64  `json:"started"` // nanoseconds since 1970 UTC
	Ended   int64  `json:"ended,omitempty"`
	Error   string `json:"error,omitempty"`
	Output  string `json:"output,omitempty"`
}

func storedSteps(steps []op.Step) []storedStep {
	out := make([]storedStep, 0, len(steps))
	for _, s := range steps {
		out = append(out, storedStep{s.Name, nanos(s.Started), nanos(s.Ended), s.Error, s.Output})
	}
	return out
}

type stepsColumn struct{ steps *[]op.Step }

// Scan implements sql.Scanner.
func (c stepsColumn) Scan(v any) error {
	var stored []storedStep
	if err := (jsonColumn{&stored}).Scan(v); err != nil {
		return err
	}
	*c.steps = nil
	for _, s := range stored {
		*c.steps = append(*c.steps, op.Step{Name: s.Name, Started: instant(s.Started), Ended: instant(s.Ended), Error: s.Error, Output: s.Output})
	}
	return nil
}

type progressJSON struct {
	Done  uint64  `json:"done"`
	Total uint64  `json:"total"`
	Unit  string  `json:"unit"`
	Rate  float64 `json:"rate,omitempty"`
	ETA   int64   `json:"eta,omitempty"` // nanoseconds
	Pass  int     `json:"pass,omitempty"`
}

func storedProgress(p op.Progress) progressJSON {
	return progressJSON{p.Done, p.Total, p.Unit, p.Rate, int64(p.ETA), p.Pass}
}

type progressColumn struct{ progress *op.Progress }

// Scan implements sql.Scanner.
func (c progressColumn) Scan(v any) error {
	var p progressJSON
	if err := (jsonColumn{&p}).Scan(v); err != nil {
		return err
	}
	*c.progress = op.Progress{Done: p.Done, Total: p.Total, Unit: p.Unit, Rate: p.Rate, ETA: time.Duration(p.ETA), Pass: p.Pass}
	return nil
}

type failureJSON struct {
	Kind    fault.Kind `json:"kind"`
	Message string     `json:"message"`
	Hint    string     `json:"hint,omitempty"`
}

func storedFailure(f *op.Failure) *failureJSON {
	if f == nil {
		return nil
	}
	return &failureJSON{f.Kind, f.Message, f.Hint}
}

type failureColumn struct{ failure **op.Failure }

// Scan implements sql.Scanner.
func (c failureColumn) Scan(v any) error {
	var f *failureJSON
	if err := (jsonColumn{&f}).Scan(v); err != nil {
		return err
	}
	*c.failure = nil
	if f != nil {
		*c.failure = &op.Failure{Kind: f.Kind, Message: f.Message, Hint: f.Hint}
	}
	return nil
}
