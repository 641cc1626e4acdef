package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/term"
)

// screen is what the viewer sees.
type screen struct {
	out            *os.File
	colours        bool
	proven, failed int
}

func newScreen(out *os.File) *screen {
	return &screen{out: out, colours: term.IsTerminal(int(out.Fd())) && os.Getenv("NO_COLOR") == ""}
}

// The colours, as terminals take them (ECMA-48, SGR).
const (
	bold  = "1"
	faint = "2"
	red   = "31"
	green = "32"
)

func (s *screen) paint(colour, text string) string {
	if !s.colours {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

// line prints a line; one that cannot be printed has no reader.
func (s *screen) line(text string) { _, _ = fmt.Fprintln(s.out, text) }

func (s *screen) heading(text string) {
	s.line("")
	s.line(s.paint(bold, "── "+text))
}

// say prints a remark of the demo's own.
func (s *screen) say(format string, args ...any) { s.line("   " + fmt.Sprintf(format, args...)) }

// command shows a command as a person would have typed it.
func (s *screen) command(prompt, text string) { s.line(s.paint(faint, prompt) + s.paint(bold, text)) }

// prove says whether something holds, which err denies.
func (s *screen) prove(err error, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if err == nil {
		s.proven++
		s.line("   " + s.paint(green, "✓") + " " + text)
		return
	}
	s.failed++
	s.line("   " + s.paint(red, "✗") + " " + text)
	for line := range strings.SplitSeq(strings.TrimSpace(err.Error()), "\n") {
		s.line("       " + line)
	}
}

// verdict is the last line.
func (s *screen) verdict(took time.Duration) error {
	s.line("")
	if s.failed > 0 {
		return fmt.Errorf("%d of %d proofs failed", s.failed, s.proven+s.failed)
	}
	s.line(s.paint(green, fmt.Sprintf("All %d proofs hold.", s.proven)) + fmt.Sprintf(" %.0f seconds.", took.Seconds()))
	return nil
}

// vmsnapDeadline is for a vmsnap that hangs; its own deadlines are shorter.
const vmsnapDeadline = 3 * time.Minute

// vmsnap shows and runs a vmsnap command. It writes to the same terminal as we
// do, so that its progress looks as it does to any user.
func (d *demo) vmsnap(ctx context.Context, args ...string) error {
	d.command("$ ", "vmsnap "+strings.Join(args, " "))
	// A Ctrl-C reaches it by itself, and it knows what to do.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), vmsnapDeadline)
	defer cancel()
	cmd := exec.CommandContext(ctx, vmsnapPath, args...)
	cmd.Env = append(os.Environ(), "VMSNAP_SOCKET="+d.daemon.Socket())
	cmd.Stdout, cmd.Stderr = d.out, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("vmsnap %s: %w", strings.Join(args, " "), err)
	}
	return nil
}

// inGuest shows and runs a command in the guest.
func (d *demo) inGuest(ctx context.Context, command string) error {
	d.command("web# ", command)
	_, err := d.guest.Exec(ctx, command)
	return err
}

// holds is the proof that something is as expected.
func holds(got, want any) error {
	if got != want {
		return errors.New(fmt.Sprint("it is not: ", got))
	}
	return nil
}
