package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// hugePages returns how much memory of a process huge pages map, in KiB.
func hugePages(pid int) (int, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if fields := strings.Fields(lines.Text()); len(fields) == 3 && fields[0] == "AnonHugePages:" {
			return strconv.Atoi(fields[1])
		}
	}
	return 0, fmt.Errorf("no AnonHugePages in %s: %w", f.Name(), lines.Err())
}

const (
	// hugePagesShare of what there was is what a guest gets back: vmsnapd leaves
	// it at that as well.
	hugePagesShare = 0.99
	// hugePagesWithin is how long it may take: a snapshot that is taken sooner
	// is measured all the same.
	hugePagesWithin = 15 * time.Second
	// hugePagesInterval is the time between two looks, which walk page tables.
	hugePagesInterval = 250 * time.Millisecond
)

// awaitHugePages returns when a process has its huge pages again, as it
// would between two snapshots that are not taken one after the other.
func awaitHugePages(ctx context.Context, pid, before int) error {
	ctx, cancel := context.WithTimeout(ctx, hugePagesWithin)
	defer cancel()
	for {
		now, err := hugePages(pid)
		if err != nil || float64(now) >= hugePagesShare*float64(before) {
			return err
		}
		select {
		case <-time.After(hugePagesInterval):
		case <-ctx.Done():
			progress("huge pages: %d MiB of %d are back", now>>10, before>>10)
			return nil
		}
	}
}
