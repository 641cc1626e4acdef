package memdump

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const (
	// window is what is written back at a time: long enough for the disk,
	// short enough to begin early. Windows begin at multiples of it and are as
	// long as the largest folio of the page cache, which is dropped as a whole
	// or not at all.
	window = 2 << 20
	// inFlight is how much may be on its way to the disk before the oldest
	// window is waited for and dropped: enough for the disk's queue.
	inFlight = 16 * window
)

// writeback brings a file that grows at its end to the disk while it grows, and
// takes it out of the page cache: left to the kernel, dirty pages pile up until
// the writer is made to wait, and what the host has cached is evicted for them.
// The first failure stays: the kernel reports each only once.
type writeback struct {
	file    *os.File
	started int64 // writing has begun up to here
	settled int64 // written and dropped up to here
	err     error
}

// start begins to write whole windows up to size, without waiting for the disk.
func (w *writeback) start(size int64) error {
	for ; w.err == nil && size-w.started >= window; w.started += window {
		w.sync(w.started, unix.SYNC_FILE_RANGE_WRITE)
	}
	return w.err
}

// settle waits until windows are on the disk and drops them, up to limit, which
// lies within what was started.
func (w *writeback) settle(ctx context.Context, limit int64) error {
	for w.err == nil && w.settled+window <= min(limit, w.started) {
		if err := ctx.Err(); err != nil {
			return err
		}
		w.sync(w.settled, unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER)
		drop(w.file, w.settled, window)
		w.settled += window
	}
	return w.err
}

func (w *writeback) sync(at int64, flags int) {
	if err := unix.SyncFileRange(int(w.file.Fd()), at, window, flags); err != nil && w.err == nil {
		w.err = fmt.Errorf("write back: %w", err)
	}
}

// drop takes pages out of the page cache. It is advice: dirty pages stay.
func drop(file *os.File, at, n int64) {
	_ = unix.Fadvise(int(file.Fd()), at, n, unix.FADV_DONTNEED)
}
