package memdump

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
)

// A HugeRegion is a stretch of a process's address space.
type HugeRegion struct {
	Start, End uint64 // addresses
	Huge       uint64 // bytes of it that huge pages map
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

// Most returns for each region the larger of what two pictures of one QEMU say,
// of which later is the newer. It is what to put back after a save, when not
// all was put back after the save before: later alone would lose a little more
// each time. What has been mapped anew since, or is another process's, goes by
// later.
func (h HugePages) Most(later HugePages) HugePages {
	most := HugePages{StartTime: later.StartTime, Regions: slices.Clone(later.Regions)}
	if h.StartTime != later.StartTime {
		return most
	}
	for _, old := range h.Regions {
		i := slices.IndexFunc(later.Regions, func(r HugeRegion) bool { return r.Start < old.End && old.Start < r.End })
		switch {
		case i < 0: // all of it is split, or it is gone
			most.Regions = append(most.Regions, old)
		case old.Start == later.Regions[i].Start && old.End == later.Regions[i].End:
			most.Regions[i].Huge = max(old.Huge, later.Regions[i].Huge)
		}
	}
	return most
}

// QueryHugePages takes the picture of a QEMU. The kernel walks the page tables
// for it, which takes milliseconds for each GiB that no huge pages map, and
// less for others; the guest does not wait. Without transparent huge pages the
// picture is empty. It needs the right to read the process's memory map
// (CAP_SYS_PTRACE for a QEMU of another user).
func QueryHugePages(pid int) (HugePages, error) {
	h, err := queryHugePages(pid)
	if err != nil {
		return h, fmt.Errorf("huge pages of process %d: %w", pid, err)
	}
	return h, nil
}

func queryHugePages(pid int) (HugePages, error) {
	var h HugePages
	var err error
	if h.StartTime, err = startTime(pid); err != nil {
		return h, err
	}
	all, err := mappings(pid)
	if err != nil {
		return h, err
	}
	for _, m := range all {
		if m.huge > 0 && mayBeRAM(m) {
			h.Regions = append(h.Regions, HugeRegion{Start: m.start, End: m.end, Huge: m.huge})
		}
	}
	return h, nil
}

// mayBeRAM tells guest memory, anonymous or of a memfd or shared memory, from
// most of what else QEMU maps by huge pages: TCG's translated code above all,
// which is executable. Some of QEMU's own memory can be among it; a save does
// not split that, so that nothing of it is missing afterwards.
func mayBeRAM(m mapping) bool {
	return strings.HasPrefix(m.perms, "rw-") && !strings.HasPrefix(m.path, "[")
}

const hugeSizeFile = "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size"

// hugeSize returns the size of this host's transparent huge pages in bytes: 2
// MiB on x86.
func hugeSize() (uint64, error) {
	b, err := os.ReadFile(hugeSizeFile)
	if errors.Is(err, os.ErrNotExist) {
		return 0, fmt.Errorf("%w: the kernel has no transparent huge pages", ErrCannotCollapse)
	}
	if err != nil {
		return 0, err
	}
	size, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", hugeSizeFile, err)
	}
	if page := uint64(os.Getpagesize()); size < page || size%page != 0 {
		return 0, fmt.Errorf("%s: a huge page of %d bytes", hugeSizeFile, size)
	}
	return size, nil
}

// pageTable reads which pages of a process are its own
// (Documentation/admin-guide/mm/pagemap.rst in the kernel's source).
type pageTable struct {
	file *os.File
	buf  []byte
}

// Bits of a page's entry.
const (
	pageExclusive = 1 << 56 // mapped once, here; never set for the zero page
	pageShared    = 1 << 61 // of a file or of shared memory
	pagePresent   = 1 << 63
	pageEntrySize = 8 // bytes
)

func openPageTable(pid int, chunk uint64) (*pageTable, error) {
	f, err := os.Open(procPath(pid, "pagemap"))
	if err != nil {
		return nil, err
	}
	return &pageTable{file: f, buf: make([]byte, chunk/uint64(os.Getpagesize())*pageEntrySize)}, nil
}

func (p *pageTable) Close() error { return p.file.Close() }

// whole tells whether every page of a chunk is in memory, and of anonymous
// memory the process's alone. Such a chunk takes no more memory when one huge
// page maps it. In others there is what the guest never touched or gave back
// (balloon, free page reporting), or was swapped out, or merged with equal
// pages (KSM), and a huge page would allocate all of that.
func (p *pageTable) whole(address uint64) (bool, error) {
	offset := address / uint64(os.Getpagesize()) * pageEntrySize
	_, err := p.file.ReadAt(p.buf, int64(offset))
	if errors.Is(err, io.EOF) { // it has no memory any more
		return false, ErrQEMUEnded
	}
	if err != nil {
		return false, err
	}
	return wholeChunk(p.buf), nil
}

func wholeChunk(entries []byte) bool {
	for ; len(entries) >= pageEntrySize; entries = entries[pageEntrySize:] {
		e := binary.NativeEndian.Uint64(entries)
		if e&pagePresent == 0 || e&(pageExclusive|pageShared) == 0 {
			return false
		}
	}
	return true
}
