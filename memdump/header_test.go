package memdump

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var someHeader = Header{
	VM: "db1", Snapshot: "before-upgrade", Operation: "7f3a0c11", QEMU: "7.2.15",
	Machine: "pc-i440fx-7.2", RAM: 2 << 30, Strategy: Background,
	Created: time.Date(2025, 11, 23, 2, 30, 0, 0, time.UTC),
}

// secretHeader is that of a file that is encrypted, or is to be.
func secretHeader() Header {
	h := someHeader
	h.Recipient = someKey().Recipient()
	return h
}

func TestHeaderRoundTrip(t *testing.T) {
	for _, want := range []record{
		{Header: someHeader},
		{Header: someHeader, Sum: &Sum{Length: 5, Checksum: "xxh64:a", Stored: 5, StoredChecksum: "xxh64:a"}},
		{Header: secretHeader()},
		{Header: secretHeader(), Sum: &Sum{Length: 5, Checksum: "xxh64:a", Stored: 5, StoredChecksum: "xxh64:a"}},
		{Header: secretHeader(), Sum: &Sum{Length: 9, Compression: "zstd", Encryption: "age", Stored: 5, StoredChecksum: "xxh64:b"}},
		{Header: someHeader, Sum: &Sum{Length: 9, Checksum: "xxh64:a", Compression: "zstd", Stored: 5, StoredChecksum: "xxh64:b"}},
	} {
		block, err := want.encode()
		if err != nil {
			t.Fatal(err)
		}
		got, err := parseHeader(block)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("header changed (-wrote +read):\n%s", diff)
		}
	}
}

func TestHeaderTooLong(t *testing.T) {
	h := someHeader
	h.VM = strings.Repeat("x", HeaderSize)
	if _, err := (record{Header: h}).encode(); err == nil {
		t.Error("a header that does not fit was encoded")
	}
}

// sealed makes a block around a body, with the right CRC.
func sealed(version, n uint32, body string) []byte {
	block := make([]byte, HeaderSize)
	copy(block, headerMagic)
	binary.LittleEndian.PutUint32(block[8:], version)
	binary.LittleEndian.PutUint32(block[12:], n)
	copy(block[headerFixed:headerCRC], body)
	binary.LittleEndian.PutUint32(block[headerCRC:], crc32.Checksum(block[:headerCRC], castagnoli))
	return block
}

func TestParseHeaderRefuses(t *testing.T) {
	whole := func(body string) []byte { return sealed(versionPlain, uint32(len(body)), body) }
	secret := func(sum string) []byte {
		body := `{"recipient":"` + someKey().Recipient() + `","sum":{` + sum + `}}`
		return sealed(versionEncrypted, uint32(len(body)), body)
	}
	flipped := sealed(1, 2, "{}")
	flipped[2000] ^= 1
	for _, tt := range []struct {
		name  string
		block []byte
		want  error
	}{
		{"empty", nil, ErrNotMemory},
		{"short", []byte(headerMagic), ErrNotMemory},
		{"another's", make([]byte, HeaderSize), ErrNotMemory},
		{"a bit in the padding", flipped, ErrAltered},
		{"next version", sealed(3, 2, "{}"), ErrUnknownVersion},
		{"encrypted to nobody", sealed(2, 2, "{}"), ErrAltered},
		{"a recipient in version 1", whole(`{"recipient":"` + someKey().Recipient() + `"}`), ErrAltered},
		{"encrypted in version 1", whole(`{"sum":{"encryption":"age"}}`), ErrAltered},
		{"no recipient of age", sealed(2, 19, `{"recipient":"bob"}`), ErrAltered},
		{"unknown encryption", secret(`"encryption":"rot13"`), ErrAltered},
		{"a checksum of what is hidden", secret(`"encryption":"age","checksum":"xxh64:1"`), ErrAltered},
		{"compressed before it was encrypted", secret(`"compression":"zstd"`), ErrAltered},
		{"version 0", sealed(0, 2, "{}"), ErrUnknownVersion},
		{"length beyond the block", sealed(1, HeaderSize, "{}"), ErrAltered},
		{"greatest length", sealed(1, 1<<32-1, "{}"), ErrAltered},
		{"no record", sealed(1, 0, ""), ErrAltered},
		{"no JSON", whole("abc"), ErrAltered},
		{"unknown field", whole(`{"new":1}`), ErrAltered},
		{"two records", whole("{}{}"), ErrAltered},
		{"length that overflows", whole(`{"sum":{"length":9223372036854775807,"stored":9223372036854775807}}`), ErrAltered},
		{"unknown compression", whole(`{"sum":{"compression":"xz"}}`), ErrAltered},
		{"plain with two lengths", whole(`{"sum":{"length":1,"stored":2}}`), ErrAltered},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := parseHeader(tt.block); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}

// FuzzParseHeader gives the parser blocks whose CRC is right. What it accepts
// it must write in a form that means the same.
func FuzzParseHeader(f *testing.F) {
	f.Add(uint32(1), uint32(2), "{}")
	f.Add(uint32(1), uint32(1<<31), "{}")
	block, err := record{Header: someHeader, Sum: &Sum{Compression: "zstd"}}.encode()
	if err != nil {
		f.Fatal(err)
	}
	n := binary.LittleEndian.Uint32(block[12:])
	f.Add(uint32(1), n, string(block[headerFixed:headerFixed+n]))
	block, err = record{Header: secretHeader(), Sum: &Sum{Encryption: "age"}}.encode()
	if err != nil {
		f.Fatal(err)
	}
	n = binary.LittleEndian.Uint32(block[12:])
	f.Add(uint32(2), n, string(block[headerFixed:headerFixed+n]))
	f.Fuzz(func(t *testing.T, version, n uint32, body string) {
		r, err := parseHeader(sealed(version, n, body))
		if err != nil {
			if !errors.Is(err, ErrAltered) && !errors.Is(err, ErrUnknownVersion) {
				t.Fatalf("untyped error: %v", err)
			}
			return
		}
		block, err := r.encode()
		if err != nil {
			return // JSON that was read may be longer when it is written
		}
		again, err := parseHeader(block)
		if err != nil {
			t.Fatalf("%+v cannot be read again: %v", r, err)
		}
		if diff := cmp.Diff(r, again); diff != "" {
			t.Fatalf("header changed:\n%s", diff)
		}
	})
}
