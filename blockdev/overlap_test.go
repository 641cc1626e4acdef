package blockdev

import (
	"bytes"
	"context"
	"errors"
	"iter"
	"math/rand/v2"
	"testing"
)

// content is a small disk, a byte of which is ' ' where an image holds nothing,
// '0' where it holds zeroes, and 'x' where it holds data.
func content(s string) iter.Seq2[run, error] {
	return func(yield func(run, error) bool) {
		for i := 0; i < len(s); {
			n := i
			for n < len(s) && s[n] == s[i] {
				n++
			}
			if s[i] != ' ' && !yield(run{uint64(i), uint64(n - i), s[i] == '0'}, nil) {
				return
			}
			i = n
		}
	}
}

// drawn is the inverse of content.
func drawn(t *testing.T, size int, runs iter.Seq2[run, error]) string {
	t.Helper()
	b := bytes.Repeat([]byte{' '}, size)
	var end uint64
	for r, err := range runs {
		if err != nil {
			t.Fatal(err)
		}
		if r.length == 0 || r.start < end {
			t.Fatalf("run %+v after %d", r, end)
		}
		end = r.start + r.length
		for i := r.start; i < end; i++ {
			b[i] = 'x'
			if r.zero {
				b[i] = '0'
			}
		}
	}
	return string(b)
}

func TestStacked(t *testing.T) {
	for _, c := range []struct{ lower, upper, want string }{
		{"", "", ""},
		{"xx00 ", "     ", "xx00 "},
		{"     ", "xx00 ", "xx00 "},
		{"xxxxx", " 0x0 ", "x0x0x"},
		{"x x x", "xxxxx", "xxxxx"},
		{"00xx0", "x   x", "x0xxx"},
	} {
		if got := drawn(t, len(c.want), stacked(content(c.lower), content(c.upper))); got != c.want {
			t.Errorf("%q on %q: %q, want %q", c.upper, c.lower, got, c.want)
		}
	}
	random := rand.New(rand.NewPCG(1, 2))
	for range 1000 {
		var lower, upper, want []byte
		for range 30 {
			l, u := "  x0"[random.IntN(4)], "  x0"[random.IntN(4)]
			lower, upper, want = append(lower, l), append(upper, u), append(want, l)
			if u != ' ' {
				want[len(want)-1] = u
			}
		}
		if got := drawn(t, 30, stacked(content(string(lower)), content(string(upper)))); got != string(want) {
			t.Fatalf("%q on %q: %q, want %q", upper, lower, got, want)
		}
	}
	broken := errors.New("broken")
	fails := func(yield func(run, error) bool) { yield(run{}, broken) }
	for _, both := range [][2]iter.Seq2[run, error]{{fails, content("x")}, {content("x"), fails}} {
		var err error
		for _, err = range stacked(both[0], both[1]) {
			if err != nil {
				break
			}
		}
		if !errors.Is(err, broken) {
			t.Errorf("a sequence that fails: %v", err)
		}
	}
}

func TestOverlapOfBrokenImages(t *testing.T) {
	dir := t.TempDir()
	img(t, "create", "-q", "-f", "qcow2", dir+"/a", "1M")
	a, gone := Image{dir + "/a", "qcow2"}, Image{dir + "/gone", "qcow2"}
	for _, both := range [][2]Image{{a, gone}, {gone, a}, {a, {a.Path, "vmdk"}}} {
		if n, err := OverlappedBytes(context.Background(), both[0], both[1]); err == nil {
			t.Errorf("%v: %d bytes", both, n)
		}
		if n, err := MergedBytes(context.Background(), both[:]); err == nil {
			t.Errorf("%v: %d bytes", both, n)
		}
	}
}
