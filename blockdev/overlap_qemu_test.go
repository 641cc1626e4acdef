package blockdev_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// taken is what the files of a pile take on their file system.
func (p *pile) taken(layers ...int) uint64 {
	p.t.Helper()
	var sum uint64
	for _, i := range layers {
		info, err := blockdev.StatPath(p.layers[i])
		if err != nil {
			p.t.Fatal(err)
		}
		sum += info.Allocated
	}
	return sum
}

// TestQEMUMergeFreesWhatOverlaps predicts what merging two layers gives back, in
// both directions, and then lets QEMU merge them.
func TestQEMUMergeFreesWhatOverlaps(t *testing.T) {
	const megabytes, tables = 32, 1 << 20 // the tables of the file that goes are given back too
	forEachTools(t, func(t *testing.T, q testvm.QEMU) {
		for _, down := range []bool{true, false} {
			t.Run(fmt.Sprintf("down=%v", down), func(t *testing.T) {
				p := newPile(t, q, "qcow2", megabytes)
				p.tool("qemu-io", "-f", "qcow2", "-c", "write -z -u 40M 1M", "-c", "write 100M 3M", p.layers[2])
				mid, top := blockdev.Image{Path: p.layers[1], Format: "qcow2"}, blockdev.Image{Path: p.layers[2], Format: "qcow2"}
				predicted, err := blockdev.OverlappedBytes(context.Background(), mid, top)
				if err != nil {
					t.Fatal(err)
				}
				// The top hides the second half of the middle, a megabyte of it by zeroes.
				if want := uint64(megabytes/2) << 20; predicted != want {
					t.Errorf("%d bytes are predicted, and %d were written to both", predicted, want)
				}
				whole := []blockdev.Image{{Path: p.layers[0], Format: "qcow2"}, mid, top}
				merged, err := blockdev.MergedBytes(context.Background(), whole)
				if err != nil {
					t.Fatal(err)
				}
				before := p.taken(1, 2)
				left := 1
				if down {
					if err := (blockdev.Offline{Locks: p.lock(1, 2)}).Commit(context.Background(), top.Path, mid.Path, "qcow2"); err != nil {
						t.Fatal(err)
					}
				} else {
					left = 2
					if err := (blockdev.Offline{Locks: p.lock(0, 1, 2)}).Rebase(context.Background(), top.Path, p.layers[0], "qcow2"); err != nil {
						t.Fatal(err)
					}
				}
				freed := before - p.taken(left)
				if freed < predicted || freed > predicted+tables {
					t.Errorf("%d bytes were given back, and %d were predicted", freed, predicted)
				}
				if held, err := blockdev.MergedBytes(context.Background(), append(whole[:1], []blockdev.Image{mid, top}[left-1])); err != nil || held != merged {
					t.Errorf("the chain holds %d bytes after the merge, and %d before, %v", held, merged, err)
				}
			})
		}
	})
}
