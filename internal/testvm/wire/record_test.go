package wire_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm/wire"
)

// ring returns a ring after writes 1 to n.
func ring(n uint64) []byte {
	b := make([]byte, wire.RingSize)
	for i := uint64(1); i <= n; i++ {
		wire.PutRecord(b[wire.Offset(i):][:wire.RecordSize], i)
	}
	return b
}

func TestScanRing(t *testing.T) {
	for _, test := range []struct {
		name    string
		written uint64
		damage  func([]byte)
		want    uint64
		broken  bool
	}{
		{name: "new"},
		{name: "one", written: 1, want: 1},
		{name: "almost full", written: wire.Slots - 1, want: wire.Slots - 1},
		{name: "full", written: wire.Slots, want: wire.Slots},
		{name: "around", written: 3*wire.Slots + 7, want: 3*wire.Slots + 7},
		{name: "first lost", written: 9, broken: true, damage: func(b []byte) {
			clear(b[wire.Offset(1):][:wire.RecordSize])
		}},
		{name: "one lost, its slot as it was before", written: wire.Slots + 9, broken: true, damage: func(b []byte) {
			wire.PutRecord(b[wire.Offset(5):][:wire.RecordSize], 5)
		}},
		{name: "last lost", written: wire.Slots + 9, want: wire.Slots + 8, damage: func(b []byte) {
			wire.PutRecord(b[wire.Offset(9):][:wire.RecordSize], 9)
		}},
		{name: "torn", written: 9, broken: true, damage: func(b []byte) {
			clear(b[wire.Offset(4)+512:][:512])
		}},
		{name: "misplaced", written: 9, broken: true, damage: func(b []byte) {
			wire.PutRecord(b[wire.Offset(20):][:wire.RecordSize], 21)
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := ring(test.written)
			if test.damage != nil {
				test.damage(b)
			}
			got, err := wire.ScanRing(bytes.NewReader(b))
			if errors.Is(err, wire.ErrBroken) != test.broken || err != nil && !test.broken || got != test.want {
				t.Errorf("ScanRing = %d, %v", got, err)
			}
		})
	}
	if _, err := wire.ScanRing(bytes.NewReader(ring(1)[:wire.RingSize-1])); err == nil || errors.Is(err, wire.ErrBroken) {
		t.Errorf("ScanRing of a short file: %v", err)
	}
}
