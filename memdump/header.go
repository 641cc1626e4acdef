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

	"filippo.io/age"
)

// A memory file is a block of HeaderSize bytes and then the migration stream,
// as QEMU wrote it or compressed, encrypted, or both. The block:
//
//	   0   8 bytes   "VMSNAPMM"
//	   8   uint32    version of the format; little-endian like the others
//	  12   uint32    n, the length of the record
//	  16   n bytes   the record, JSON
//	16+n             zeros
//	4092   uint32    CRC-32C of the 4092 bytes before it
//
// Magic, version and CRC have their places in every version, so that an
// unknown version can be told from an altered block. Version 1 is a file that is
// and stays plain. Version 2 is one that is encrypted, or is to be: its record
// names the recipient, and what follows the block once it is encrypted is a
// whole file of age (age-encryption.org/v1).
const (
	// HeaderSize is where the stream begins, in bytes from the start of the
	// file. It is a multiple of the page size, as QEMU's direct I/O needs.
	HeaderSize = 4096

	versionPlain     = 1
	versionEncrypted = 2
	headerFixed      = 16
	headerCRC        = HeaderSize - 4
	headerMagic      = "VMSNAPMM"
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
	// Recipient is whom the file is, or is to be, encrypted to (age1…); empty for
	// one that stays plain.
	Recipient string `json:"recipient,omitempty"`
}

// Sum is what is recorded of a finished stream. Checksums are written as
// algorithm and value: "xxh64:" and 16 hexadecimal digits.
type Sum struct {
	Length   uint64 `json:"length"`   // of the stream as QEMU wrote it, in bytes
	Checksum string `json:"checksum"` // over the stream as QEMU wrote it; "" when encrypted

	Compression    string `json:"compression,omitempty"` // "" or "zstd", before encryption
	Encryption     string `json:"encryption,omitempty"`  // "" or "age"
	Stored         uint64 `json:"stored"`                // bytes behind the header: Length unless compressed or encrypted
	StoredChecksum string `json:"storedChecksum"`        // over these bytes: Checksum unless compressed or encrypted
}

// record is the JSON in the header's block. Sum is nil until the stream is
// complete and durable.
type record struct {
	Header
	Sum *Sum `json:"sum,omitempty"`
}

// version is that of the oldest format that can say it.
func (r record) version() uint32 {
	if r.Recipient != "" {
		return versionEncrypted
	}
	return versionPlain
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
	binary.LittleEndian.PutUint32(block[8:], r.version())
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
	version := binary.LittleEndian.Uint32(block[8:])
	if version < versionPlain || version > versionEncrypted {
		return record{}, fmt.Errorf("%w: it has version %d, this vmsnap knows versions %d to %d", ErrUnknownVersion, version, versionPlain, versionEncrypted)
	}
	n := binary.LittleEndian.Uint32(block[12:])
	if n > headerCRC-headerFixed {
		return record{}, fmt.Errorf("%w: the header's record has %d bytes", ErrAltered, n)
	}
	r, err := decodeRecord(block[headerFixed : headerFixed+n])
	if err == nil && r.version() != version {
		err = fmt.Errorf("a recipient %q in version %d", r.Recipient, version)
	}
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
	if r.Recipient != "" {
		if _, err := age.ParseX25519Recipient(r.Recipient); err != nil {
			return record{}, fmt.Errorf("recipient: %w", err)
		}
	}
	if r.Sum == nil {
		return r, nil
	}
	return r, r.check()
}

// check refuses a sum that no vmsnap writes.
func (r record) check() error {
	s := r.Sum
	switch {
	case s.Length > maxStream || s.Stored > maxStream:
		return fmt.Errorf("a length of %d bytes, stored in %d", s.Length, s.Stored)
	case s.Compression != "" && s.Compression != compressionZstd:
		return fmt.Errorf("compression %q", s.Compression)
	case s.Encryption != "" && s.Encryption != encryptionAge:
		return fmt.Errorf("encryption %q", s.Encryption)
	case s.Encryption != "" && (r.Recipient == "" || s.Checksum != ""):
		return errors.New("an encrypted stream without a recipient, or with a checksum of what it hides")
	case s.Encryption == "" && s.Compression != "" && r.Recipient != "":
		return errors.New("a stream that was compressed and is to be encrypted")
	case s.Encryption == "" && s.Compression == "" && (s.Length != s.Stored || s.Checksum != s.StoredChecksum):
		return errors.New("two sums of a stream that is stored as it is")
	}
	return nil
}

// maxStream bounds lengths, so that offsets in the file cannot overflow: 2^62
// bytes.
const maxStream = 1 << 62
