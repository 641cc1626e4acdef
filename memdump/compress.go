package memdump

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

const (
	compressionZstd = "zstd"

	// zstdWindow is how far back the compressor looks; zstdLimit how far a file
	// may make the decompressor do so, which costs that much memory.
	zstdWindow = 4 << 20
	zstdLimit  = 8 << 20
)

// compressName is the name that a file has while it is being compressed.
func compressName(name string) string { return name + ".compressing" }

// Compress replaces a complete memory file by a compressed one, and checks the
// plain one against its checksum on the way. It takes one CPU and a few MiB,
// and space for both files. progress, unless nil, is called by the calling
// goroutine with bytes of the plain file.
//
// The file changes in one step, at the end: after any error or a crash before
// it the plain file is what it was. A file that is compressed already is left
// alone. The errors are those of [Verify] and [*SpaceError], whose Needed is
// what compression could need at most.
func Compress(ctx context.Context, dir *os.Root, name string, progress func(done, total uint64)) (Sum, error) {
	plain, r, err := openComplete(dir, name)
	if err != nil {
		return Sum{}, err
	}
	defer plain.Close() //nolint:errcheck // it was only read
	if r.Sum.Compression != "" {
		return *r.Sum, nil
	}
	temp := compressName(name)
	if err := dir.Remove(temp); err != nil && !errors.Is(err, os.ErrNotExist) { // a crash left it
		return Sum{}, fmt.Errorf("compress memory file %s: %w", name, err)
	}
	out, err := dir.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return Sum{}, fmt.Errorf("compress memory file %s: %w", name, err)
	}
	err = compressTo(ctx, out, plain, &r, progress)
	if err != nil {
		err = spaceError(out, name, HeaderSize+r.Sum.Length, fmt.Errorf("compress memory file %s: %w", name, err))
	}
	if err = errors.Join(err, out.Close()); err == nil {
		err = dir.Rename(temp, name)
	}
	if err != nil {
		return Sum{}, errors.Join(err, dir.Remove(temp))
	}
	if err := syncDir(dir); err != nil {
		return Sum{}, fmt.Errorf("compress memory file %s: %w", name, err)
	}
	return *r.Sum, nil
}

// compressTo writes a whole compressed file, durably, and sets r to its record.
func compressTo(ctx context.Context, out, plain *os.File, r *record, progress func(done, total uint64)) error {
	if err := out.Chmod(0o600); err != nil {
		return err
	}
	dst := &sink{ctx: ctx, file: out, digest: newDigest(), at: HeaderSize, writeback: writeback{file: out}}
	buf := bufio.NewWriterSize(dst, piece)
	enc, err := zstd.NewWriter(buf, zstd.WithEncoderLevel(zstd.SpeedFastest),
		zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(zstdWindow), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return err
	}
	sum := *r.Sum
	src := newSource(ctx, plain, sum, progress)
	if err := errors.Join(src.copyTo(enc, sum), enc.Close()); err != nil {
		return err
	}
	if err := buf.Flush(); err != nil {
		return err
	}
	if err := unix.Fdatasync(int(out.Fd())); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	sum.Compression, sum.Stored, sum.StoredChecksum = compressionZstd, uint64(dst.at-HeaderSize), dst.digest.String()
	r.Sum = &sum
	return writeRecord(out, *r)
}

// sink writes what follows a header, hashes it, and keeps it out of the page
// cache.
type sink struct {
	ctx       context.Context // an io.Writer is given none
	file      *os.File
	at        int64
	digest    digest
	writeback writeback
}

func (s *sink) Write(p []byte) (int, error) {
	n, err := s.file.WriteAt(p, s.at)
	s.digest.add(p[:n])
	s.at += int64(n)
	if err != nil {
		return n, err
	}
	if err := s.writeback.start(s.at); err != nil {
		return n, err
	}
	return n, s.writeback.settle(s.ctx, s.writeback.started-inFlight)
}

// decompress writes to w what r holds. Memory is bounded whatever r says.
func decompress(w io.Writer, r io.Reader) error {
	dec, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1),
		zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(zstdLimit))
	if err != nil {
		return err
	}
	defer dec.Close()
	_, err = io.CopyBuffer(onlyWriter{w}, struct{ io.Reader }{dec}, make([]byte, piece))
	return err
}
