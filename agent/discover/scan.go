package discover

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
)

// Scan describes every QEMU on the host in one pass, by rising pid. A process
// that vanishes midway is left out. A process that cannot be read for another
// reason does not hide the rest: its error is joined to the one returned, and
// the list is good beside it.
func Scan(ctx context.Context) ([]Process, error) {
	pids, err := listProcesses()
	if err != nil {
		return nil, err
	}
	var found []Process
	var errs []error
	for _, pid := range pids {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		p, err := Inspect(pid)
		switch {
		case err == nil:
			found = append(found, p)
		case !errors.Is(err, ErrGone) && !errors.Is(err, ErrNotQEMU):
			errs = append(errs, err)
		}
	}
	return found, errors.Join(errs...)
}

// listProcesses returns the pids of all processes, rising.
func listProcesses() ([]int, error) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	defer func() { _ = dir.Close() }()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	pids := make([]int, 0, len(names))
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids, nil
}
