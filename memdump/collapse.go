package memdump

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrCannotCollapse means that the kernel does not let this process put huge
// pages of another together, whatever the VM: it is older than 6.1, has no
// transparent huge pages, or this process lacks CAP_SYS_NICE or the right to
// read the other's memory map.
var ErrCannotCollapse = errors.New("huge pages of a VM cannot be put back on this host")

// DefaultCollapseShare is a quarter of one core. A GiB costs a few hundred
// milliseconds of CPU, and so is put back within seconds, while a host whose
// cores are all sold loses next to nothing to it.
const DefaultCollapseShare = 0.25

const (
	// collapseDebt is how far ahead of its share the CPU time may get. Longer
	// bursts are felt by a vCPU that waits for the core, shorter ones are below
	// what timers keep.
	collapseDebt = 2 * time.Millisecond
	// missingParts: a region that lacks less than one part in so many is left
	// so. Looking for the last huge page can cost as much as all others.
	missingParts = 128
	// noMemoryLimit is how many chunks one after the other the host may have no
	// huge page for. It compacts and reclaims memory for each, which would cost
	// other VMs more than this one gains.
	noMemoryLimit = 32
)

// CollapseOptions say what to put back, and at which cost.
type CollapseOptions struct {
	// Before is the picture from before the save. A region gets back as much as
	// it had then and no more. After several saves it is the Most of their
	// pictures.
	Before HugePages
	// Share is how much of one core may be used, over the whole of it, above 0
	// and at most 1; 0 is DefaultCollapseShare.
	Share float64
}

// CollapseResult is what Collapse has done. Sizes are in bytes.
type CollapseResult struct {
	Before uint64 // mapped by huge pages before the save
	Found  uint64 // of the same regions when Collapse began
	After  uint64 // and when it ended
	Left   LeftChunks
	// CPU is what this process has used, which the kernel counts its work as.
	CPU     time.Duration
	Elapsed time.Duration
}

// LeftChunks counts the chunks of a huge page's size that were left as they
// were.
type LeftChunks struct {
	Partial  int // some of it is not in memory, or shared: it would take more memory
	Busy     int // some of it is in use by the kernel or by a device (EAGAIN, EBUSY)
	NoMemory int // the host has no huge page (ENOMEM)
	Refused  int // the kernel does not want huge pages there (EINVAL)
}

// Collapse puts the huge pages of a guest's memory back that a save has split,
// by process_madvise(MADV_COLLAPSE) from outside (madvise(2), Linux 6.1). The
// guest runs on; a CPU of it that touches a chunk of 2 MiB waits while that is
// copied, which takes less than a millisecond. No region gets more huge pages
// than it had, and the guest takes no more memory than before.
//
// It needs CAP_SYS_NICE, and CAP_SYS_PTRACE for a QEMU of another user or with
// more capabilities.
// ErrCannotCollapse means that it will not work for any VM. When the context or
// QEMU ends it stops, with what it has done so far. It may be called again.
func Collapse(ctx context.Context, pid int, opts CollapseOptions) (CollapseResult, error) {
	c := &collapser{ctx: ctx, pid: pid, share: opts.Share}
	if c.share == 0 {
		c.share = DefaultCollapseShare
	}
	if c.share < 0 || c.share > 1 || math.IsNaN(c.share) {
		return c.result, fmt.Errorf("collapse memory of process %d: a share of %v cores", pid, opts.Share)
	}
	// The CPU time is that of a thread. Its priority stays as it is: it holds
	// locks of QEMU's memory, which must not wait for a core behind others.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := c.run(opts.Before); err != nil {
		return c.result, fmt.Errorf("collapse memory of process %d: %w", pid, err)
	}
	return c.result, nil
}

// collapser works through the memory of one process.
type collapser struct {
	ctx    context.Context
	pid    int
	pidfd  int
	chunk  uint64 // bytes
	pages  *pageTable
	share  float64
	began  time.Time
	cpu    time.Duration // of this thread when it began
	failed int           // chunks without memory since the last that went well
	stale  bool          // there is more in huge pages than result.After
	result CollapseResult
}

func (c *collapser) run(before HugePages) (err error) {
	c.result.Before = before.Bytes()
	if c.result.Before == 0 {
		return nil
	}
	if err := collapseKnown(); err != nil {
		return err
	}
	if c.chunk, err = hugeSize(); err != nil {
		return err
	}
	if c.pidfd, err = openProcess(c.pid, before.StartTime); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.Close(c.pidfd)) }()
	if c.pages, err = openPageTable(c.pid, c.chunk); err != nil {
		return notPermitted(ended(err))
	}
	defer func() { err = errors.Join(err, c.pages.Close()) }()

	c.began = time.Now()
	if c.cpu, err = threadCPU(); err != nil {
		return err
	}
	found, err := c.measure(before)
	if err != nil {
		return notPermitted(err)
	}
	c.result.Found = found.Bytes()
	err = c.putBack(before, found)
	if e := c.finish(before); err == nil {
		err = e
	}
	return err
}

// finish measures what has come of it.
func (c *collapser) finish(before HugePages) error {
	var err error
	if c.stale {
		_, err = c.measure(before)
	}
	cpu, cpuErr := threadCPU()
	c.result.CPU, c.result.Elapsed = cpu-c.cpu, time.Since(c.began)
	return errors.Join(err, cpuErr)
}

// measure returns how much of the regions huge pages map now. Where mappings
// have been merged since, all of a mapping counts for each region in it: a
// region has that much or less.
func (c *collapser) measure(before HugePages) (HugePages, error) {
	all, err := mappings(c.pid)
	if err == nil && len(all) == 0 {
		err = ErrQEMUEnded // its memory goes first
	}
	if err != nil {
		return before, ended(err)
	}
	now := HugePages{StartTime: before.StartTime, Regions: make([]HugeRegion, len(before.Regions))}
	for i, r := range before.Regions {
		now.Regions[i] = HugeRegion{Start: r.Start, End: r.End}
		for _, m := range all {
			if m.start < r.End && r.Start < m.end {
				now.Regions[i].Huge += m.huge
			}
		}
	}
	c.result.After, c.stale = now.Bytes(), false
	return now, nil
}

func (c *collapser) putBack(before, found HugePages) error {
	for i, r := range before.Regions {
		missing := missingChunks(r, found.Regions[i], c.chunk)
		if missing == 0 {
			continue
		}
		if err := c.putBackRegion(before, i, missing); err != nil {
			return err
		}
		if c.failed >= noMemoryLimit {
			return nil
		}
	}
	return nil
}

// missingChunks returns how many huge pages a region lacks; 0 if it is not
// worth it.
func missingChunks(before, now HugeRegion, chunk uint64) uint64 {
	if now.Huge >= before.Huge {
		return 0
	}
	missing := before.Huge - now.Huge
	if missing < before.Huge/missingParts {
		return 0
	}
	return missing / chunk
}

// putBackRegion walks one region until it has what it lacks. A chunk that is
// huge already is collapsed with success as well, so after as many successes as
// there could be chunks missing it is asked how many still are.
func (c *collapser) putBackRegion(before HugePages, i int, missing uint64) error {
	r := before.Regions[i]
	first := (r.Start + c.chunk - 1) / c.chunk * c.chunk
	for address := first; address < r.End && r.End-address >= c.chunk; address += c.chunk {
		done, err := c.chunkAt(address)
		if err != nil {
			return err
		}
		if c.failed >= noMemoryLimit {
			return nil
		}
		if done {
			missing--
		}
		if missing == 0 {
			now, err := c.measure(before)
			if err != nil {
				return err
			}
			if missing = missingChunks(r, now.Regions[i], c.chunk); missing == 0 {
				return nil
			}
		}
		if err := c.pace(); err != nil {
			return err
		}
	}
	return nil
}

// chunkAt collapses one chunk and tells whether one huge page maps it now.
func (c *collapser) chunkAt(address uint64) (bool, error) {
	whole, err := c.pages.whole(address)
	if err != nil {
		return false, err
	}
	if !whole {
		c.result.Left.Partial++
		return false, nil
	}
	err = processCollapse(c.pidfd, address, c.chunk)
	if !errors.Is(err, unix.ENOMEM) {
		c.failed = 0
	}
	switch {
	case err == nil:
		c.stale = true
		return true, nil
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EBUSY):
		c.result.Left.Busy++
	case errors.Is(err, unix.ENOMEM):
		c.result.Left.NoMemory++
		c.failed++
	case errors.Is(err, unix.EINVAL):
		c.result.Left.Refused++
	default:
		return false, notPermitted(ended(err))
	}
	return false, nil
}

// pace waits until the CPU time used so far is within its share, and ends with
// the context.
func (c *collapser) pace() error {
	if c.ctx.Err() != nil {
		return context.Cause(c.ctx)
	}
	cpu, err := threadCPU()
	if err != nil {
		return err
	}
	due := time.Duration(float64(cpu-c.cpu)/c.share) - time.Since(c.began)
	if due < time.Duration(float64(collapseDebt)/c.share) {
		return nil
	}
	timer := time.NewTimer(due)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-c.ctx.Done():
		return context.Cause(c.ctx)
	}
}

// notPermitted makes the kernel's refusals an ErrCannotCollapse.
func notPermitted(err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENOSYS) {
		return fmt.Errorf("%w: CAP_SYS_NICE, or the right to read its memory map, is missing: %w", ErrCannotCollapse, err)
	}
	return err
}

// collapseKnown asks the kernel about MADV_COLLAPSE, with no memory at all:
// advice that it does not know is refused before the length is looked at.
func collapseKnown() error {
	_, _, errno := unix.Syscall(unix.SYS_MADVISE, 0, 0, unix.MADV_COLLAPSE)
	if errno != 0 {
		return fmt.Errorf("%w: the kernel does not know MADV_COLLAPSE: %w", ErrCannotCollapse, errno)
	}
	return nil
}

// processCollapse is process_madvise(2) with MADV_COLLAPSE for one stretch of
// another process's memory.
func processCollapse(pidfd int, address, length uint64) error {
	// A remote address; the kernel takes a struct iovec.
	iov := struct{ base, length uintptr }{uintptr(address), uintptr(length)}
	_, _, errno := unix.Syscall6(unix.SYS_PROCESS_MADVISE, uintptr(pidfd), uintptr(unsafe.Pointer(&iov)), 1, unix.MADV_COLLAPSE, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// threadCPU returns the CPU time that the calling thread has used.
func threadCPU() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		return 0, fmt.Errorf("CPU time of the thread: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}
