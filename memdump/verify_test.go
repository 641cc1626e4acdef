package memdump

import (
	"context"
	"errors"
	"os"
	"testing"
)

// forms calls test with a complete file in each form that there is.
func forms(t *testing.T, data []byte, test func(t *testing.T, root *os.Root, sum Sum)) {
	t.Helper()
	for _, form := range []string{"plain", "zstd"} {
		t.Run(form, func(t *testing.T) {
			root := openRoot(t, t.TempDir())
			sum := finished(t, root, "m", data)
			if form == "zstd" {
				var err error
				if sum, err = Compress(t.Context(), root, "m", nil); err != nil {
					t.Fatal(err)
				}
			}
			test(t, root, sum)
		})
	}
}

// altered changes a file's bytes, and changes them back after test.
func altered(t *testing.T, root *os.Root, at int64, mask byte, test func()) {
	t.Helper()
	file, err := root.OpenFile("m", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close() //nolint:errcheck // a descriptor of the test
	b := make([]byte, 1)
	for _, step := range []func(){test, func() {}} {
		if _, err := file.ReadAt(b, at); err != nil {
			t.Fatal(err)
		}
		b[0] ^= mask
		if _, err := file.WriteAt(b, at); err != nil {
			t.Fatal(err)
		}
		step()
	}
}

func TestVerifyFindsAnyAlteredBit(t *testing.T) {
	forms(t, pattern(300<<10+7), func(t *testing.T, root *os.Root, sum Sum) {
		size := HeaderSize + int64(sum.Stored)
		places := []int64{0, 7, 8, 11, 12, 15, 16, 100, 2000, headerCRC, HeaderSize - 1}
		for at := int64(HeaderSize); at < size-20; at += size / 40 {
			places = append(places, at)
		}
		for back := int64(1); back <= 20; back++ {
			places = append(places, size-back)
		}
		for _, at := range places {
			for _, mask := range []byte{1, 0x80} {
				altered(t, root, at, mask, func() {
					_, _, err := Verify(t.Context(), root, "m", nil, nil)
					want := ErrAltered
					if at < int64(len(headerMagic)) {
						want = ErrNotMemory
					}
					if !errors.Is(err, want) {
						t.Errorf("byte %d altered by %#x: %v, want %v", at, mask, err, want)
					}
				})
			}
		}
		if _, got, err := Verify(t.Context(), root, "m", nil, nil); err != nil || got != sum {
			t.Errorf("put back: %+v, %v", got, err)
		}
	})
}

func TestVerifyLength(t *testing.T) {
	forms(t, pattern(100<<10), func(t *testing.T, root *os.Root, sum Sum) {
		path := root.Name() + "/m"
		size := HeaderSize + int64(sum.Stored)
		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, tt := range []struct {
			size int64
			want error
		}{
			{size - 1, ErrTruncated}, {HeaderSize + 1, ErrTruncated}, {HeaderSize, ErrTruncated},
			{HeaderSize - 1, ErrTruncated}, {8, ErrTruncated}, {7, ErrNotMemory}, {0, ErrNotMemory},
			{size + 1, ErrAltered}, {size + HeaderSize, ErrAltered},
		} {
			if err := errors.Join(os.WriteFile(path, whole, 0o600), os.Truncate(path, tt.size)); err != nil {
				t.Fatal(err)
			}
			if _, _, err := Verify(t.Context(), root, "m", nil, nil); !errors.Is(err, tt.want) {
				t.Errorf("%d bytes of %d: %v, want %v", tt.size, size, err, tt.want)
			}
		}
	})
}

// Records that are well made and do not agree with what is stored.
func TestVerifyRecord(t *testing.T) {
	forms(t, pattern(100<<10), func(t *testing.T, root *os.Root, sum Sum) {
		for name, change := range map[string]func(*Sum){
			"stream checksum": func(s *Sum) { s.Checksum = digestOf(nil) },
			"stored checksum": func(s *Sum) { s.StoredChecksum = digestOf(nil) },
			"no checksum":     func(s *Sum) { s.Checksum, s.StoredChecksum = "", "" },
			"longer":          func(s *Sum) { s.Length++ },
			"shorter":         func(s *Sum) { s.Length-- },
			"other form":      func(s *Sum) { *s = otherForm(*s) },
		} {
			changed := sum
			change(&changed)
			file, err := root.OpenFile("m", os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(writeRecord(file, record{Header: someHeader, Sum: &changed}), file.Close()); err != nil {
				t.Fatal(err)
			}
			if _, _, err := Verify(t.Context(), root, "m", nil, nil); !errors.Is(err, ErrAltered) {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
}

func otherForm(s Sum) Sum {
	if s.Compression == "" {
		s.Compression = compressionZstd
		return s
	}
	return Sum{Length: s.Stored, Checksum: s.Checksum, Stored: s.Stored, StoredChecksum: s.Checksum}
}

func TestVerifyProgress(t *testing.T) {
	forms(t, pattern(3<<20), func(t *testing.T, root *os.Root, sum Sum) {
		var last, calls uint64
		_, _, err := Verify(t.Context(), root, "m", nil, func(done, total uint64) {
			if done < last || total != sum.Stored {
				t.Errorf("progress %d of %d after %d", done, total, last)
			}
			last, calls = done, calls+1
		})
		if err != nil || last != sum.Stored || calls < 2 {
			t.Errorf("ended at %d of %d after %d calls, %v", last, sum.Stored, calls, err)
		}
	})
}

func TestVerifyCancelled(t *testing.T) {
	forms(t, pattern(3<<20), func(t *testing.T, root *os.Root, sum Sum) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		_, _, err := Verify(ctx, root, "m", nil, func(uint64, uint64) { cancel() })
		if !errors.Is(err, context.Canceled) || errors.Is(err, ErrAltered) {
			t.Errorf("got %v", err)
		}
	})
}
