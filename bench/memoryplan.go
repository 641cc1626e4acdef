package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// memoryPlan is what is measured of snapshots with memory of guests of one size.
type memoryPlan struct {
	memoryMiB  int
	filled     int64 // bytes of the guest's memory that are in use and do not change
	workingSet int64 // bytes that it changes, over and over
	rates      []int // MB of it a second
	saves      int   // by vmsnapd of each process
	rival      int   // by libvirt at the highest rate; at others one is enough
	floors     int   // migrations to the null device, and writes to the disk
	loads      int   // of the memory; 0 for none
}

// usualMemoryMiB is the memory of the guests that the budgets are for.
const usualMemoryMiB = 2048

var memoryPlans = []memoryPlan{
	{memoryMiB: 1024, workingSet: 512 << 20, rates: []int{0, 100, 400}, saves: 3, rival: 1, floors: 1, loads: 3},
	{memoryMiB: usualMemoryMiB, workingSet: 1 << 30, rates: []int{0, 100, 400}, saves: 10, rival: 2, floors: 3, loads: 5},
	// Most of a large memory changes seldom. What libvirt writes for it is already
	// more than a small disk has.
	{memoryMiB: 8192, filled: 3 << 30, workingSet: 1 << 30, rates: []int{0, 400}, saves: 3, rival: 1, floors: 1, loads: 2},
}

// shortPlan takes a minute.
var shortPlan = memoryPlan{memoryMiB: 1024, workingSet: 256 << 20, rates: []int{0, 400}, saves: 1, rival: 1, floors: 1, loads: 1}

// sizes are those of guests, in GiB.
type sizes []int

func (s *sizes) String() string {
	var words []string
	for _, n := range *s {
		words = append(words, strconv.Itoa(n))
	}
	return strings.Join(words, ",")
}

// Set reads numbers with commas between them.
func (s *sizes) Set(text string) error {
	*s = nil
	for word := range strings.SplitSeq(text, ",") {
		n, err := strconv.Atoi(word)
		if err != nil || !slices.ContainsFunc(memoryPlans, func(p memoryPlan) bool { return p.memoryMiB == n<<10 }) {
			return fmt.Errorf("%q: guests can have 1, 2 or 8 GiB", word)
		}
		*s = append(*s, n)
	}
	return nil
}

// planMemory returns what is to be measured. It fails if the host is too small for
// some of it.
func planMemory(c config) ([]memoryPlan, error) {
	if c.short && c.memory == nil {
		return []memoryPlan{shortPlan}, shortPlan.fits(os.TempDir())
	}
	var plans []memoryPlan
	for _, p := range memoryPlans {
		if c.memory != nil && !slices.Contains(c.memory, p.memoryMiB>>10) {
			continue
		}
		if c.short {
			p.rates, p.saves, p.rival, p.floors, p.loads = p.rates[len(p.rates)-1:], 1, 1, 1, min(p.loads, 1)
		}
		if err := p.fits(os.TempDir()); err != nil {
			return nil, err
		}
		plans = append(plans, p)
	}
	return plans, nil
}

// rivalRounds is how many times libvirt writes at most what changes.
const rivalRounds = 10

// fits fails if there is not enough memory for a guest, or not enough space in a
// directory for what libvirt writes of it.
func (p memoryPlan) fits(dir string) error {
	const hint = "leave it out with -memory"
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return fmt.Errorf("sysinfo: %w", err)
	}
	if have := uint64(info.Totalram) * uint64(info.Unit); have < 2*uint64(p.memoryMiB)<<20 {
		return fmt.Errorf("a guest of %d MiB takes a host of twice as much, which has %d MiB: %s", p.memoryMiB, have>>20, hint)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	need := uint64(p.filled + rivalRounds*p.workingSet)
	if have := fs.Bavail * uint64(fs.Bsize); have < need {
		return fmt.Errorf("a guest of %d MiB takes %d MiB in %s, where %d MiB are free: %s", p.memoryMiB, need>>20, dir, have>>20, hint)
	}
	return nil
}

// use has a guest use its memory as planned, and change it at a rate in MB/s.
func (p memoryPlan) use(ctx context.Context, g *testvm.Guest, rate int) error {
	if p.filled > 0 {
		// The root file system is in memory.
		if _, err := g.Exec(ctx, fmt.Sprintf("yes vmsnap | head -c %d >/filled", p.filled)); err != nil {
			return fmt.Errorf("fill the guest's memory: %w", err)
		}
	}
	return g.Dirty(ctx, p.workingSet, int64(rate)*1e6)
}
