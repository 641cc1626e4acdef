package memdump

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

func opened(ctx context.Context, t *testing.T, root *os.Root) *Stream {
	t.Helper()
	s, err := OpenStream(ctx, root, "m", nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// Another process reads the stream from the descriptor that it is given.
func TestOpenStream(t *testing.T) {
	data := pattern(3*holdBack + 99)
	forms(t, data, func(t *testing.T, root *os.Root, sum Sum) {
		ctx := followContext(t)
		s := opened(ctx, t, root)
		if s.Header != someHeader || s.Sum != sum {
			t.Errorf("got %+v %+v", s.Header, s.Sum)
		}
		var got bytes.Buffer
		reader := exec.CommandContext(ctx, "cat")
		reader.Stdin, reader.Stdout = s.File, &got
		if err := reader.Start(); err != nil {
			t.Fatal(err)
		}
		if err := s.Release(); err != nil {
			t.Error(err)
		}
		if err := errors.Join(reader.Wait(), s.Wait(ctx), s.Close()); err != nil {
			t.Error(err)
		}
		if !bytes.Equal(got.Bytes(), data) {
			t.Errorf("%d bytes came, not the %d that were saved", got.Len(), len(data))
		}
	})
}

// The end of an altered stream never comes, so that no load of it succeeds.
func TestOpenStreamHoldsBack(t *testing.T) {
	const mayLack = 1 << 20 // more than the description of a VM's devices takes
	data := pattern(12 << 20)
	root := openRoot(t, t.TempDir())
	finished(t, root, "m", data)
	sum, err := Compress(t.Context(), root, "m", nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []int64{HeaderSize, HeaderSize + int64(sum.Stored)/2, HeaderSize + int64(sum.Stored) - 1} {
		altered(t, root, at, 4, func() {
			s := opened(followContext(t), t, root)
			got, err := io.ReadAll(s.File)
			if err != nil {
				t.Fatal(err)
			}
			if len(got) > len(data)-mayLack {
				t.Errorf("byte %d altered: %d bytes of %d came", at, len(got), len(data))
			}
			if err := s.Wait(t.Context()); !errors.Is(err, ErrAltered) {
				t.Errorf("byte %d altered: %v", at, err)
			}
		})
	}
}

func TestOpenStreamCancelled(t *testing.T) {
	root := openRoot(t, t.TempDir())
	finished(t, root, "m", pattern(3*holdBack))
	if _, err := Compress(t.Context(), root, "m", nil); err != nil {
		t.Fatal(err)
	}
	for name, end := range map[string]func(*Stream, context.CancelFunc) error{
		"context":     func(_ *Stream, cancel context.CancelFunc) error { cancel(); return nil },
		"close":       func(s *Stream, _ context.CancelFunc) error { return s.Close() },
		"reader gone": func(s *Stream, _ context.CancelFunc) error { return s.Release() },
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(followContext(t))
			defer cancel()
			s := opened(ctx, t, root)
			// The pipe is full: the writer waits for a reader that does not read.
			full(t, s.File)
			if err := end(s, cancel); err != nil {
				t.Error(err)
			}
			err := s.Wait(t.Context())
			if !errors.Is(err, context.Canceled) && !errors.Is(err, unix.EPIPE) || errors.Is(err, ErrAltered) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// full waits until a pipe is full.
func full(t *testing.T, pipe *os.File) {
	t.Helper()
	raw, err := pipe.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	until(followContext(t), t, "the pipe is full", func() bool {
		var queued, size int
		err := raw.Control(func(fd uintptr) {
			queued, _ = unix.IoctlGetInt(int(fd), unix.TIOCINQ)
			size, _ = unix.FcntlInt(fd, unix.F_GETPIPE_SZ, 0)
		})
		return err == nil && size > 0 && queued == size
	})
}

func TestOpenStreamIncomplete(t *testing.T) {
	root := openRoot(t, t.TempDir())
	created(t, root, "m", 0)
	if _, err := OpenStream(t.Context(), root, "m", nil); !errors.Is(err, ErrIncomplete) {
		t.Errorf("got %v", err)
	}
}

// FuzzCompressedStream decompresses what no vmsnap wrote, under a header that
// fits it. Nothing but exactly the recorded length may come out, in bounded
// time and memory.
func FuzzCompressedStream(f *testing.F) {
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		f.Fatal(err)
	}
	good := enc.EncodeAll(pattern(9000), nil)
	f.Add(good, uint32(9000))
	f.Add(append(good, good...), uint32(18000))
	f.Add(append(good, "garbage"...), uint32(9000))
	f.Add(enc.EncodeAll(make([]byte, 1<<20), nil), uint32(1000))                     // much longer than recorded
	f.Add([]byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xf8, 0x01, 0x00, 0x00}, uint32(100)) // a window of 2^41
	root := openRoot(f, f.TempDir())
	f.Fuzz(func(t *testing.T, stored []byte, length uint32) {
		length %= 4 << 20
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		dec, err := zstd.NewReader(bytes.NewReader(stored), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(zstdLimit))
		if err != nil {
			t.Fatal(err)
		}
		defer dec.Close()
		want, wantErr := io.ReadAll(io.LimitReader(dec, int64(length)+1))
		sum := Sum{Length: uint64(length), Checksum: digestOf(want), Compression: compressionZstd,
			Stored: uint64(len(stored)), StoredChecksum: digestOf(stored)}
		block, err := record{Sum: &sum}.encode()
		if err != nil {
			t.Fatal(err)
		}
		if err := root.WriteFile("m", append(block, stored...), 0o600); err != nil {
			t.Fatal(err)
		}
		_, _, err = Verify(ctx, root, "m", nil, nil)
		if valid := wantErr == nil && len(want) == int(length); valid != (err == nil) || err != nil && !errors.Is(err, ErrAltered) {
			t.Fatalf("%d bytes that make %d of %d (%v): %v", len(stored), len(want), length, wantErr, err)
		}
	})
}
