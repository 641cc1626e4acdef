package outlive

import (
	"io"
	"time"
)

// PatientWriter writes in the background, and drops what does not fit: a log
// whose reader is stopped must never hold up the work.
type PatientWriter struct {
	lines   chan []byte
	flushed chan chan struct{}
}

// NewPatientWriter returns a writer to w, which may block.
func NewPatientWriter(w io.Writer) *PatientWriter {
	p := &PatientWriter{lines: make(chan []byte, 256), flushed: make(chan chan struct{}, 1)}
	go p.copy(w)
	return p
}

// Write takes over a copy of b.
func (p *PatientWriter) Write(b []byte) (int, error) {
	select {
	case p.lines <- append([]byte(nil), b...):
	default:
	}
	return len(b), nil
}

func (p *PatientWriter) copy(w io.Writer) {
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

// Flush writes what is left, for as long as the limit allows.
func (p *PatientWriter) Flush(limit time.Duration) {
	done := make(chan struct{})
	p.flushed <- done
	select {
	case <-done:
	case <-time.After(limit):
	}
}
