package blockdev

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"iter"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// mapped is what qemu-img says of the data that one image holds by itself.
func mapped(t *testing.T, path, format string) uint64 {
	t.Helper()
	options := map[string]any{"driver": format, "file": map[string]any{"driver": "file", "filename": path}}
	if format == "qcow2" {
		options["backing"] = nil
	}
	image, err := json.Marshal(options)
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("qemu-img", "map", "--output=json", "json:"+string(image)).Output()
	if err != nil {
		t.Fatal(err)
	}
	var extents []extent
	if err := json.Unmarshal(out, &extents); err != nil {
		t.Fatal(err)
	}
	var sum uint64
	for _, e := range extents {
		if e.Data && !e.Zero {
			sum += e.Length
		}
	}
	return sum
}

func TestAllocatedBytesAreQEMUs(t *testing.T) {
	for _, c := range []struct{ name, format, size, options string }{
		{"qcow2", "qcow2", "64M", ""},
		{"small-clusters", "qcow2", "64M", "cluster_size=512"},
		{"large-clusters", "qcow2", "64M", "cluster_size=2M"},
		{"subclusters", "qcow2", "64M", "extended_l2=on,cluster_size=128k"},
		{"version-2", "qcow2", "64M", "compat=0.10"},
		{"odd-size", "qcow2", "50331136", ""},
		{"many-tables", "qcow2", "3G", "cluster_size=4k"},
		{"raw", "raw", "64M", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			base, path := filepath.Join(dir, "base.raw"), filepath.Join(dir, "a."+c.format)
			img(t, "create", "-q", "-f", "raw", base, c.size)
			args := []string{"create", "-q", "-f", c.format}
			if c.format == "qcow2" {
				args = append(args, "-b", base, "-F", "raw")
			}
			if c.options != "" {
				args = append(args, "-o", c.options)
			}
			img(t, append(args, path, c.size)...)
			writes := []string{"-c", "write -P 1 0 1M", "-c", "write -P 2 1000k 100k", "-c", "write -P 3 40M 3M", "-c", "write -P 4 50330624 512",
				"-c", "write -P 5 20M 512"}
			if c.format == "qcow2" {
				writes = append(writes, "-c", "write -z 10M 1M", "-c", "write -z 41M 1M")
				if c.options != "compat=0.10" {
					writes = append(writes, "-c", "write -c -P 6 30M 2M")
				}
			}
			out, err := exec.Command("qemu-io", append(append([]string{"-f", c.format}, writes...), path)...).CombinedOutput()
			if err != nil || strings.Contains(string(out), "failed") {
				t.Fatalf("qemu-io: %v\n%s", err, out)
			}
			got, err := AllocatedBytes(context.Background(), path, c.format)
			if err != nil {
				t.Fatal(err)
			}
			if want := mapped(t, path, c.format); got != want || got < 4<<20 {
				t.Errorf("%d bytes, and QEMU says %d", got, want)
			}
		})
	}
}

func TestAllocatedBytesRefuses(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := AllocatedBytes(context.Background(), fifo, "qcow2"); !errors.Is(err, ErrRefusedImage) {
		t.Errorf("a FIFO: %v", err)
	}
	path := filepath.Join(dir, "a.qcow2")
	img(t, "create", "-q", "-f", "qcow2", path, "64M")
	if _, err := AllocatedBytes(context.Background(), path, "vmdk"); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("another format: %v", err)
	}
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	if out, err := exec.Command("qemu-io", "-f", "qcow2", "-c", "write 0 64k", path).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if _, err := AllocatedBytes(ended, path, "qcow2"); !errors.Is(err, context.Canceled) {
		t.Errorf("with a context that has ended: %v", err)
	}
	image, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	l1 := binary.BigEndian.Uint64(image[40:])
	for _, c := range []struct {
		name  string
		spoil func([]byte)
	}{
		{"an L1 table outside of the file", func(b []byte) { b[40] = 0x7f }},
		{"an L1 table that is too large", func(b []byte) { b[24], b[37] = 0x01, 0x0f }},
		{"an L2 table outside of the file", func(b []byte) { b[l1+2] = 0x7f }},
	} {
		b := bytes.Clone(image)
		c.spoil(b)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if sum, err := AllocatedBytes(context.Background(), path, "qcow2"); !errors.Is(err, ErrRefusedImage) {
			t.Errorf("%s: %d bytes, %v", c.name, sum, err)
		}
	}
}

func TestMissing(t *testing.T) {
	seq := func(runs []run) iter.Seq2[run, error] {
		return func(yield func(run, error) bool) {
			for _, r := range runs {
				if !yield(r, nil) {
					return
				}
			}
		}
	}
	for _, c := range []struct {
		name       string
		from, into []run
		want       uint64
	}{
		{"nothing", nil, nil, 0},
		{"nothing copied", []run{{0, 10, false}, {20, 5, false}}, nil, 15},
		{"all copied", []run{{0, 10, false}, {20, 5, false}}, []run{{0, 30, false}}, 0},
		{"copied in parts", []run{{0, 10, false}}, []run{{0, 4, false}, {4, 6, true}}, 0},
		{"a hole", []run{{0, 10, false}}, []run{{0, 4, false}, {6, 10, false}}, 2},
		{"zeroes need not be", []run{{0, 10, true}, {10, 1, false}}, []run{{10, 1, false}}, 0},
		{"the end", []run{{0, 10, false}, {12, 4, false}}, []run{{2, 12, false}}, 4},
	} {
		if got, err := missing(seq(c.from), seq(c.into)); got != c.want || err != nil {
			t.Errorf("%s: %d, %v", c.name, got, err)
		}
	}
	broken := errors.New("broken")
	fails := func(yield func(run, error) bool) { yield(run{}, broken) }
	for _, c := range [][2]iter.Seq2[run, error]{{fails, seq(nil)}, {seq([]run{{0, 1, false}}), fails}} {
		if _, err := missing(c[0], c[1]); !errors.Is(err, broken) {
			t.Errorf("a sequence that fails: %v", err)
		}
	}
}

func FuzzRuns(f *testing.F) {
	dir := f.TempDir()
	for _, options := range []string{"cluster_size=512", "cluster_size=512,compat=0.10"} {
		path := filepath.Join(dir, "a.qcow2")
		if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "128k").CombinedOutput(); err != nil {
			f.Fatalf("%v: %s", err, out)
		}
		if out, err := exec.Command("qemu-io", "-f", "qcow2", "-c", "write 0 512", "-c", "write -z 64k 1k", path).CombinedOutput(); err != nil {
			f.Fatalf("%v: %s", err, out)
		}
		image, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(image)
		extended := bytes.Clone(image)
		extended[79] |= incompatExtendedL2
		f.Add(extended)
	}
	f.Fuzz(func(t *testing.T, image []byte) {
		r := bytes.NewReader(image)
		h, err := ReadHeader(r)
		if err != nil {
			return
		}
		var end uint64
		var yielded []run
		for run, err := range h.runs(context.Background(), r, uint64(len(image))) {
			if err != nil {
				break
			}
			if run.length == 0 || run.start < end || run.length > h.VirtualSize || run.start > h.VirtualSize-run.length {
				t.Fatalf("run %+v after %d on a disk of %d", run, end, h.VirtualSize)
			}
			end = run.start + run.length
			yielded = append(yielded, run)
		}
		sorted := slices.IsSortedFunc(yielded, func(a, b run) int { return int(int64(a.start) - int64(b.start)) })
		if !sorted {
			t.Fatalf("%v", yielded)
		}
	})
}
