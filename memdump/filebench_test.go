package memdump

import (
	"context"
	"io"
	"os"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// benchSize is how long the streams of the benchmarks are. More than what a
// disk's cache takes is what counts: set VMSNAP_BENCH_DIR to a directory on the
// disk in question.
const benchSize = 2 << 30

func benchRoot(b *testing.B) *os.Root {
	dir := b.TempDir()
	if d := os.Getenv("VMSNAP_BENCH_DIR"); d != "" {
		var err error
		if dir, err = os.MkdirTemp(d, "memfile"); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = os.RemoveAll(dir) })
	}
	return openRoot(b, dir)
}

// BenchmarkSave writes a stream as fast as the kernel takes it and makes it
// durable: with space reserved or not, followed or only finished.
func BenchmarkSave(b *testing.B) {
	for _, bb := range []struct {
		name    string
		reserve uint64
		follow  bool
	}{
		{"reserved,followed", benchSize, true},
		{"reserved", benchSize, false},
		{"followed", 0, true},
		{"plain", 0, false},
	} {
		b.Run(bb.name, func(b *testing.B) {
			root, src := benchRoot(b), pattern(64<<20)
			var writing, resident float64
			b.SetBytes(benchSize)
			for b.Loop() {
				f, err := Create(root, "m", Header{}, bb.reserve)
				if err != nil {
					b.Fatal(err)
				}
				ctx, stop := context.WithCancel(b.Context())
				followed := make(chan error, 1)
				go func() {
					if bb.follow {
						followed <- f.Follow(ctx)
						return
					}
					followed <- nil
				}()
				began := time.Now()
				for n := 0; n < benchSize; n += 256 << 10 {
					at := n % len(src)
					if _, err := f.Target().Write(src[at : at+256<<10]); err != nil {
						b.Fatal(err)
					}
				}
				writing += time.Since(began).Seconds()
				stop()
				if err := <-followed; err != nil {
					b.Fatal(err)
				}
				if _, err := f.Finish(b.Context()); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				resident += float64(residentBytes(b, root, "m"))
				if err := Remove(root, "m"); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
			b.ReportMetric(benchSize*float64(b.N)/1e6/writing, "written-MB/s")
			b.ReportMetric(resident/float64(b.N)/(1<<20), "cached-MiB")
		})
	}
}

func BenchmarkVerify(b *testing.B) {
	root := benchRoot(b)
	finished(b, root, "m", pattern(512<<20))
	for _, form := range []string{"plain", "zstd"} {
		b.Run(form, func(b *testing.B) {
			if form == "zstd" {
				if _, err := Compress(b.Context(), root, "m", nil); err != nil {
					b.Fatal(err)
				}
			}
			b.SetBytes(512 << 20)
			for b.Loop() {
				if _, _, err := Verify(b.Context(), root, "m", nil, nil); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkCompress(b *testing.B) {
	root, data := benchRoot(b), pattern(512<<20)
	b.SetBytes(int64(len(data)))
	var stored uint64
	for b.Loop() {
		b.StopTimer()
		if err := Remove(root, "m"); err != nil {
			b.Fatal(err)
		}
		finished(b, root, "m", data)
		b.StartTimer()
		sum, err := Compress(b.Context(), root, "m", nil)
		if err != nil {
			b.Fatal(err)
		}
		stored = sum.Stored
	}
	b.ReportMetric(100*float64(stored)/float64(len(data)), "%size")
}

func BenchmarkDigest(b *testing.B) {
	d, data := newDigest(), pattern(piece)
	b.SetBytes(piece)
	for b.Loop() {
		if _, err := d.Write(data); err != nil {
			b.Fatal(err)
		}
	}
}

// residentBytes tells how much of a file the page cache holds.
func residentBytes(tb testing.TB, root *os.Root, name string) int64 {
	tb.Helper()
	file, err := root.Open(name)
	if err != nil {
		tb.Fatal(err)
	}
	defer file.Close() //nolint:errcheck // a descriptor of the test
	size, err := file.Seek(0, io.SeekEnd)
	if err != nil {
		tb.Fatal(err)
	}
	m, err := unix.Mmap(int(file.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		tb.Fatal(err)
	}
	defer unix.Munmap(m) //nolint:errcheck // a test's mapping
	pages := make([]byte, (len(m)+4095)/4096)
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m[0])), uintptr(len(m)), uintptr(unsafe.Pointer(&pages[0]))); errno != 0 {
		tb.Fatal(errno)
	}
	var n int64
	for _, p := range pages {
		n += int64(p&1) * 4096
	}
	return n
}
