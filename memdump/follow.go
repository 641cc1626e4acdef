package memdump

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	// lookEvery is how often the follower looks how far the writer has come.
	// Nothing announces that without slowing the writer. At 2 GB/s that is four
	// windows.
	lookEvery = 4 * time.Millisecond

	// piece is what is read and hashed at a time.
	piece = 1 << 20
)

// follower hashes what a writer appends to a file, and sees to its writeback.
type follower struct {
	file      *os.File
	digest    digest
	hashed    atomic.Int64 // offset in the file
	writeback writeback
	buf       []byte
}

func newFollower(file *os.File) *follower {
	f := &follower{
		file: file, digest: newDigest(), buf: make([]byte, piece),
		writeback: writeback{file: file},
	}
	f.hashed.Store(HeaderSize)
	return f
}

// Follow follows the writer at a short distance until ctx ends, which is no
// error: it hashes the stream, has it written to the disk early, and takes it
// out of the page cache. It may be called again. Without it, Finish does it
// all. The stream must be written in order.
//
// An error means that the file cannot be finished.
func (f *File) Follow(ctx context.Context) error {
	if err := f.take(); err != nil {
		return err
	}
	defer f.give()
	g, inner := errgroup.WithContext(ctx)
	g.Go(func() error { return f.follower.everyLook(inner, f.follower.hashTo) })
	g.Go(func() error { return f.follower.everyLook(inner, f.follower.writeBackTo) })
	if err := g.Wait(); err != nil && ctx.Err() == nil {
		return fmt.Errorf("follow memory file %s: %w", f.name, err)
	}
	return nil
}

// everyLook calls do with the file's size, again and again, until ctx ends.
func (f *follower) everyLook(ctx context.Context, do func(context.Context, int64) error) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		size, err := sizeOf(f.file)
		if err != nil {
			return err
		}
		if err := do(ctx, size); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// hashTo hashes the file up to size.
func (f *follower) hashTo(ctx context.Context, size int64) error {
	for at := f.hashed.Load(); at < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := f.file.ReadAt(f.buf[:min(piece, size-at)], at)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if n == 0 {
			return fmt.Errorf("the file has shrunk from %d to %d bytes: %w", size, at, io.ErrUnexpectedEOF)
		}
		f.digest.add(f.buf[:n])
		at += int64(n)
		f.hashed.Store(at)
	}
	return nil
}

// writeBackTo has the file written up to size, and drops what is hashed and
// written, but for what the disk is at.
func (f *follower) writeBackTo(ctx context.Context, size int64) error {
	if err := f.writeback.start(size); err != nil {
		return err
	}
	return f.writeback.settle(ctx, min(f.hashed.Load(), f.writeback.started-inFlight))
}

// rest hashes and writes back what is left, once the writer has ended.
func (f *follower) rest(ctx context.Context) error {
	size, err := sizeOf(f.file)
	if err != nil {
		return err
	}
	if at := f.hashed.Load(); size < at {
		return fmt.Errorf("the file has shrunk from %d to %d bytes: %w", at, size, io.ErrUnexpectedEOF)
	}
	if err := f.writeback.start(size); err != nil {
		return err
	}
	if err := f.hashTo(ctx, size); err != nil {
		return err
	}
	if err := f.writeback.settle(ctx, size); err != nil {
		return err
	}
	switch now, err := sizeOf(f.file); {
	case err != nil:
		return err
	case now != size:
		return fmt.Errorf("the stream is being written still: it went from %d to %d bytes", size, now)
	}
	return nil
}

func (f *follower) digested() int64 { return f.hashed.Load() }
