package memdump

import (
	"context"
	"errors"
	"time"
)

// ErrCannotCollapse means that the kernel does not let this process put huge
// pages of another together, whatever the VM: it is older than 6.1, has no
// transparent huge pages, or this process lacks CAP_SYS_NICE or the right to
// read the other's memory map.
var ErrCannotCollapse = errors.New("huge pages of a VM cannot be put back on this host")

// A HugeRegion is a stretch of a process's address space.
type HugeRegion struct {
	Start, End uint64 // addresses
	Huge       uint64 // bytes of it that huge pages mapped
}

// HugePages is a picture of the transparent huge pages that map a guest's
// memory, for Collapse to put back what was there.
type HugePages struct {
	StartTime uint64 // of the process; the addresses mean nothing in another
	Regions   []HugeRegion
}

// Bytes returns how much memory the huge pages map.
func (h HugePages) Bytes() uint64 {
	var sum uint64
	for _, r := range h.Regions {
		sum += r.Huge
	}
	return sum
}

// QueryHugePages takes the picture of a QEMU.
func QueryHugePages(pid int) (HugePages, error) {
	return HugePages{}, errors.ErrUnsupported
}

// CollapseOptions say what to put back, and at which cost.
type CollapseOptions struct {
	Before HugePages // of before the save: never more than was there then
	Share  float64   // of one core; DefaultCollapseShare if 0
}

// CollapseResult is what Collapse has done. Sizes are in bytes.
type CollapseResult struct {
	Before    uint64 // mapped by huge pages before the save
	Found     uint64 // and after it
	After     uint64 // and now
	Collapsed uint64 // put together by this call
	Skipped   map[string]int
	CPU       time.Duration // of this process's, which the kernel's work counts as
	Elapsed   time.Duration
}

// Collapse puts the huge pages of a guest's memory back that a save has split.
func Collapse(ctx context.Context, pid int, opts CollapseOptions) (CollapseResult, error) {
	return CollapseResult{}, ErrCannotCollapse
}
