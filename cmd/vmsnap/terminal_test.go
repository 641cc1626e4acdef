package main

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/agent/rpc/rpctest"
)

const terminalColumns = 60

// openTerminal returns the two ends of a terminal of 60 columns.
func openTerminal(t *testing.T) (near, far *os.File) {
	t.Helper()
	near, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(near.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	number, err := unix.IoctlGetInt(int(near.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	far, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(int(far.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: terminalColumns}); err != nil {
		t.Fatal(err)
	}
	return near, far
}

// screen returns what a terminal shows after a text: lines, of which the last
// is rewritten by a carriage return and an erase.
func screen(text string) []string {
	lines := []string{""}
	for _, part := range regexp.MustCompile(`\r\n|\r\x1b\[K|[^\r]+|\r`).FindAllString(text, -1) {
		switch part {
		case "\r\n":
			lines = append(lines, "")
		case "\r\x1b[K":
			lines[len(lines)-1] = ""
		default:
			lines[len(lines)-1] += part
		}
	}
	return lines
}

func TestProgressOnATerminal(t *testing.T) {
	b := stuck()
	p := start(t, true, serve(t, b), "snapshot", "create", "web")
	p.await("1/4 steps")
	lines := screen(p.seen.String())
	if len(lines) != 2 || lines[0] != "✓ preflight  120ms" {
		t.Errorf("the screen shows %q", lines)
	}
	if !regexp.MustCompile(`^[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏] web: freeze \[█{5}░{15}\] 1/4 steps`).MatchString(lines[1]) {
		t.Errorf("the line in work is %q", lines[1])
	}
	// The clock goes on while nothing changes.
	p.await("1/4 steps 1s\r")

	s := taken("fresh")
	b.AddSnapshot(s)
	r := freezingWeb()
	r.State, r.Snapshot = op.Succeeded, s.ID
	r.Steps = rpctest.Steps(time.Now(), false, "preflight", "freeze", "cut")
	r.Steps[2].Error = "disk data dropped out"
	b.PutOperation(r)
	if code := p.end(); code != 0 {
		t.Errorf("exit %d", code)
	}
	want := []string{
		"✓ preflight  120ms", "✓ freeze  120ms", "✗ cut  120ms  disk data dropped out",
		"warning: settles-when-stopped: the launch path is settled when the VM has stopped", "",
	}
	if got := screen(p.seen.String()); strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("at the end the screen shows %q; want %q", got, want)
	}
	if p.stdout.String() != "web/fresh taken, filesystem consistent, 2 of 2 file systems frozen for 84ms\n" {
		t.Errorf("the standard output has %q", p.stdout.String())
	}
}

// TestProgressFitsTheTerminal has names that are wider than the terminal, and
// a hostile one.
func TestProgressFitsTheTerminal(t *testing.T) {
	b := rpctest.Sample()
	r := freezingWeb()
	r.VMName = strings.Repeat("東京", 40) + "\x1b[2J"
	b.PutOperation(r)
	p := start(t, true, serve(t, b), "operation", "watch", "beefbeef")
	p.await("東京東京")
	p.signal(os.Interrupt)
	p.end()
	for _, line := range strings.Split(p.seen.String(), "\r\x1b[K") {
		if strings.Contains(line, "東京") && columnsOf(line) >= terminalColumns {
			t.Errorf("%q has %d columns", line, columnsOf(line))
		}
	}
	if strings.Contains(p.seen.String(), "\x1b[2J") {
		t.Error("the name clears the terminal")
	}
}
