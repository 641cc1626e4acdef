package freeze

import (
	"errors"
	"fmt"
	"testing"

	"github.com/vmsnap/vmsnap/qga"
)

// Errors keep what they are on the way from the guard to the agent.
func TestErrorsOverThePipe(t *testing.T) {
	refused := &qga.CommandError{Command: "guest-fsfreeze-freeze", Class: qga.ClassGeneric, Desc: "no"}
	for _, err := range []error{
		fmt.Errorf("%w: %w", ErrFreezeTimeout, qga.ErrTimeout),
		fmt.Errorf("%w: %w", ErrUnsupported, refused),
		errors.New("something else"),
	} {
		got := error(toRemote(err))
		if got.Error() != err.Error() {
			t.Errorf("%q became %q", err, got)
		}
		for name, kind := range kinds {
			if errors.Is(got, kind) != errors.Is(err, kind) {
				t.Errorf("%q: %s: %t", err, name, errors.Is(got, kind))
			}
		}
		var a, b *qga.CommandError
		if errors.As(err, &a) != errors.As(got, &b) || a != b && *a != *b {
			t.Errorf("%q: refusal %v became %v", err, a, b)
		}
	}
}
