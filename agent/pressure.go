package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/vmsnap/vmsnap/agent/discover"
)

// A merge of an upkeep rests while those in the VM's control group wait for their
// disks for more than yieldAbove of the time, until it is less than yieldBelow, in
// hundredths over the last ten seconds (some avg10 of io.pressure, kernel's
// Documentation/accounting/psi.rst).
const (
	yieldAbove = 20.0
	yieldBelow = 10.0
)

// yield has the operation rest while the guest waits for its disks, until it is
// ended. Where the kernel does not tell, only the speed is limited.
func (d *deletion) yield(ctx context.Context) (end func()) {
	ctx, stop := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for rests := false; ; {
			p, err := d.vm.ioPressure()
			rests = err == nil && (p > yieldAbove || rests && p > yieldBelow)
			d.o.Yield(rests)
			select {
			case <-ctx.Done():
				d.o.Yield(false)
				return
			case <-time.After(time.Second): // nothing announces it to a process without privileges
			}
		}
	}()
	return func() { stop(); <-ended }
}

// ioPressure returns for how much of the last ten seconds somebody in the VM's own
// control group waited for a disk, in hundredths. It is 0 for a VM that does not run,
// and unknown for one that shares its group with others.
func (v *vm) ioPressure() (float64, error) {
	r, err := v.alone()
	if err != nil || r == nil {
		return 0, err
	}
	if r.proc.Cgroup.Mode != discover.CgroupV2 || r.proc.Cgroup.Unit == "" {
		return 0, errors.New("the VM has no control group of its own")
	}
	b, err := os.ReadFile(filepath.Join("/sys/fs/cgroup", r.proc.Cgroup.Path, "io.pressure"))
	if err != nil {
		return 0, err
	}
	return parsePressure(string(b))
}

func parsePressure(text string) (percent float64, err error) {
	if _, err := fmt.Sscanf(text, "some avg10=%f ", &percent); err != nil {
		return 0, fmt.Errorf("pressure: %q: %w", text, err)
	}
	return percent, nil
}
