package freeze

import (
	"io"
	"time"
)

// patientWriter writes in the background, and drops what does not fit: a log
// whose reader is stopped must never hold up a thaw.
type patientWriter struct {
	lines   chan []byte
	flushed chan chan struct{}
}

func newPatientWriter(w io.Writer) *patientWriter {
	p := &patientWriter{lines: make(chan []byte, 256), flushed: make(chan chan struct{}, 1)}
	go p.copy(w)
	return p
}

// Write takes over a copy of b.
func (p *patientWriter) Write(b []byte) (int, error) {
	select {
	case p.lines <- append([]byte(nil), b...):
	default:
	}
	return len(b), nil
}

func (p *patientWriter) copy(w io.Writer) {
	for {
		select {
		case line := <-p.lines:
			// There is no one to tell that the log cannot be written.
			_, _ = w.Write(line)
		case done := <-p.flushed:
			for len(p.lines) > 0 {
				_, _ = w.Write(<-p.lines)
			}
			close(done)
			return
		}
	}
}

// flush writes what is left, for as long as the limit allows.
func (p *patientWriter) flush(limit time.Duration) {
	done := make(chan struct{})
	p.flushed <- done
	select {
	case <-done:
	case <-time.After(limit):
	}
}
