package blockdev

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"

	"golang.org/x/sys/unix"
)

// AllocatedBytes returns how much data an image holds by itself, without what
// lies below it: what folding it into another one moves. A compressed cluster
// counts in full, one that only says that it reads as zeroes does not. The file
// may be in use, and the answer is then that of what is on disk.
//
// Images are not trusted: tables are read within the bounds of the file, and
// ErrRefusedImage is returned for those that cannot be.
func AllocatedBytes(ctx context.Context, path, format string) (uint64, error) {
	var sum uint64
	err := readRuns(ctx, path, format, func(runs iter.Seq2[run, error]) error {
		for r, err := range runs {
			if err != nil {
				return err
			}
			if !r.zero {
				sum += r.length
			}
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("allocation of %s: %w", path, err)
	}
	return sum, nil
}

// run is a part of the virtual disk, in bytes, that an image holds by itself.
type run struct {
	start, length uint64
	zero          bool // it holds that it reads as zeroes
}

// readRuns opens an image and hands what it holds to a function, in its order.
func readRuns(ctx context.Context, path, format string, read func(iter.Seq2[run, error]) error) error {
	f, err := openImage(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	runs := rawRuns(ctx, f)
	if format != "raw" {
		if format != "qcow2" {
			return fmt.Errorf("%s: allocation of format %q: %w", path, format, errors.ErrUnsupported)
		}
		h, err := ReadHeader(f)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		size, err := f.Seek(0, io.SeekEnd)
		if err != nil {
			return err
		}
		runs = h.runs(ctx, f, uint64(size))
	}
	return read(runs)
}

// openImage opens a file or block device for reading: a FIFO would hang.
func openImage(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() && !infoOf(fi).Device {
		err = fmt.Errorf("%s: %w: neither a file nor a block device", path, ErrRefusedImage)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// rawRuns asks the file system which parts of a file have data.
func rawRuns(ctx context.Context, f *os.File) iter.Seq2[run, error] {
	return func(yield func(run, error) bool) {
		size, err := f.Seek(0, io.SeekEnd)
		if err != nil {
			yield(run{}, err)
			return
		}
		for at := int64(0); at < size; {
			if ctx.Err() != nil {
				yield(run{}, context.Cause(ctx))
				return
			}
			data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) {
				return // a hole up to the end
			}
			if errors.Is(err, unix.EINVAL) { // a block device knows no holes
				yield(run{start: uint64(at), length: uint64(size - at)}, nil)
				return
			}
			if err != nil {
				yield(run{}, err)
				return
			}
			hole, err := unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
			if err != nil {
				yield(run{}, err)
				return
			}
			if !yield(run{start: uint64(data), length: uint64(hole - data)}, nil) {
				return
			}
			at = hole
		}
	}
}

// Entries of qcow2's tables (docs/interop/qcow2.txt).
const (
	tableOffset  = 0x00fffffffffffe00
	l2Zero       = 1 << 0
	l2Compressed = 1 << 62
	subclusters  = 32 // in each cluster, with extended L2 entries
)

// runs walks the L1 and L2 tables of an image whose file has a size.
func (h Header) runs(ctx context.Context, r io.ReaderAt, fileSize uint64) iter.Seq2[run, error] {
	return func(yield func(run, error) bool) {
		cluster := uint64(1) << h.ClusterBits
		covered := cluster / h.l2Entry() * cluster // by one L2 table
		used := min(uint64(h.l1.entries), h.VirtualSize/covered+1)
		l1, err := h.readL1(r, used, fileSize)
		if err != nil {
			yield(run{}, err)
			return
		}
		table := make([]byte, cluster)
		tables := fileSize / cluster // there cannot be more of them
		var pending run
		for i := range used {
			offset := binary.BigEndian.Uint64(l1[i*8:]) & tableOffset
			if offset == 0 {
				continue
			}
			if ctx.Err() != nil {
				yield(run{}, context.Cause(ctx))
				return
			}
			if tables == 0 || offset > fileSize {
				yield(run{}, fmt.Errorf("%w: more L2 tables than the file has room for, or one at %d", ErrRefusedImage, offset))
				return
			}
			tables--
			n, err := r.ReadAt(table, int64(offset))
			if err != nil && !errors.Is(err, io.EOF) {
				yield(run{}, err)
				return
			}
			clear(table[n:]) // the file may end within it
			if !h.tableRuns(table, i*covered, &pending, yield) {
				return
			}
		}
		if pending.length > 0 {
			yield(pending, nil)
		}
	}
}

// readL1 reads the first entries of the L1 table.
func (h Header) readL1(r io.ReaderAt, entries, fileSize uint64) ([]byte, error) {
	if h.l1.offset > fileSize || entries*8 > fileSize-h.l1.offset {
		return nil, fmt.Errorf("%w: an L1 table of %d entries at %d, outside of the file", ErrRefusedImage, entries, h.l1.offset)
	}
	l1 := make([]byte, entries*8)
	if _, err := r.ReadAt(l1, int64(h.l1.offset)); err != nil {
		return nil, fmt.Errorf("read the L1 table: %w", err)
	}
	return l1, nil
}

// l2Entry is the size of an entry of an L2 table.
func (h Header) l2Entry() uint64 {
	if h.extendedL2 {
		return 16
	}
	return 8
}

// tableRuns yields what one L2 table says of the disk from start on. The last
// run may go on in the next table: it is kept in pending.
func (h Header) tableRuns(table []byte, start uint64, pending *run, yield func(run, error) bool) bool {
	cluster, size := uint64(1)<<h.ClusterBits, h.l2Entry()
	add := func(at, length uint64, zero bool) bool {
		if at >= h.VirtualSize {
			return true
		}
		length = min(length, h.VirtualSize-at)
		if pending.length > 0 && pending.start+pending.length == at && pending.zero == zero {
			pending.length += length
			return true
		}
		done := pending.length == 0 || yield(*pending, nil)
		*pending = run{at, length, zero}
		return done
	}
	for n := uint64(0); n*size < uint64(len(table)); n++ {
		entry, at := binary.BigEndian.Uint64(table[n*size:]), start+n*cluster
		switch {
		case entry&l2Compressed != 0:
			if !add(at, cluster, false) {
				return false
			}
		case h.extendedL2:
			bitmap := binary.BigEndian.Uint64(table[n*size+8:])
			for s := range uint64(subclusters) {
				data, zero := bitmap>>s&1 != 0, bitmap>>(s+subclusters)&1 != 0
				if (data || zero) && !add(at+s*cluster/subclusters, cluster/subclusters, zero) {
					return false
				}
			}
		case entry&l2Zero != 0:
			if !add(at, cluster, true) {
				return false
			}
		case entry&tableOffset != 0:
			if !add(at, cluster, false) {
				return false
			}
		}
	}
	return true
}

// missing returns how many bytes of data an image holds that another, which
// should have got all of it, holds neither as data nor as zeroes, as far as
// their files say.
func missing(from, into iter.Seq2[run, error]) (uint64, error) {
	next, stop := iter.Pull2(into)
	defer stop()
	var got run
	var lost uint64
	for r, err := range from {
		if err != nil {
			return 0, err
		}
		if r.zero {
			continue
		}
		for at, end := r.start, r.start+r.length; at < end; {
			for got.start+got.length <= at {
				var err error
				var more bool
				if got, err, more = next(); err != nil {
					return 0, err
				} else if !more {
					got = run{start: behind, length: 1}
				}
			}
			if got.start > at {
				lost += min(got.start, end) - at
			}
			at = min(end, max(at, got.start+got.length))
		}
	}
	return lost, nil
}
