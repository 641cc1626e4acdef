package memdump

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"filippo.io/age"
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
// alone, and one that is to be encrypted is for [Encrypt]. The errors are those of [Verify] and [*SpaceError], whose Needed is
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
	if r.Recipient != "" {
		return Sum{}, fmt.Errorf("compress memory file %s: it is to be encrypted", name)
	}
	temp := compressName(name)
	if err := rewrite(ctx, dir, name, temp, plain, &r, form{compress: true}, progress); err != nil {
		return Sum{}, fmt.Errorf("compress memory file %s: %w", name, err)
	}
	if err := dir.Rename(temp, name); err != nil {
		return Sum{}, errors.Join(fmt.Errorf("compress memory file %s: %w", name, err), dir.Remove(temp))
	}
	if err := syncDir(dir); err != nil {
		return Sum{}, fmt.Errorf("compress memory file %s: %w", name, err)
	}
	return *r.Sum, nil
}

// form is how a file stores its stream.
type form struct {
	compress  bool
	recipient age.Recipient // that it is encrypted to; nil for none
}

// rewrite makes the file temp, whole and durable, which stores the stream of plain
// in another form, and sets r to its record. After an error it is not there.
func rewrite(ctx context.Context, dir *os.Root, name, temp string, plain *os.File, r *record, f form, progress func(done, total uint64)) error {
	if err := dir.Remove(temp); err != nil && !errors.Is(err, os.ErrNotExist) { // a crash left it
		return err
	}
	out, err := dir.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err = f.store(ctx, out, plain, r, progress); err != nil {
		err = spaceError(out, name, HeaderSize+r.Sum.Length+f.overhead(r.Sum.Length), err)
	}
	if err = errors.Join(err, out.Close()); err != nil {
		return errors.Join(err, dir.Remove(temp))
	}
	return nil
}

// overhead is how much longer a stream may become by what it is stored as, in
// bytes: age adds a tag to each 64 KiB, and a header.
func (f form) overhead(length uint64) uint64 {
	if f.recipient == nil {
		return 0
	}
	const chunk, tag, header = 64 << 10, 16, 4096
	return length/chunk*tag + header
}

// store writes a whole file, durably, and sets r to its record.
func (f form) store(ctx context.Context, out, plain *os.File, r *record, progress func(done, total uint64)) error {
	if err := out.Chmod(0o600); err != nil {
		return err
	}
	dst := &sink{ctx: ctx, file: out, digest: newDigest(), at: HeaderSize, writeback: writeback{file: out}}
	buf := bufio.NewWriterSize(dst, piece)
	to, closeAll, err := f.through(buf)
	if err != nil {
		return err
	}
	sum := *r.Sum
	if err := errors.Join(newSource(ctx, plain, sum, progress).copyTo(to, *r, nil), closeAll()); err != nil {
		return err
	}
	if err := buf.Flush(); err != nil {
		return err
	}
	if err := unix.Fdatasync(int(out.Fd())); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	sum.Stored, sum.StoredChecksum = uint64(dst.at-HeaderSize), dst.digest.String()
	if f.compress {
		sum.Compression = compressionZstd
	}
	if f.recipient != nil {
		// A checksum over what nobody is to read would tell of it.
		sum.Encryption, sum.Checksum = encryptionAge, ""
	}
	r.Sum = &sum
	return writeRecord(out, *r)
}

// through returns a writer that compresses, encrypts, and writes to w. What it
// holds back is written when it is closed.
func (f form) through(w io.Writer) (to io.Writer, closeAll func() error, err error) {
	to, closeAll = w, func() error { return nil }
	if f.recipient != nil {
		sealing, err := age.Encrypt(w, f.recipient)
		if err != nil {
			return nil, nil, err
		}
		to, closeAll = sealing, sealing.Close
	}
	if !f.compress {
		return to, closeAll, nil
	}
	enc, err := zstd.NewWriter(to, zstd.WithEncoderLevel(zstd.SpeedFastest),
		zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(zstdWindow), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return nil, nil, err
	}
	outer := closeAll
	return enc, func() error { return errors.Join(enc.Close(), outer()) }, nil
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
