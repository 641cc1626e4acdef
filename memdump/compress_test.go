package memdump

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"testing"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

func TestCompress(t *testing.T) {
	root := openRoot(t, t.TempDir())
	data := pattern(20 << 20)
	plain := finished(t, root, "m", data)
	if err := root.WriteFile(compressName("m"), []byte("a crash left this"), 0o600); err != nil {
		t.Fatal(err)
	}
	var last uint64
	sum, err := Compress(t.Context(), root, "m", func(done, total uint64) {
		if done < last || total != plain.Stored {
			t.Errorf("progress %d of %d after %d", done, total, last)
		}
		last = done
	})
	if err != nil || last != plain.Stored {
		t.Fatalf("progress ended at %d, %v", last, err)
	}
	if sum.Length != plain.Length || sum.Checksum != plain.Checksum || sum.Compression != "zstd" || sum.Stored >= plain.Stored*6/10 {
		t.Errorf("%+v became %+v", plain, sum)
	}
	st := stat(t, root, "m")
	if st.Size != HeaderSize+int64(sum.Stored) || st.Mode&0o7777 != 0o600 {
		t.Errorf("size %d, mode %o", st.Size, st.Mode&0o7777)
	}
	if h, got, err := Verify(t.Context(), root, "m", nil, nil); h != someHeader || got != sum || err != nil {
		t.Errorf("verified %+v %+v, %v", h, got, err)
	}
	if left := names(t, root); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
	again, err := Compress(t.Context(), root, "m", nil)
	if err != nil || again != sum || stat(t, root, "m").Ino != st.Ino {
		t.Errorf("a second time: %+v, %v", again, err)
	}
}

// unharmed finds the plain file alone and valid.
func unharmed(t *testing.T, root *os.Root, plain Sum) {
	t.Helper()
	if left := names(t, root); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
	if _, sum, err := Verify(t.Context(), root, "m", nil, nil); err != nil || sum != plain {
		t.Errorf("the plain file: %+v, %v", sum, err)
	}
}

func TestCompressCancelled(t *testing.T) {
	root := openRoot(t, t.TempDir())
	plain := finished(t, root, "m", pattern(10<<20))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	_, err := Compress(ctx, root, "m", func(done, total uint64) {
		if done > total/2 {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	unharmed(t, root, plain)
}

func TestCompressWithoutSpace(t *testing.T) {
	root := mounted(t, "tmpfs", "size=6m")
	plain := finished(t, root, "m", pattern(4<<20))
	_, err := Compress(t.Context(), root, "m", nil)
	var space *SpaceError
	if !errors.As(err, &space) || space.Needed != HeaderSize+plain.Length {
		t.Errorf("got %v", err)
	}
	unharmed(t, root, plain)
}

func TestCompressAltered(t *testing.T) {
	root := openRoot(t, t.TempDir())
	plain := finished(t, root, "m", pattern(4<<20))
	altered(t, root, HeaderSize+3<<20, 1, func() {
		if _, err := Compress(t.Context(), root, "m", nil); !errors.Is(err, ErrAltered) {
			t.Errorf("got %v", err)
		}
	})
	unharmed(t, root, plain)
}

// A file cannot have the decompressor take as much memory as it likes.
func TestDecompressRefusesLargeWindow(t *testing.T) {
	for window, refused := range map[int]bool{zstdWindow: false, zstdLimit: false, 2 * zstdLimit: true} {
		var stored bytes.Buffer
		enc, err := zstd.NewWriter(&stored, zstd.WithWindowSize(window))
		if err != nil {
			t.Fatal(err)
		}
		_, err = enc.Write(make([]byte, 3*window))
		if err := errors.Join(err, enc.Close()); err != nil {
			t.Fatal(err)
		}
		if err := decompress(io.Discard, &stored); errors.Is(err, zstd.ErrWindowSizeExceeded) != refused {
			t.Errorf("window of %d bytes: %v", window, err)
		}
	}
}

// compressAndHang is what the test binary does when it is to be killed: it
// compresses m in the current directory, and half way it waits.
func compressAndHang() {
	root, err := os.OpenRoot(".")
	if err != nil {
		panic(err)
	}
	_, err = Compress(context.Background(), root, "m", func(done, total uint64) {
		if done > total/2 {
			_, _ = os.Stdout.WriteString("half way\n")
			_, _ = io.Copy(io.Discard, os.Stdin)
		}
	})
	panic(err)
}

func TestCompressKilled(t *testing.T) {
	dir := t.TempDir()
	root := openRoot(t, dir)
	plain := finished(t, root, "m", pattern(16<<20))
	cmd := exec.CommandContext(followContext(t), os.Args[0], "compress-and-hang")
	cmd.Dir, cmd.Stderr = dir, os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close() //nolint:errcheck // the process is gone by then
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, len("half way\n"))); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it was killed
	if stat(t, root, compressName("m")).Size <= HeaderSize {
		t.Error("it was killed before it had written anything")
	}
	if _, sum, err := Verify(t.Context(), root, "m", nil, nil); err != nil || sum != plain {
		t.Errorf("the plain file: %+v, %v", sum, err)
	}
	if _, err := Compress(t.Context(), root, "m", nil); err != nil {
		t.Errorf("after the killed one: %v", err)
	}
	if left := names(t, root); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
}
