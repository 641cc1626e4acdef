package blockdev

import (
	"context"
	"fmt"
	"iter"
)

// Image is an image file, in the format that whoever made it says.
type Image struct{ Path, Format string }

// OverlappedBytes returns how much data of an image the one that lies on it
// hides, by data or by zeroes of its own: what merging the two gives back. It is
// counted as AllocatedBytes counts, in parts of the virtual disk, so that tables
// and what a file keeps beside its data are left out.
//
// Both files may be in use, and the answer is then that of what is on disk.
func OverlappedBytes(ctx context.Context, lower, upper Image) (uint64, error) {
	var hidden uint64
	err := readRuns(ctx, lower.Path, lower.Format, func(low iter.Seq2[run, error]) error {
		return readRuns(ctx, upper.Path, upper.Format, func(up iter.Seq2[run, error]) error {
			var data uint64
			counted := func(yield func(run, error) bool) {
				for r, err := range low {
					if err == nil && !r.zero {
						data += r.length
					}
					if !yield(r, err) {
						return
					}
				}
			}
			bare, err := missing(counted, up)
			hidden = data - bare
			return err
		})
	})
	if err != nil {
		return 0, fmt.Errorf("what %s hides of %s: %w", upper.Path, lower.Path, err)
	}
	return hidden, nil
}

// MergedBytes returns how much data is left of a chain of images, the lowest
// first, when all are merged into one.
func MergedBytes(ctx context.Context, chain []Image) (uint64, error) {
	var sum uint64
	err := readStack(ctx, chain, nothing, func(r run) {
		if !r.zero {
			sum += r.length
		}
	})
	if err != nil {
		return 0, fmt.Errorf("allocation of a chain of %d images: %w", len(chain), err)
	}
	return sum, nil
}

// MissingBytes returns how much data of an image another one, which it is being
// copied into, does not hold yet, as far as their files say.
func MissingBytes(ctx context.Context, from, into Image) (uint64, error) {
	return uncopied(ctx, from.Path, from.Format, into.Path, into.Format)
}

// nothing is what lies below a chain.
func nothing(func(run, error) bool) {}

// readStack opens the images of a chain, each on what the ones before it make
// up, and hands over what the whole of them holds.
func readStack(ctx context.Context, chain []Image, below iter.Seq2[run, error], read func(run)) error {
	if len(chain) > 0 {
		return readRuns(ctx, chain[0].Path, chain[0].Format, func(up iter.Seq2[run, error]) error {
			return readStack(ctx, chain[1:], stacked(below, up), read)
		})
	}
	for r, err := range below {
		if err != nil {
			return err
		}
		read(r)
	}
	return nil
}

// stacked yields what two images hold together: the upper one where it holds
// anything, the lower one elsewhere. Both come in order, as does what is yielded.
func stacked(lower, upper iter.Seq2[run, error]) iter.Seq2[run, error] {
	return func(yield func(run, error) bool) {
		next, stop := iter.Pull2(lower)
		defer stop()
		var low run
		// until passes the lower image by, up to an offset, and shows it or not.
		until := func(end uint64, show bool) bool {
			for {
				if low.length == 0 {
					r, err, more := next()
					switch {
					case err != nil:
						yield(run{}, err)
						return false
					case !more:
						r = run{start: behind, length: 1}
					}
					low = r
				}
				if low.start >= end {
					return true
				}
				part := run{low.start, min(low.length, end-low.start), low.zero}
				low.start, low.length = low.start+part.length, low.length-part.length
				if show && !yield(part, nil) {
					return false
				}
			}
		}
		for r, err := range upper {
			if err != nil {
				yield(run{}, err)
				return
			}
			if !until(r.start, true) || !until(r.start+r.length, false) || !yield(r, nil) {
				return
			}
		}
		until(behind, true)
	}
}

// behind is an offset behind every disk's end.
const behind = 1 << 63
