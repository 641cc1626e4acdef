package memdump

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"time"
)

// A memory file is a block of HeaderSize bytes and then the migration stream,
// as QEMU wrote it or compressed. The block:
//
//	   0   8 bytes   "VMSNAPMM"
//	   8   uint32    version of the format, 1; little-endian like the others
//	  12   uint32    n, the length of the record
//	  16   n bytes   the record, JSON
//	16+n             zeros
//	4092   uint32    CRC-32C of the 4092 bytes before it
//
// Magic, version and CRC have their places in every version, so that an
// unknown version can be told from an altered block.
const (
	// HeaderSize is where the stream begins, in bytes from the start of the
	// file. It is a multiple of the page size, as QEMU's direct I/O needs.
	HeaderSize = 4096

	headerVersion = 1
	headerFixed   = 16
	headerCRC     = HeaderSize - 4
	headerMagic   = "VMSNAPMM"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Header says what a memory file holds.
type Header struct {
	VM        string    `json:"vm"`
	Snapshot  string    `json:"snapshot"`
	Operation string    `json:"operation"`
	QEMU      string    `json:"qemu"`    // version of the QEMU that wrote the stream
	Machine   string    `json:"machine"` // versioned machine type
	RAM       uint64    `json:"ram"`     // of the guest, in bytes
	Strategy  Strategy  `json:"strategy"`
	Created   time.Time `json:"created"`
}

// Sum is what is recorded of a finished stream. Checksums are written as
// algorithm and value: "xxh64:" and 16 hexadecimal digits.
type Sum struct {
	Length   uint64 `json:"length"`   // of the stream as QEMU wrote it, in bytes
	Checksum string `json:"checksum"` // over the stream as QEMU wrote it

	Compression    string `json:"compression,omitempty"` // "" or "zstd"
	Stored         uint64 `json:"stored"`                // bytes behind the header: Length unless compressed
	StoredChecksum string `json:"storedChecksum"`        // over these bytes: Checksum unless compressed
}

// record is the JSON in the header's block. Sum is nil until the stream is
// complete and durable.
type record struct {
	Header
	Sum *Sum `json:"sum,omitempty"`
}

// encode makes the block. It fails if the strings in it are too long.
func (r record) encode() ([]byte, error) {
	body, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("encode header: %w", err)
	}
	if len(body) > headerCRC-headerFixed {
		return nil, fmt.Errorf("header of %d bytes, %d fit", len(body), headerCRC-headerFixed)
	}
	block := make([]byte, HeaderSize)
	copy(block, headerMagic)
	binary.LittleEndian.PutUint32(block[8:], headerVersion)
	binary.LittleEndian.PutUint32(block[12:], uint32(len(body)))
	copy(block[headerFixed:], body)
	binary.LittleEndian.PutUint32(block[headerCRC:], crc32.Checksum(block[:headerCRC], castagnoli))
	return block, nil
}

// parseHeader reads a block of HeaderSize bytes. Its errors wrap ErrNotMemory,
// ErrAltered or ErrUnknownVersion.
func parseHeader(block []byte) (record, error) {
	if len(block) != HeaderSize || string(block[:8]) != headerMagic {
		return record{}, ErrNotMemory
	}
	if crc32.Checksum(block[:headerCRC], castagnoli) != binary.LittleEndian.Uint32(block[headerCRC:]) {
		return record{}, fmt.Errorf("%w: the header does not match its checksum", ErrAltered)
	}
	if v := binary.LittleEndian.Uint32(block[8:]); v != headerVersion {
		return record{}, fmt.Errorf("%w: it has version %d, this vmsnap knows version %d", ErrUnknownVersion, v, headerVersion)
	}
	n := binary.LittleEndian.Uint32(block[12:])
	if n > headerCRC-headerFixed {
		return record{}, fmt.Errorf("%w: the header's record has %d bytes", ErrAltered, n)
	}
	r, err := decodeRecord(block[headerFixed : headerFixed+n])
	if err != nil {
		return record{}, fmt.Errorf("%w: header: %w", ErrAltered, err)
	}
	return r, nil
}

func decodeRecord(body []byte) (record, error) {
	var r record
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&r); err != nil {
		return record{}, err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return record{}, errors.New("more than one record")
	}
	if r.Sum == nil {
		return r, nil
	}
	return r, r.Sum.check()
}

// check refuses a sum that no vmsnap writes.
func (s *Sum) check() error {
	switch {
	case s.Length > maxStream || s.Stored > maxStream:
		return fmt.Errorf("a length of %d bytes, stored in %d", s.Length, s.Stored)
	case s.Compression == "" && (s.Length != s.Stored || s.Checksum != s.StoredChecksum):
		return errors.New("two sums of a stream that is not compressed")
	case s.Compression != "" && s.Compression != compressionZstd:
		return fmt.Errorf("compression %q", s.Compression)
	}
	return nil
}

// maxStream bounds lengths, so that offsets in the file cannot overflow: 2^62
// bytes.
const maxStream = 1 << 62
