package fault

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"testing"
)

func TestNew(t *testing.T) {
	for name, tc := range map[string]struct {
		err     *Error
		message string
		causes  []error
	}{
		"no cause":    {New(NotFound, "no VM %q", "web"), `no VM "web"`, nil},
		"a cause":     {New(Failed, "cut %s: %w", "web", io.EOF), "cut web: EOF", []error{io.EOF}},
		"two causes":  {New(Failed, "%w, then %w", io.EOF, os.ErrClosed), "EOF, then file already closed", []error{io.EOF, os.ErrClosed}},
		"not a cause": {New(Failed, "cut: %v", io.EOF), "cut: EOF", nil},
	} {
		t.Run(name, func(t *testing.T) {
			if got := tc.err.Error(); got != tc.message {
				t.Errorf("message %q, want %q", got, tc.message)
			}
			for _, cause := range tc.causes {
				if !errors.Is(tc.err, cause) {
					t.Errorf("%v is no cause of it", cause)
				}
			}
			if (tc.err.Unwrap() == nil) != (tc.causes == nil) {
				t.Errorf("cause %v", tc.err.Unwrap())
			}
		})
	}
}

func TestOf(t *testing.T) {
	for name, tc := range map[string]struct {
		err  error
		want Kind
	}{
		"plain":           {io.EOF, Failed},
		"of a kind":       {New(Busy, "busy"), Busy},
		"wrapped":         {fmt.Errorf("create: %w", New(Busy, "busy")), Busy},
		"outermost wins":  {New(NotQuiesced, "freeze: %w", New(Unresponsive, "no answer")), NotQuiesced},
		"joined":          {errors.Join(io.EOF, New(Exists, "taken")), Exists},
		"cancelled":       {fmt.Errorf("wait: %w", context.Canceled), Cancelled},
		"late":            {context.DeadlineExceeded, Failed},
		"full":            {&os.PathError{Op: "write", Path: "/x", Err: syscall.ENOSPC}, NoSpace},
		"over quota":      {fmt.Errorf("copy: %w", syscall.EDQUOT), NoSpace},
		"full, of a kind": {New(Partial, "left out: %w", syscall.ENOSPC), Partial},
		"nil":             {nil, Failed},
	} {
		if got := Of(tc.err); got != tc.want {
			t.Errorf("%s: %s, want %s", name, got, tc.want)
		}
	}
}

func TestHint(t *testing.T) {
	inner := New(Unresponsive, "no answer").WithHint("install %s", "qemu-guest-agent")
	middle := New(NotQuiesced, "freeze: %w", fmt.Errorf("ask: %w", inner))
	outer := New(Failed, "create: %w", middle).WithHint("or use --quiesce=none")
	for name, tc := range map[string]struct {
		err  error
		want string
	}{
		"none":            {io.EOF, ""},
		"nil":             {nil, ""},
		"one":             {inner, "install qemu-guest-agent"},
		"below":           {middle, "install qemu-guest-agent"},
		"outermost first": {fmt.Errorf("rpc: %w", outer), "or use --quiesce=none; install qemu-guest-agent"},
	} {
		if got := Hint(tc.err); got != tc.want {
			t.Errorf("%s: %q, want %q", name, got, tc.want)
		}
	}
}

func TestWithHintLeavesTheErrorAlone(t *testing.T) {
	e := New(Busy, "busy")
	if hinted := e.WithHint("wait"); e.Hint != "" || hinted.Kind != Busy || hinted.Message != "busy" {
		t.Errorf("%+v became %+v", e, hinted)
	}
}
