package memdump

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func openRoot(tb testing.TB, dir string) *os.Root {
	tb.Helper()
	root, err := os.OpenRoot(dir)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = root.Close() })
	return root
}

// mounted mounts a file system of memory at a new directory.
func mounted(t *testing.T, fstype, options string) *os.Root {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount(fstype, dir, fstype, 0, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return openRoot(t, dir)
}

// pattern makes data that compresses about as well as a guest's memory: every
// other page is noise.
func pattern(n int) []byte {
	b := make([]byte, n)
	noise := rand.NewChaCha8([32]byte{1})
	for at := 0; at < n; at += 8192 {
		_, _ = noise.Read(b[at:min(at+4096, n)])
		for i := at + 4096; i < min(at+8192, n); i++ {
			b[i] = byte(at >> 13)
		}
	}
	return b
}

func digestOf(b []byte) string {
	d := newDigest()
	d.add(b)
	return d.String()
}

// created makes an incomplete memory file.
func created(tb testing.TB, root *os.Root, name string, reserve int) *File {
	tb.Helper()
	f, err := Create(root, name, someHeader, uint64(reserve))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = f.Close() })
	return f
}

// finished makes a complete memory file that holds data.
func finished(tb testing.TB, root *os.Root, name string, data []byte) Sum {
	tb.Helper()
	f := created(tb, root, name, len(data))
	if _, err := f.Target().Write(data); err != nil {
		tb.Fatal(err)
	}
	sum, err := f.Finish(tb.Context())
	if err != nil {
		tb.Fatal(err)
	}
	return sum
}

// names lists a directory.
func names(tb testing.TB, root *os.Root) []string {
	tb.Helper()
	entries, err := os.ReadDir(root.Name())
	if err != nil {
		tb.Fatal(err)
	}
	var list []string
	for _, e := range entries {
		list = append(list, e.Name())
	}
	return list
}

func stat(tb testing.TB, root *os.Root, name string) *syscall.Stat_t {
	tb.Helper()
	fi, err := root.Lstat(name)
	if err != nil {
		tb.Fatal(err)
	}
	return fi.Sys().(*syscall.Stat_t)
}

func TestCreate(t *testing.T) {
	defer unix.Umask(unix.Umask(0o777)) // nothing is left of a mode but what is set
	root := openRoot(t, t.TempDir())
	const reserve = 3 << 20
	f := created(t, root, "m", reserve)
	st := stat(t, root, "m")
	if st.Mode&0o7777 != 0o600 {
		t.Errorf("mode is %o", st.Mode&0o7777)
	}
	if st.Size != HeaderSize || st.Blocks*512 < HeaderSize+reserve {
		t.Errorf("size %d with %d allocated, want %d and at least %d", st.Size, st.Blocks*512, HeaderSize, HeaderSize+reserve)
	}
	if at, err := f.Target().Seek(0, io.SeekCurrent); err != nil || at != HeaderSize {
		t.Errorf("target is at %d, %v", at, err)
	}
	if _, err := f.Target().ReadAt(make([]byte, 1), 0); !errors.Is(err, unix.EBADF) {
		t.Errorf("QEMU could read the file: %v", err)
	}
	if h, _, err := Inspect(root, "m"); !errors.Is(err, ErrIncomplete) || h != someHeader {
		t.Errorf("got %+v, %v", h, err)
	}
	if n, err := f.Written(); n != 0 || err != nil {
		t.Errorf("%d bytes written, %v", n, err)
	}
}

func TestCreateRefuses(t *testing.T) {
	root := openRoot(t, t.TempDir())
	finished(t, root, "there", []byte("memory"))
	if err := root.Symlink("elsewhere", "link"); err != nil {
		t.Fatal(err)
	}
	before := names(t, root)
	for _, name := range []string{"there", "link"} {
		if _, err := Create(root, name, someHeader, 0); !errors.Is(err, os.ErrExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{"", ".", "..", "a/b", "../m", "/m"} {
		if _, err := Create(root, name, someHeader, 0); err == nil {
			t.Errorf("name %q was accepted", name)
		}
	}
	if _, err := Create(root, "m", Header{VM: string(make([]byte, HeaderSize))}, 0); err == nil {
		t.Error("a header that does not fit was accepted")
	}
	if after := names(t, root); len(after) != len(before) {
		t.Errorf("left behind: %v", after)
	}
	if _, _, err := Verify(t.Context(), root, "there", nil, nil); err != nil {
		t.Errorf("the file that was there: %v", err)
	}
}

func TestCreateWithoutSpace(t *testing.T) {
	for _, tt := range []struct {
		name    string
		options string
		reserve uint64
	}{
		{"for the stream", "size=1m", 2 << 20},
		{"for the header", "size=4k", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := mounted(t, "tmpfs", tt.options)
			if tt.reserve == 0 {
				if err := root.WriteFile("full", make([]byte, 4096), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			_, err := Create(root, "m", someHeader, tt.reserve)
			var space *SpaceError
			if !errors.As(err, &space) || !errors.Is(err, unix.ENOSPC) {
				t.Fatalf("got %v", err)
			}
			if space.Needed != HeaderSize+tt.reserve || space.Name != "m" || space.Free > 1<<20 {
				t.Errorf("got %+v", space)
			}
			if _, err := root.Lstat("m"); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the file was left: %v", err)
			}
		})
	}
}

func TestCreateWithoutReservation(t *testing.T) {
	root := mounted(t, "ramfs", "")
	if _, err := Create(root, "m", someHeader, 1<<20); !errors.Is(err, ErrNoReserve) {
		t.Fatalf("got %v", err)
	}
	if left := names(t, root); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	finishedWithout := created(t, root, "m", 0)
	if _, err := finishedWithout.Finish(t.Context()); err != nil {
		t.Errorf("without a reservation: %v", err)
	}
}

func TestFinish(t *testing.T) {
	for _, fs := range []string{"disk", "tmpfs"} {
		t.Run(fs, func(t *testing.T) {
			root := openRoot(t, t.TempDir())
			if fs == "tmpfs" {
				root = mounted(t, "tmpfs", "size=64m")
			}
			data := pattern(5<<20 + 123)
			f := created(t, root, "m", 40<<20)
			if _, err := f.Target().Write(data); err != nil {
				t.Fatal(err)
			}
			if n, err := f.Written(); n != uint64(len(data)) || err != nil {
				t.Errorf("%d bytes written, %v", n, err)
			}
			sum, err := f.Finish(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			check := digestOf(data)
			want := Sum{Length: uint64(len(data)), Checksum: check, Stored: uint64(len(data)), StoredChecksum: check}
			if sum != want {
				t.Errorf("got %+v, want %+v", sum, want)
			}
			st := stat(t, root, "m")
			if st.Size != HeaderSize+int64(len(data)) || st.Blocks*512 > st.Size+1<<20 {
				t.Errorf("size %d with %d allocated after %d bytes", st.Size, st.Blocks*512, len(data))
			}
			if h, got, err := Verify(t.Context(), root, "m", nil, nil); h != someHeader || got != want || err != nil {
				t.Errorf("verified %+v %+v, %v", h, got, err)
			}
		})
	}
}

func TestReopen(t *testing.T) {
	root := openRoot(t, t.TempDir())
	data := pattern(3 << 20)
	first := created(t, root, "m", 4<<20)
	if _, err := first.Target().Write(data[:1<<20]); err != nil {
		t.Fatal(err)
	}
	f, err := Reopen(root, "m")
	if err != nil {
		t.Fatal(err)
	}
	if f.Header() != someHeader || f.Target() != nil {
		t.Errorf("got %+v, target %v", f.Header(), f.Target())
	}
	// QEMU writes on with the descriptor that it has.
	if _, err := first.Target().Write(data[1<<20:]); err != nil {
		t.Fatal(err)
	}
	sum, err := f.Finish(t.Context())
	if err != nil || sum.Checksum != digestOf(data) {
		t.Errorf("got %+v, %v", sum, err)
	}
	if _, err := Reopen(root, "m"); err == nil {
		t.Error("a complete file was reopened")
	}
}

func TestDiscard(t *testing.T) {
	root := openRoot(t, t.TempDir())
	f := created(t, root, "m", 1<<20)
	if err := root.WriteFile(compressName("m"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := f.Discard(); err != nil {
		t.Fatal(err)
	}
	if left := names(t, root); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if err := f.Discard(); err != nil {
		t.Errorf("a second time: %v", err)
	}
}

// meddler writes to the file whenever it is asked if it has ended.
type meddler struct {
	context.Context
	file *os.File
}

func (m meddler) Err() error {
	_, err := m.file.Write([]byte("more"))
	return err
}

func TestFinishWhileWritten(t *testing.T) {
	root := openRoot(t, t.TempDir())
	f := created(t, root, "m", 0)
	if _, err := f.Target().Write([]byte("memory")); err != nil {
		t.Fatal(err)
	}
	if sum, err := f.Finish(meddler{t.Context(), f.Target()}); err == nil {
		t.Errorf("a stream that grew was finished: %+v", sum)
	}
	if _, _, err := Inspect(root, "m"); !errors.Is(err, ErrIncomplete) {
		t.Errorf("got %v", err)
	}
}

func TestFinishCancelled(t *testing.T) {
	root := openRoot(t, t.TempDir())
	f := created(t, root, "m", 0)
	if _, err := f.Target().Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := f.Finish(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if _, _, err := Inspect(root, "m"); !errors.Is(err, ErrIncomplete) {
		t.Errorf("got %v", err)
	}
	if _, err := f.Finish(t.Context()); err != nil {
		t.Errorf("after the cancelled one: %v", err)
	}
}

// A file that failed to be written back must not be finished, although the
// kernel tells of the failure only once.
func TestFinishAfterWritebackFailed(t *testing.T) {
	root := openRoot(t, t.TempDir())
	f := created(t, root, "m", 0)
	if _, err := f.Target().Write(pattern(3 * window)); err != nil {
		t.Fatal(err)
	}
	file := f.follower.writeback.file
	r, w, err := os.Pipe() // which cannot be written back
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close() //nolint:errcheck // a pipe that nobody reads
	f.follower.writeback.file = w
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if err := f.Follow(ctx); !errors.Is(err, unix.ESPIPE) {
		t.Errorf("follow: %v", err)
	}
	f.follower.writeback.file = file
	if _, err := f.Finish(t.Context()); !errors.Is(err, unix.ESPIPE) {
		t.Errorf("finish: %v", err)
	}
	_ = w.Close()
}

func TestOpenRefusesWhatIsNoFile(t *testing.T) {
	dir := t.TempDir()
	root := openRoot(t, dir)
	finished(t, root, "m", []byte("memory"))
	path := filepath.Join(dir, "fifo")
	if err := errors.Join(root.Symlink("m", "link"), unix.Mkfifo(path, 0o600), root.Mkdir("dir", 0o700),
		root.WriteFile("empty", nil, 0o600), root.WriteFile("other", bytes.Repeat([]byte("x"), 2*HeaderSize), 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"link", "fifo", "dir", "empty", "other"} {
		t.Run(name, func(t *testing.T) {
			_, _, err := Inspect(root, name)
			_, _, verify := Verify(t.Context(), root, name, nil, nil)
			_, reopen := Reopen(root, name)
			_, compress := Compress(t.Context(), root, name, nil)
			_, open := OpenStream(t.Context(), root, name, nil)
			for _, err := range []error{err, verify, reopen, compress, open} {
				if !errors.Is(err, ErrNotMemory) {
					t.Errorf("got %v", err)
				}
			}
		})
	}
	if _, _, err := Inspect(root, "absent"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}
}
