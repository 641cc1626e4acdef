package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// A writer's file is a ring of Slots records of RecordSize bytes. Record n is
// put into slot n mod Slots, in place, so that writing never allocates; each is
// durable before the next is written. A file that shows anything but an
// unbroken run of records up to the last one has lost or torn a write.
const (
	RecordSize = 4096
	Slots      = 256
	RingSize   = RecordSize * Slots
)

// ErrBroken means that a ring has lost or torn a write that was durable.
var ErrBroken = errors.New("ring is broken")

// PutRecord fills b, of RecordSize bytes, with record number n, n > 0.
func PutRecord(b []byte, n uint64) {
	for i := 0; i < RecordSize-8; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], n)
	}
	binary.LittleEndian.PutUint64(b[RecordSize-8:], uint64(crc32.ChecksumIEEE(b[:RecordSize-8])))
}

// Offset is the place of record n in its file, in bytes.
func Offset(n uint64) int64 { return int64(n%Slots) * RecordSize }

// ScanRing returns the number of the last record in a ring, 0 for a new one. It
// fails with ErrBroken if a record before the last is missing.
func ScanRing(r io.ReaderAt) (uint64, error) {
	var slots [Slots]uint64
	var last uint64
	b := make([]byte, RecordSize)
	for i := range slots {
		if _, err := r.ReadAt(b, int64(i)*RecordSize); err != nil {
			return 0, fmt.Errorf("read slot %d: %w", i, err)
		}
		n := binary.LittleEndian.Uint64(b)
		if n == 0 {
			continue // never written
		}
		sum := binary.LittleEndian.Uint64(b[RecordSize-8:])
		if sum != uint64(crc32.ChecksumIEEE(b[:RecordSize-8])) {
			return 0, fmt.Errorf("slot %d: record %d is torn: %w", i, n, ErrBroken)
		}
		if n%Slots != uint64(i) {
			return 0, fmt.Errorf("slot %d holds record %d: %w", i, n, ErrBroken)
		}
		slots[i] = n
		last = max(last, n)
	}
	for n := last; n > 0 && n+Slots > last; n-- {
		if slots[n%Slots] != n {
			return 0, fmt.Errorf("record %d of %d is missing: %w", n, last, ErrBroken)
		}
	}
	return last, nil
}
