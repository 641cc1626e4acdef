package memdump

import (
	"encoding/binary"
	"math"
	"os"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// A region is looked after as long as it lacks a part worth looking for.
func TestMissingChunks(t *testing.T) {
	const chunk = 2 << 20
	tests := map[string]struct {
		before, now, want uint64 // chunks
	}{
		"nothing lost":     {1000, 1000, 0},
		"more than before": {10, 1000, 0},
		"all lost":         {1000, 0, 1000},
		"some lost":        {1000, 900, 100},
		"hardly any lost":  {1000, 995, 0},
		"one of few":       {2, 1, 1},
		"none before":      {0, 0, 0},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			if got := missingChunks(HugeRegion{Huge: test.before * chunk}, HugeRegion{Huge: test.now * chunk}, chunk); got != test.want {
				t.Errorf("%d chunks missing, want %d", got, test.want)
			}
		})
	}
}

func TestMostHugePages(t *testing.T) {
	region := func(start, end, huge uint64) HugeRegion { return HugeRegion{Start: start, End: end, Huge: huge} }
	tests := map[string]struct {
		before, later, want HugePages
	}{
		"nothing before": {HugePages{}, HugePages{1, []HugeRegion{region(0, 10, 4)}}, HugePages{1, []HugeRegion{region(0, 10, 4)}}},
		"less and more": {
			HugePages{1, []HugeRegion{region(0, 10, 4), region(20, 30, 4)}},
			HugePages{1, []HugeRegion{region(0, 10, 6), region(20, 30, 2)}},
			HugePages{1, []HugeRegion{region(0, 10, 6), region(20, 30, 4)}},
		},
		"nothing left": {
			HugePages{1, []HugeRegion{region(0, 10, 4)}},
			HugePages{1, nil},
			HugePages{1, []HugeRegion{region(0, 10, 4)}},
		},
		"mapped anew": {
			HugePages{1, []HugeRegion{region(0, 10, 8)}},
			HugePages{1, []HugeRegion{region(5, 15, 2)}},
			HugePages{1, []HugeRegion{region(5, 15, 2)}},
		},
		"another process": {
			HugePages{1, []HugeRegion{region(0, 10, 8)}},
			HugePages{2, []HugeRegion{region(0, 10, 2)}},
			HugePages{2, []HugeRegion{region(0, 10, 2)}},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(test.want, test.before.Most(test.later)); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

func TestWholeChunk(t *testing.T) {
	own := uint64(pagePresent | pageExclusive)
	tests := map[string]struct {
		odd  uint64 // the entry of one page
		want bool
	}{
		"its own":          {own, true},
		"of memfd":         {pagePresent | pageShared, true},
		"never touched":    {0, false},
		"swapped out":      {1 << 62, false},
		"zero page":        {pagePresent, false},
		"merged or cloned": {pagePresent | 1<<55, false},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			var entries []byte
			for i := range 512 {
				e := own
				if i == 511 {
					e = test.odd
				}
				entries = binary.NativeEndian.AppendUint64(entries, e)
			}
			if got := wholeChunk(entries); got != test.want {
				t.Errorf("whole: %t, want %t", got, test.want)
			}
		})
	}
}

func TestCollapseShareOutOfRange(t *testing.T) {
	for _, share := range []float64{-0.1, 1.1, math.NaN(), math.Inf(1)} {
		if _, err := Collapse(t.Context(), os.Getpid(), CollapseOptions{Share: share}); err == nil {
			t.Errorf("a share of %v was accepted", share)
		}
	}
}

// Chunks that are not all there stay as they are, so that no memory is taken:
// what a guest gave back by its balloon, or never wrote.
func TestCollapseTakesNoMemory(t *testing.T) {
	chunk, err := hugeSize()
	if err != nil {
		t.Fatal(err)
	}
	memory, address := hugeMemory(t, 8, chunk)
	const page = 4096
	for i := range memory {
		if uint64(i) < 6*chunk && i%page == 0 { // two chunks are never written
			memory[i] = 1
		}
	}
	before, err := QueryHugePages(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	before = onlyRegion(t, before, address)
	if before.Bytes() != 6*chunk {
		t.Fatalf("%d bytes in huge pages, want %d", before.Bytes(), 6*chunk)
	}
	read := func() {
		for i := 6 * chunk; i < uint64(len(memory)); i += page {
			if memory[i] != 0 {
				t.Fatal("not zero")
			}
		}
	}
	read() // the huge zero page maps them now
	// One page of each chunk is given back, and of half the chunks written again.
	for i := range 8 {
		own := memory[uint64(i)*chunk:][:page]
		if err := unix.Madvise(own, unix.MADV_DONTNEED); err != nil {
			t.Fatal(err)
		}
		if i < 6 && i%2 == 0 {
			own[0] = 1
		}
	}
	read() // and now 512 small ones
	r, err := Collapse(t.Context(), os.Getpid(), CollapseOptions{Before: before, Share: 1})
	if err != nil {
		t.Fatal(err)
	}
	if r.Found != 0 || r.After != 3*chunk || r.Left != (LeftChunks{Partial: 5}) {
		t.Errorf("%+v", r)
	}
}

// hugeMemory maps chunks that the kernel may use huge pages for.
func hugeMemory(t *testing.T, chunks, chunk uint64) ([]byte, uint64) {
	t.Helper()
	b, err := unix.Mmap(-1, 0, int((chunks+2)*chunk), unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Munmap(b); err != nil {
			t.Error(err)
		}
	})
	// Nothing beside it, or the kernel would merge the mappings.
	address := uint64(uintptr(unsafe.Pointer(&b[0])))
	skip := chunk - address%chunk
	memory := b[skip:][:chunks*chunk]
	if err := unix.Mprotect(memory, unix.PROT_READ|unix.PROT_WRITE); err != nil {
		t.Fatal(err)
	}
	if err := unix.Madvise(memory, unix.MADV_HUGEPAGE); err != nil {
		t.Fatal(err)
	}
	return memory, address + skip
}

func onlyRegion(t *testing.T, h HugePages, address uint64) HugePages {
	t.Helper()
	for _, r := range h.Regions {
		if r.Start == address {
			return HugePages{StartTime: h.StartTime, Regions: []HugeRegion{r}}
		}
	}
	t.Fatalf("no region at %x in %+v", address, h)
	return h
}
