package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/vmsnap/vmsnap/api/client"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// exitError is an error with an exit code of its own.
type exitError struct {
	code    vmsnapv1.ErrorCode
	message string
	hint    string
	err     error
}

func (e *exitError) Error() string { return e.message }
func (e *exitError) Unwrap() error { return e.err }

// usage is the error of a command line that is wrong.
func usage(cmd *cobra.Command, format string, args ...any) *exitError {
	err := fmt.Errorf(format, args...)
	return &exitError{
		code:    vmsnapv1.ErrorCode_ERROR_CODE_USAGE,
		message: err.Error(),
		hint:    "see " + cmd.CommandPath() + " --help",
		err:     err,
	}
}

// exit tells of a command's error and returns its exit code: the number of
// the error's code.
func (a *app) exit(err error) int {
	if err == nil {
		return 0
	}
	code, message, hint := explain(err)
	if _, own := errors.AsType[*exitError](err); !own && a.asked.Err() != nil && errors.Is(err, context.Canceled) {
		code, message, hint = vmsnapv1.ErrorCode_ERROR_CODE_CANCELLED, "interrupted", ""
	}
	a.complain("vmsnap: %s", message)
	if hint != "" {
		a.complain("hint: %s", hint)
	}
	return int(code)
}

func explain(err error) (code vmsnapv1.ErrorCode, message, hint string) {
	if own, ok := errors.AsType[*exitError](err); ok {
		return own.code, own.message, own.hint
	}
	if told, ok := client.ErrorOf(err); ok {
		code = told.GetCode()
		if code == vmsnapv1.ErrorCode_ERROR_CODE_UNSPECIFIED {
			code = vmsnapv1.ErrorCode_ERROR_CODE_FAILED
		}
		return code, told.GetMessage(), told.GetHint()
	}
	return vmsnapv1.ErrorCode_ERROR_CODE_FAILED, err.Error(), ""
}

// complain writes a line to the standard error. What guests and images named
// themselves must not reach the terminal as control sequences.
func (a *app) complain(format string, args ...any) {
	// Joined errors come one a line.
	text := strings.ReplaceAll(fmt.Sprintf(format, args...), "\n", "; ")
	_, _ = fmt.Fprintln(a.stderr, printable(text))
}

// warn tells of what did not stop the work.
func (a *app) warn(warnings []*vmsnapv1.Warning) {
	for _, w := range warnings {
		a.complain("warning: %s", warningText(w))
	}
}

func warningText(w *vmsnapv1.Warning) string {
	if w.GetDisk() == "" {
		return fmt.Sprintf("%s: %s", w.GetCode(), w.GetMessage())
	}
	return fmt.Sprintf("%s: disk %s: %s", w.GetCode(), w.GetDisk(), w.GetMessage())
}
