package blockdev

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// img runs the real qemu-img.
func img(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img %v: %v\n%s", args, err, out)
	}
}

func TestReadHeaderOfRealImages(t *testing.T) {
	dir := t.TempDir()
	base, top := filepath.Join(dir, "base.raw"), filepath.Join(dir, "top.qcow2")
	img(t, "create", "-q", "-f", "raw", base, "3M")
	img(t, "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top)
	h, err := ReadHeaderFile(top)
	if err != nil {
		t.Fatal(err)
	}
	if h.Version != 3 || h.VirtualSize != 3<<20 || h.Backing != base || h.BackingFormat != "raw" || h.Dirty || h.Corrupt {
		t.Errorf("header %+v", h)
	}
	if empty, err := IsEmpty(top); err != nil || !empty {
		t.Errorf("a new overlay: empty %v, %v", empty, err)
	}
	if out, err := exec.Command("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", top).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if empty, err := IsEmpty(top); err != nil || empty {
		t.Errorf("an overlay that was written to: empty %v, %v", empty, err)
	}
	if _, err := ReadHeaderFile(base); !errors.Is(err, ErrNotQcow2) {
		t.Errorf("a raw image: %v", err)
	}
}

func TestReadHeaderRefuses(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.qcow2")
	img(t, "create", "-q", "-f", "qcow2", path, "1M")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	backed := func(name string) func([]byte) {
		return func(b []byte) {
			copy(b[0x300:], name)
			binary.BigEndian.PutUint64(b[8:], 0x300)
			binary.BigEndian.PutUint32(b[16:], uint32(len(name)))
		}
	}
	for name, change := range map[string]func(b []byte){
		"data file":            func(b []byte) { b[79] |= incompatDataFile },
		"unknown feature":      func(b []byte) { b[72] |= 0x80 },
		"version":              func(b []byte) { b[7] = 9 },
		"cluster size":         func(b []byte) { b[23] = 63 },
		"header length":        func(b []byte) { binary.BigEndian.PutUint32(b[100:], 1<<30) },
		"l1 size":              func(b []byte) { binary.BigEndian.PutUint32(b[36:], 1<<31) },
		"json backing":         backed(`json:{"driver":"file","filename":"/etc/shadow"}`),
		"protocol backing":     backed("nbd://example/x"),
		"control characters":   backed("a\nb"),
		"backing beyond start": func(b []byte) { binary.BigEndian.PutUint64(b[8:], 1<<40); b[19] = 4 },
		"long backing": func(b []byte) {
			binary.BigEndian.PutUint64(b[8:], 0x300)
			binary.BigEndian.PutUint32(b[16:], 5000)
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := bytes.Clone(good)
			change(b)
			if h, err := ReadHeader(bytes.NewReader(b)); !errors.Is(err, ErrRefusedImage) {
				t.Errorf("accepted as %+v: %v", h, err)
			}
		})
	}
	fifo := filepath.Join(dir, "fifo")
	if out, err := exec.Command("mkfifo", fifo).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	if _, err := ReadHeaderFile(fifo); !errors.Is(err, ErrRefusedImage) {
		t.Errorf("a FIFO: %v", err)
	}
}

func FuzzReadHeader(f *testing.F) {
	dir := f.TempDir()
	for i, args := range [][]string{
		{"create", "-q", "-f", "qcow2", "x", "1M"},
		{"create", "-q", "-f", "qcow2", "-u", "-b", "/some/base.qcow2", "-F", "qcow2", "x", "1M"},
		{"create", "-q", "-f", "qcow2", "-o", "compat=0.10", "x", "1M"},
	} {
		cmd := exec.Command("qemu-img", args...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			f.Fatalf("%d: %v %s", i, err, out)
		}
		b, err := os.ReadFile(filepath.Join(dir, "x"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b[:4096])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := ReadHeader(bytes.NewReader(b))
		if err != nil {
			return
		}
		if len(h.Backing) > maxBackingName || CheckBackingName(h.Backing) != nil {
			t.Errorf("backing name %q", h.Backing)
		}
		if h.BackingFormat != "" && h.BackingFormat != "raw" && h.BackingFormat != "qcow2" {
			t.Errorf("backing format %q", h.BackingFormat)
		}
		_, _ = h.Empty(bytes.NewReader(b)) // must end, whatever the header claims
	})
}

// overlayHeader returns the first cluster of an overlay as QEMU writes it.
func overlayHeader(t testing.TB) *bytes.Reader {
	b := make([]byte, 64<<10)
	be := binary.BigEndian
	be.PutUint32(b[0:], qcow2Magic)
	be.PutUint32(b[4:], 3)
	const name = "/srv/vm/web/root.7f3a0c11-0b.qcow2"
	at := headerV3 + 8
	extension := func(kind uint32, data string) {
		be.PutUint32(b[at:], kind)
		be.PutUint32(b[at+4:], uint32(len(data)))
		copy(b[at+8:], data)
		at += 8 + (len(data)+7)&^7
	}
	extension(extBackingFormat, "qcow2")
	extension(0x6803f857, string(make([]byte, 384))) // feature name table
	extension(extEnd, "")
	be.PutUint64(b[8:], uint64(at))
	be.PutUint32(b[16:], uint32(len(name)))
	copy(b[at:], name)
	be.PutUint32(b[20:], 16)
	be.PutUint64(b[24:], 64<<30)
	be.PutUint32(b[100:], headerV3+8)
	r := bytes.NewReader(b)
	if h, err := ReadHeader(r); err != nil || h.Backing != name || h.BackingFormat != "qcow2" {
		t.Fatalf("header %+v, %v", h, err)
	}
	return r
}

// maxHeaderAllocs: the header's bytes, each extension's head, and the names.
const maxHeaderAllocs = 10

// TestReadHeaderAllocates: before a merge the headers of all images in the
// directories are read.
func TestReadHeaderAllocates(t *testing.T) {
	r := overlayHeader(t)
	n := testing.AllocsPerRun(100, func() {
		if _, err := ReadHeader(r); err != nil {
			t.Fatal(err)
		}
	})
	if n > maxHeaderAllocs {
		t.Errorf("a header allocates %g times, over %d", n, maxHeaderAllocs)
	}
}

func BenchmarkReadHeader(b *testing.B) {
	r := overlayHeader(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ReadHeader(r); err != nil {
			b.Fatal(err)
		}
	}
}
