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
