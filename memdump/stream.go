package memdump

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	// holdBack is how much of a stream's end a load gets only after all of the
	// stream was found to be what was saved: more than the description of the
	// devices at the very end, without which QEMU would load all the same.
	holdBack = 4 << 20

	// pipeSize is what a pipe can hold for QEMU while it is busy.
	pipeSize = 1 << 20
)

// Stream is the stream of a complete memory file, for a QEMU that loads it.
type Stream struct {
	Header Header
	Sum    Sum
	// File is what QEMU is given as its descriptor to load from: the memory
	// file positioned at the stream's first byte, or a pipe.
	File *os.File

	taken atomic.Uint64 // bytes that went into the pipe

	stop context.CancelFunc
	done chan struct{} // closed when the pipe's writer has ended; nil without a pipe
	err  error         // of the pipe's writer, once done is closed
	once sync.Once
}

// OpenStream opens the stream of a complete memory file. It reads the header
// only: the errors are those of [Inspect], and [*KeyError] when key, which may be
// nil, does not open the file.
//
// A plain file is not compared with its checksum while it is loaded, so Verify
// it before. The end of a compressed or encrypted stream is held back until all
// of it was found unaltered: a load of an altered stream cannot succeed.
//
// A pipe is filled until ctx ends. Once it was passed to QEMU, [Stream.Release]
// closes this process's copy.
func OpenStream(ctx context.Context, dir *os.Root, name string, key *Key) (*Stream, error) {
	file, r, err := openComplete(dir, name)
	if err != nil {
		return nil, err
	}
	if err := key.opens(r); err != nil {
		return nil, errors.Join(fmt.Errorf("memory file %s: %w", name, err), file.Close())
	}
	s := &Stream{Header: r.Header, Sum: *r.Sum, File: file, stop: func() {}}
	if r.Sum.Compression == "" && r.Sum.Encryption == "" {
		_, err = file.Seek(HeaderSize, io.SeekStart)
	} else {
		err = s.openPipe(ctx, file, r, key)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("memory file %s: %w", name, err), file.Close())
	}
	return s, nil
}

// openPipe makes File a pipe and starts to fill it from file.
func (s *Stream) openPipe(ctx context.Context, file *os.File, rec record, key *Key) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	enlarge(w)
	ctx, s.stop = context.WithCancel(ctx)
	s.File, s.done = r, make(chan struct{})
	go func() {
		defer close(s.done)
		s.err = fill(ctx, w, file, rec, key, &s.taken)
	}()
	return nil
}

// enlarge asks for a larger pipe. One of the usual size is slower, and as good.
func enlarge(pipe *os.File) {
	raw, err := pipe.SyscallConn() // Fd would make writes that cannot be ended
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pipeSize) })
}

// fill writes the stream into the pipe and closes both.
func fill(ctx context.Context, pipe, file *os.File, r record, key *Key, taken *atomic.Uint64) error {
	defer context.AfterFunc(ctx, func() { _ = pipe.Close() })() // a write that waits for QEMU ends
	end := &tail{w: counting{pipe, taken}}
	err := newSource(ctx, file, *r.Sum, nil).copyTo(end, r, key)
	if err == nil {
		err = end.flush()
	}
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	if e := pipe.Close(); err == nil && !errors.Is(e, os.ErrClosed) {
		err = e
	}
	return errors.Join(err, file.Close())
}

// counting counts what was written.
type counting struct {
	w io.Writer
	n *atomic.Uint64
}

func (c counting) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n.Add(uint64(n))
	return n, err
}

// Release closes this process's copy of File, once QEMU has its own. The
// stream goes on.
func (s *Stream) Release() error {
	var err error
	s.once.Do(func() { err = s.File.Close() })
	return err
}

// Wait waits until QEMU has got all of the stream, and says if it was what was
// saved. It returns nil at once for a plain file.
func (s *Stream) Wait(ctx context.Context) error {
	if s.done == nil {
		return nil
	}
	select {
	case <-s.done:
		return s.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Close ends the stream. Whether it came to its end is for Wait to say.
func (s *Stream) Close() error {
	s.stop()
	if s.done != nil {
		<-s.done
	}
	return s.Release()
}

// tail passes on all that is written to it but the last holdBack bytes.
type tail struct {
	w    io.Writer
	held []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.held = append(t.held, p...)
	if len(t.held) < 2*holdBack {
		return len(p), nil
	}
	n := len(t.held) - holdBack
	if _, err := t.w.Write(t.held[:n]); err != nil {
		return 0, err
	}
	t.held = t.held[:copy(t.held, t.held[n:])]
	return len(p), nil
}

func (t *tail) flush() error {
	_, err := t.w.Write(t.held)
	return err
}
