package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/internal/testvm/wire"
)

// counterName is the counter's file in the root of each file system.
const counterName = ".testvm-counter"

// counter counts in memory and on each file system, in step. Memory of one
// instant and disks of another are found out: before number n is written, every
// disk must hold n-1, and no disk may hold a number that memory does not know
// of yet. In memory too it is kept over many pages, so that pages of different
// instants are found out.
type counter struct {
	mu    sync.Mutex
	disks []*counterFile // nil when it was never started
	last  uint64
	err   error // what was wrong; the counter has ended
}

// counterFile is a ring of records on one file system, and its image in memory.
type counterFile struct {
	label string
	file  *os.File
	page  []byte // for direct I/O
	ring  []byte // what the file holds, in memory
}

// start goes on with what the file systems hold. A step that a power cut has
// interrupted between two of them is completed.
func (c *counter) start(labels []string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.disks != nil {
		return errors.New("the counter runs already")
	}
	var disks []*counterFile
	var held []uint64
	for _, label := range labels {
		f, err := openCounter(label)
		if err != nil {
			return err
		}
		n, err := wire.ScanRing(bytesAt(f.ring))
		if err != nil {
			return fmt.Errorf("%s: %w", label, err)
		}
		disks, held = append(disks, f), append(held, n)
		c.last = max(c.last, n)
	}
	for i, f := range disks {
		switch held[i] {
		case c.last:
		case c.last - 1:
			if err := f.write(c.last); err != nil {
				return err
			}
		default:
			return fmt.Errorf("%s holds %d, another disk %d: %w", f.label, held[i], c.last, errTorn)
		}
	}
	c.disks = disks
	go c.count()
	return nil
}

func (c *counter) read() (uint64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.disks == nil {
		return 0, errors.New("the counter does not run")
	}
	return c.last, c.err
}

func (c *counter) count() {
	for {
		err := c.step(c.last + 1)
		c.mu.Lock()
		if c.err = err; err == nil {
			c.last++
		}
		c.mu.Unlock()
		if err != nil {
			fmt.Fprintf(os.Stderr, "testvm guest: counter: %v\n", err)
			return
		}
	}
}

// step writes number n to each disk in turn.
func (c *counter) step(n uint64) error {
	for _, f := range c.disks {
		if err := f.check(n); err != nil {
			return fmt.Errorf("before %d: %w", n, err)
		}
	}
	for _, f := range c.disks {
		if err := f.write(n); err != nil {
			return err
		}
	}
	return nil
}

// check verifies that memory holds all numbers up to next-1 and none after
// them, and the disk the same in the slots of next-1 and next.
func (f *counterFile) check(next uint64) error {
	for n := next; n > 0 && n+wire.Slots > next; n-- {
		want := n
		if n == next { // its slot still holds the number of a round before
			want = max(next, wire.Slots) - wire.Slots
		}
		if got := word(f.ring[wire.Offset(n):]); got != want {
			return fmt.Errorf("%s: memory holds %d in the place of %d: %w", f.label, got, want, errTorn)
		}
	}
	for _, n := range []uint64{next - 1, next} {
		at := wire.Offset(n)
		if _, err := f.file.ReadAt(f.page, at); err != nil {
			return fmt.Errorf("%s: %w", f.label, err)
		}
		if got, want := word(f.page), word(f.ring[at:]); got != want {
			return fmt.Errorf("%s: the disk holds %d where memory holds %d: %w", f.label, got, want, errTorn)
		}
	}
	return nil
}

func word(b []byte) uint64 { return binary.LittleEndian.Uint64(b) }

var errTorn = errors.New("memory and disks are not of one instant")

func (f *counterFile) write(n uint64) error {
	at := wire.Offset(n)
	record := f.ring[at : at+wire.RecordSize]
	wire.PutRecord(record, n)
	copy(f.page, record)
	if _, err := f.file.WriteAt(f.page, at); err != nil {
		return fmt.Errorf("%s: %w", f.label, err)
	}
	if err := unix.Fdatasync(int(f.file.Fd())); err != nil {
		return fmt.Errorf("%s: fdatasync: %w", f.label, err)
	}
	return nil
}

// openCounter opens the counter's file past the page cache, which is memory,
// and reads it.
func openCounter(label string) (*counterFile, error) {
	path := filepath.Join(wire.MountRoot, label, counterName)
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		if err := writeDurably(path, make([]byte, wire.RingSize)); err != nil {
			return nil, err
		}
	}
	file, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return nil, err
	}
	f := &counterFile{label: label, file: file, ring: make([]byte, wire.RingSize)}
	if f.page, err = unix.Mmap(-1, 0, wire.RecordSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON); err != nil {
		return nil, err
	}
	for at := int64(0); at < wire.RingSize; at += wire.RecordSize {
		if _, err := file.ReadAt(f.page, at); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		copy(f.ring[at:], f.page)
	}
	return f, nil
}

// bytesAt reads from memory.
type bytesAt []byte

func (b bytesAt) ReadAt(p []byte, at int64) (int, error) {
	if n := copy(p, b[at:]); n < len(p) {
		return n, io.ErrUnexpectedEOF
	}
	return len(p), nil
}
