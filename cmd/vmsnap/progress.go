package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// progress shows an operation while it runs. Its methods may be called from
// several goroutines.
type progress interface {
	update(*vmsnapv1.Operation)
	note(string) // something that the user should read
	close()
}

// showProgress shows an operation on the standard error: in place on a
// terminal, else line by line.
func (a *app) showProgress(operation *vmsnapv1.Operation) progress {
	l := &lines{out: a.stderr}
	if f, ok := a.stderr.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return newBar(l, f, a.now, operation)
	}
	l.update(operation)
	return l
}

// lines writes one line for each step that has ended and each turn that the
// operation takes.
type lines struct {
	mu    sync.Mutex
	out   io.Writer
	state vmsnapv1.OperationState
	place uint32 // in the queue
	rests bool
	ended int // steps that were told of
}

func (l *lines) update(o *vmsnapv1.Operation) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.steps(o, func(mark string, s *vmsnapv1.Step) string {
		text := fmt.Sprintf("%s: %s: done in %s", operationVM(o), s.GetName(), stepTook(s, time.Time{}))
		if mark == "✗" {
			text = fmt.Sprintf("%s: %s: %s", operationVM(o), s.GetName(), s.GetError())
		}
		return text
	})
	if text, turned := l.turn(o); turned {
		l.line(fmt.Sprintf("%s: %s", operationVM(o), text))
	}
}

// steps writes a line for each step that has ended since the last call.
func (l *lines) steps(o *vmsnapv1.Operation, line func(mark string, s *vmsnapv1.Step) string) {
	for l.ended < len(o.GetSteps()) && o.GetSteps()[l.ended].GetEnded() != nil {
		s := o.GetSteps()[l.ended]
		mark := "✓"
		if s.GetError() != "" {
			mark = "✗"
		}
		l.line(line(mark, s))
		l.ended++
	}
}

// turn returns what to say of a state that was not there before and that the
// steps do not tell of. An operation that has just begun is queued for a moment,
// which is nothing to tell; one that waits for its turn tells where it stands.
func (l *lines) turn(o *vmsnapv1.Operation) (string, bool) {
	before, place, rests := l.state, l.place, l.rests
	l.state, l.place, l.rests = o.GetState(), o.GetQueuePosition(), o.GetPaused()
	if l.rests && !rests {
		return "paused; vmsnap operation resume " + o.GetId() + " lets it go on", true
	}
	if l.place > 0 && l.place != place {
		return fmt.Sprintf("waits for its turn, at place %d: %s", l.place, o.GetQueueReason()), true
	}
	if before == l.state {
		return "", false
	}
	switch l.state {
	case vmsnapv1.OperationState_OPERATION_STATE_CANCELLING:
		return "cancelling", true
	case vmsnapv1.OperationState_OPERATION_STATE_REVERTING:
		return "undoing what was done", true
	default:
		return "", false
	}
}

func (l *lines) note(text string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.line(text)
}

func (l *lines) line(text string) { _, _ = fmt.Fprintln(l.out, printable(text)) }

func (l *lines) close() {}

// redrawEvery is often enough for a clock of tenths of seconds.
const redrawEvery = 100 * time.Millisecond

// bar keeps one line of a terminal up to date, below the steps that have
// ended.
type bar struct {
	*lines
	terminal *os.File
	now      func() time.Time
	last     *vmsnapv1.Operation // guarded by lines.mu, like frame
	frame    int
	stop     chan struct{}
	stopped  chan struct{}
}

func newBar(l *lines, terminal *os.File, now func() time.Time, o *vmsnapv1.Operation) *bar {
	b := &bar{lines: l, terminal: terminal, now: now, stop: make(chan struct{}), stopped: make(chan struct{})}
	b.update(o)
	go b.run()
	return b
}

func (b *bar) run() {
	defer close(b.stopped)
	tick := time.NewTicker(redrawEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			b.mu.Lock()
			b.frame++
			b.draw()
			b.mu.Unlock()
		case <-b.stop:
			return
		}
	}
}

func (b *bar) update(o *vmsnapv1.Operation) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.erase()
	b.steps(o, func(mark string, s *vmsnapv1.Step) string {
		text := fmt.Sprintf("%s %s  %s", mark, s.GetName(), stepTook(s, time.Time{}))
		if s.GetError() != "" {
			text += "  " + s.GetError()
		}
		return text
	})
	b.last = o
	b.draw()
}

func (b *bar) note(text string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.erase()
	b.line(text)
	b.draw()
}

func (b *bar) close() {
	close(b.stop)
	<-b.stopped
	b.mu.Lock()
	defer b.mu.Unlock()
	b.erase()
}

// erase empties the line that draw has written.
func (b *bar) erase() { _, _ = io.WriteString(b.out, "\r\x1b[K") }

func (b *bar) draw() {
	columns, _, err := term.GetSize(int(b.terminal.Fd()))
	if err != nil || columns <= 0 {
		columns = 80
	}
	// The last column stays free: writing there makes some terminals wrap.
	_, _ = io.WriteString(b.out, "\r\x1b[K"+truncate(printable(b.text()), columns-1))
}

const spinner = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"

func (b *bar) text() string {
	frames := []rune(spinner)
	parts := []string{string(frames[b.frame%len(frames)]), operationVM(b.last) + ":"}
	if b.last.GetPaused() {
		parts = append(parts, "paused,")
	}
	switch b.last.GetState() {
	case vmsnapv1.OperationState_OPERATION_STATE_QUEUED, vmsnapv1.OperationState_OPERATION_STATE_CANCELLING,
		vmsnapv1.OperationState_OPERATION_STATE_REVERTING:
		parts = append(parts, word(b.last.GetState())+",")
	}
	if steps := b.last.GetSteps(); b.ended < len(steps) {
		parts = append(parts, steps[b.ended].GetName())
	}
	if p := b.last.GetProgress(); p.GetTotal() > 0 {
		parts = append(parts, gauge(p.GetDone(), p.GetTotal()), progressText(p))
		if p.GetPass() > 1 {
			parts = append(parts, fmt.Sprintf("pass %d", p.GetPass()))
		}
		if p.GetEta() != nil {
			parts = append(parts, "about "+brief(p.GetEta().AsDuration())+" left")
		}
	}
	return strings.Join(append(parts, b.clock()), " ")
}

// clock returns how long the operation has run, no finer than it is redrawn.
func (b *bar) clock() string {
	if b.last.GetStarted() == nil {
		return ""
	}
	return brief(max(b.now().Sub(b.last.GetStarted().AsTime()), 0).Truncate(redrawEvery))
}

// gauge draws how much of a total is done.
func gauge(done, total uint64) string {
	const cells = 20
	full := int(float64(min(done, total)) / float64(total) * cells)
	return "[" + strings.Repeat("█", full) + strings.Repeat("░", cells-full) + "]"
}

// truncate cuts a text to a number of columns.
func truncate(s string, columns int) string {
	taken := 0
	for i, r := range s {
		taken += columnsOf(string(r))
		if taken > columns {
			return s[:i]
		}
	}
	return s
}
