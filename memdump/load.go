package memdump

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/vmsnap/vmsnap/monitor"
)

// ErrLoad means that QEMU could not load a memory file. The error is a *LoadError, which
// has QEMU's reason as far as it gave one.
var ErrLoad = errors.New("QEMU could not load the memory")

// A LoadError is a load that failed. The QEMU process has ended, or was told to:
// what it holds by then is no guest's state.
type LoadError struct {
	Desc string // QEMU's reason for humans; "" if it gave none before it ended
	Err  error  // what else is known: ErrAltered, ErrLoadStalled, monitor.ErrGone
}

// Error gives QEMU's reason.
func (e *LoadError) Error() string {
	switch {
	case e.Desc != "" && e.Err != nil:
		return fmt.Sprintf("%v: %s: %v", ErrLoad, e.Desc, e.Err)
	case e.Desc != "":
		return ErrLoad.Error() + ": " + e.Desc
	case e.Err != nil:
		return fmt.Sprintf("%v: %v", ErrLoad, e.Err)
	default:
		return ErrLoad.Error() + ", and gives no reason"
	}
}

// Is makes a LoadError an ErrLoad.
func (e *LoadError) Is(target error) bool { return target == ErrLoad }

// Unwrap returns what is known beside QEMU's reason.
func (e *LoadError) Unwrap() error { return e.Err }

// Errors of a load beside those of reading the file.
var (
	// ErrNotWaiting: QEMU does not wait for its memory, so nothing was sent to it.
	ErrNotWaiting = errors.New("QEMU does not wait for its memory (-incoming defer)")

	// ErrLoadStalled: QEMU has taken nothing from the file for too long.
	ErrLoadStalled = errors.New("the load does not go on")
)

// LoadConfig is what a load needs.
type LoadConfig struct {
	Session *monitor.Session // of a QEMU that waits with -incoming defer -S
	Dir     *os.Root
	Name    string // of a complete memory file in Dir
	Key     *Key   // that opens an encrypted one; may be nil for others
	ID      string // of the operation; names the descriptor in QEMU
	// Progress, when not nil, is called by the calling goroutine with bytes of
	// the stream that QEMU has taken.
	Progress func(done, total uint64)
	// Stall ends a load that has not gone on for so long; 0 for a minute.
	Stall time.Duration
}

// Load has QEMU load a memory file, and returns when the guest is as it was when
// it was saved, its CPUs stopped and its images taken.
//
// A compressed or encrypted file is verified on the way, and its last bytes are held back
// until it was; Verify a plain one before. QEMU answers nothing else while it
// loads a plain file. After an error that is an ErrLoad, or when ctx has ended
// while it loaded, QEMU has ended or was told to; after any other it still waits.
func Load(ctx context.Context, c LoadConfig) error {
	if err := c.load(ctx); err != nil {
		return fmt.Errorf("load memory file %s: %w", c.Name, err)
	}
	return nil
}

func (c LoadConfig) load(ctx context.Context) (err error) {
	st, err := c.Session.QueryStatus(ctx)
	if err != nil {
		return err
	}
	if st.Status != monitor.RunStateInMigrate {
		return fmt.Errorf("%w: the VM is %s", ErrNotWaiting, st.Status)
	}
	stream, err := OpenStream(ctx, c.Dir, c.Name, c.Key)
	if err != nil {
		return err
	}
	defer func() {
		if closing := stream.Close(); err == nil {
			err = closing
		}
	}()
	l := loader{LoadConfig: c, stream: stream, fd: "vmsnap-" + c.ID}
	// Its events are hints that spare waiting for the next look.
	if err := setCapabilities(ctx, c.Session, map[string]bool{capEvents: true}); err != nil {
		return err
	}
	if err := c.Session.ExecuteWithFile(ctx, "getfd", map[string]string{"fdname": l.fd}, nil, stream.File); err != nil {
		return err
	}
	if stream.done != nil { // a pipe whose reader is gone must tell its writer
		if err := stream.Release(); err != nil {
			return err
		}
	}
	return l.run(ctx)
}

// loader is a load under way.
type loader struct {
	LoadConfig
	stream *Stream
	fd     string
	at     uint64    // how far QEMU was at the last look
	moved  time.Time // when it last went on
}

// run sends the command and follows QEMU until it has loaded all.
func (l *loader) run(ctx context.Context) error {
	events := l.Session.Subscribe(migrationEvents, "MIGRATION")
	defer events.Close()
	l.moved = time.Now()
	args := map[string]any{"uri": "fd:" + l.fd}
	if l.Session.AtLeast(9, 1) {
		args["exit-on-error"] = false // so that QEMU can tell the reason
	}
	_, err := l.ask(ctx, func(ctx context.Context) (m monitor.Migration, err error) {
		return m, l.Session.Execute(ctx, "migrate-incoming", args, nil)
	})
	for err == nil {
		var m monitor.Migration
		if m, err = l.ask(ctx, l.Session.QueryMigrate); err != nil {
			break
		}
		switch m.Status {
		case monitor.MigrationCompleted:
			return l.loaded(ctx)
		case monitor.MigrationFailed, monitor.MigrationCancelled:
			return l.failed(ctx, &LoadError{Desc: m.ErrorDesc})
		}
		select {
		case <-events.C: // closed with the session, which the next query tells
		case <-time.After(loadPoll): // not each version announces the end
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	var refused *monitor.CommandError
	if errors.As(err, &refused) {
		return l.failed(ctx, &LoadError{Desc: refused.Desc})
	}
	if ctx.Err() != nil {
		return errors.Join(context.Cause(ctx), l.end(ctx))
	}
	return l.failed(ctx, &LoadError{Err: err})
}

// ask runs a command, for whose answer QEMU may need as long as the load takes,
// and watches meanwhile that the load goes on.
func (l *loader) ask(ctx context.Context, f func(context.Context) (monitor.Migration, error)) (monitor.Migration, error) {
	ctx, stop := context.WithTimeout(ctx, loadWithin)
	defer stop()
	type answer struct {
		m   monitor.Migration
		err error
	}
	answered := make(chan answer, 1)
	go func() {
		m, err := f(ctx)
		answered <- answer{m, err}
	}()
	tick := time.NewTicker(progressEvery)
	defer tick.Stop()
	for {
		select {
		case a := <-answered:
			if stalled := l.look(); a.err == nil && stalled != nil {
				return a.m, stalled
			}
			return a.m, a.err
		case <-tick.C:
			if err := l.look(); err != nil {
				return monitor.Migration{}, err
			}
		}
	}
}

// look reports how far QEMU is, and fails if that is too long the same.
func (l *loader) look() error {
	at, err := l.stream.Taken()
	if err != nil {
		return err
	}
	if at != l.at {
		l.at, l.moved = at, time.Now()
	}
	if l.Progress != nil {
		l.Progress(min(at, l.stream.Sum.Length), l.stream.Sum.Length)
	}
	limit := l.Stall
	if limit == 0 {
		limit = loadStalls
	}
	if time.Since(l.moved) > limit {
		return fmt.Errorf("%w: nothing was read for %s at %d of %d bytes", ErrLoadStalled, limit, at, l.stream.Sum.Length)
	}
	return nil
}

// loaded makes sure that what was loaded is what was saved.
func (l *loader) loaded(ctx context.Context) error {
	if err := l.stream.Wait(ctx); err != nil {
		return l.failed(ctx, &LoadError{Err: err})
	}
	return nil
}

// failed ends QEMU, and adds to the reason what the stream's writer knows.
func (l *loader) failed(ctx context.Context, e *LoadError) error {
	ended := l.end(ctx)
	if l.stream.done != nil {
		_ = l.stream.Close()
		if errors.Is(l.stream.err, ErrAltered) || errors.Is(l.stream.err, ErrTruncated) {
			e.Err = l.stream.err // the cause of all else
		}
	}
	if ended != nil {
		return errors.Join(e, ended)
	}
	return e
}

// end tells QEMU to end, if it has not done so by itself. One that hangs is the
// caller's to kill.
func (l *loader) end(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), quitWithin)
	defer cancel()
	err := l.Session.Execute(ctx, "quit", nil, nil)
	if errors.Is(err, monitor.ErrGone) || errors.Is(err, monitor.ErrOutcomeUnknown) && l.Session.Err() != nil {
		return nil
	}
	return err
}

// Taken returns how many bytes of the stream QEMU has taken so far. It cannot be
// told after a plain file's Release.
func (s *Stream) Taken() (uint64, error) {
	if s.done != nil {
		return s.taken.Load(), nil
	}
	at, err := s.File.Seek(0, io.SeekCurrent) // the offset is QEMU's too
	if err != nil {
		return 0, fmt.Errorf("memory file: %w", err)
	}
	return uint64(max(at-HeaderSize, 0)), nil
}
