package memdump

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Inspect reads what a complete memory file says about itself, and that it is
// as long as it says. The errors are those of [Verify]. The header of an
// incomplete file is returned beside [ErrIncomplete].
func Inspect(dir *os.Root, name string) (Header, Sum, error) {
	file, r, err := openComplete(dir, name)
	if err != nil {
		return r.Header, Sum{}, err
	}
	return r.Header, *r.Sum, file.Close()
}

// Verify reads all of a complete memory file, from the disk and not from what
// the host has cached, and compares it with its checksums. A compressed stream
// is decompressed, and an encrypted one is decrypted with key, which may be nil
// for others, and so authenticated. progress, unless nil, is called by the calling goroutine
// with bytes of the file.
//
// The errors wrap [ErrIncomplete], [ErrNotMemory], [ErrUnknownVersion],
// [ErrTruncated] or [ErrAltered]; or they are a [*KeyError], those of reading,
// or of ctx, and then nothing is known about the file.
func Verify(ctx context.Context, dir *os.Root, name string, key *Key, progress func(done, total uint64)) (Header, Sum, error) {
	file, r, err := openComplete(dir, name)
	if err != nil {
		return r.Header, Sum{}, err
	}
	defer file.Close() //nolint:errcheck // it was only read
	drop(file, 0, 0)
	src := newSource(ctx, file, *r.Sum, progress)
	if err := src.copyTo(io.Discard, r, key); err != nil {
		return r.Header, *r.Sum, fmt.Errorf("memory file %s: %w", name, err)
	}
	return r.Header, *r.Sum, nil
}

// openComplete opens a file whose header says that it is complete, and whose
// length agrees.
func openComplete(dir *os.Root, name string) (*os.File, record, error) {
	file, err := openRegular(dir, name, os.O_RDONLY)
	if err != nil {
		return nil, record{}, err
	}
	r, err := readComplete(file)
	if err != nil {
		return nil, r, errors.Join(fmt.Errorf("memory file %s: %w", name, err), file.Close())
	}
	return file, r, nil
}

func readComplete(file *os.File) (record, error) {
	r, err := readRecord(file)
	if err != nil {
		return r, err
	}
	if r.Sum == nil {
		return r, ErrIncomplete
	}
	size, err := sizeOf(file)
	if err != nil {
		return r, err
	}
	switch want := HeaderSize + int64(r.Sum.Stored); {
	case size < want:
		return r, fmt.Errorf("%w: it has %d bytes of %d", ErrTruncated, size, want)
	case size > want:
		return r, fmt.Errorf("%w: %d bytes follow its end", ErrAltered, size-want)
	}
	return r, nil
}

// source reads what a file stores behind its header, once, front to back. It
// hashes what it reads and takes it out of the page cache again.
type source struct {
	ctx      context.Context // an io.Reader is given none
	file     *os.File
	at, end  int64
	digest   digest
	progress func(done, total uint64)
	err      error // of reading, as opposed to what was read
}

func newSource(ctx context.Context, file *os.File, sum Sum, progress func(done, total uint64)) *source {
	_ = unix.Fadvise(int(file.Fd()), 0, 0, unix.FADV_SEQUENTIAL)
	return &source{
		ctx: ctx, file: file, digest: newDigest(), progress: progress,
		at: HeaderSize, end: HeaderSize + int64(sum.Stored),
	}
}

func (s *source) Read(p []byte) (int, error) {
	if s.err = s.ctx.Err(); s.err != nil {
		return 0, s.err
	}
	if s.at == s.end {
		return 0, io.EOF
	}
	n, err := s.file.ReadAt(p[:min(int64(len(p)), s.end-s.at)], s.at)
	if n == 0 && err != nil {
		if errors.Is(err, io.EOF) {
			err = ErrTruncated // since it was opened
		}
		s.err = err
		return 0, err
	}
	s.digest.add(p[:n])
	if before := s.at - s.at%window; before != (s.at+int64(n))-(s.at+int64(n))%window {
		drop(s.file, before, window)
	}
	s.at += int64(n)
	if s.progress != nil {
		s.progress(uint64(s.at-HeaderSize), uint64(s.end-HeaderSize))
	}
	return n, nil
}

// copyTo writes the stream to w, decrypted and decompressed, and compares it and
// what is stored with the record. w may have got all of the stream before an
// error.
func (s *source) copyTo(w io.Writer, r record, key *Key) error {
	sum := r.Sum
	if err := key.opens(r); err != nil {
		return err
	}
	out := &counter{w: w, left: sum.Length}
	stream := s.digest
	if sum.Compression != "" {
		stream = newDigest()
		out.w = io.MultiWriter(stream, w)
	}
	err := s.unpack(out, *sum, key)
	switch {
	case s.err != nil:
		return s.err
	case out.err != nil:
		return out.err
	case err != nil:
		return fmt.Errorf("%w: %w", ErrAltered, err)
	case s.digest.String() != sum.StoredChecksum:
		return fmt.Errorf("%w: it has the checksum %s and not %s", ErrAltered, s.digest, sum.StoredChecksum)
	case out.left > 0:
		return fmt.Errorf("%w: %d bytes of the stream are missing", ErrAltered, out.left)
	case sum.Encryption == "" && stream.String() != sum.Checksum: // age has authenticated the others
		return fmt.Errorf("%w: the stream has the checksum %s and not %s", ErrAltered, stream, sum.Checksum)
	}
	return nil
}

// unpack writes the stream to w.
func (s *source) unpack(w io.Writer, sum Sum, key *Key) (err error) {
	var from io.Reader = s
	if sum.Encryption != "" {
		if from, err = key.decrypt(s); err != nil {
			return err
		}
	}
	if sum.Compression != "" {
		return decompress(w, from)
	}
	_, err = io.CopyBuffer(onlyWriter{w}, from, make([]byte, piece))
	return err
}

// counter passes on at most left bytes.
type counter struct {
	w    io.Writer
	left uint64
	err  error // of w
}

func (c *counter) Write(p []byte) (int, error) {
	if uint64(len(p)) > c.left {
		return 0, fmt.Errorf("the stream is longer than recorded")
	}
	n, err := c.w.Write(p)
	c.left -= uint64(n)
	c.err = err
	return n, err
}

// onlyWriter hides methods that would make io.Copy ignore its buffer.
type onlyWriter struct{ io.Writer }
