package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/internal/daemon"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// Budgets with fullFleet idle VMs.
const (
	fullFleet     = 500
	maxResident   = 150 << 20
	maxIdleCPU    = 0.01 // of a core
	maxDiscovery  = 5 * time.Second
	maxReady      = time.Second
	maxList       = 10 * time.Millisecond // p99
	maxScrape     = 50 * time.Millisecond // p99
	maxGrowth     = 1.2                   // of a VM's share, beside that with fewer VMs
	idleTime      = 30 * time.Second
	shortIdleTime = 5 * time.Second
	scrapes       = 100
	atOnce        = 100 // VMs
)

// Budgets of what is held for an idle VM.
const (
	// maxHeldFiles: the process, whose end is awaited, and its monitor, whose
	// events are.
	maxHeldFiles = 2
	// maxHeldGoroutines: one follows the process and takes in what its monitor
	// tells, one reads the monitor, one sees to it that its disks can grow.
	maxHeldGoroutines = 3
	// maxHeld is the budget of fullFleet's share of memory.
	maxHeld = maxResident / fullFleet
)

// The kinds of VMs that there can be many of.
const (
	kindIdle     = "idle"     // real QEMU processes
	kindScripted = "scripted" // without a QEMU
)

// crowd is many VMs, and ever more.
type crowd interface {
	grow(ctx context.Context, n int) error // returns when the n-th can be found
	vms() map[string]string                // their UUIDs by name
	home() string                          // a directory for what belongs to them
	burst(ctx context.Context, d *daemon.Daemon) error
	end() error
}

// scaled is what was measured with so many VMs.
type scaled struct {
	vms        int
	discovery  time.Duration // from the first start of vmsnapd until it shows them all
	ready      time.Duration // of its second start, which knows them all
	lists      []time.Duration
	scrapes    []time.Duration
	idle       usage // its CPU time is that of the watched time only
	watched    time.Duration
	goroutines int
	burst      time.Duration // what is asked of 100 of them at once
}

// measureScale measures vmsnapd with ever more VMs.
func measureScale(ctx context.Context, c config, r *report, q testvm.QEMU) error {
	real, pretended, idle := []int{125, 250, 375, fullFleet}, []int{500, 1000, 1500, 2000}, idleTime
	if c.short {
		real, pretended, idle = []int{10, 30}, []int{20, 60}, shortIdleTime
	}
	f, err := newFleet(q)
	if err != nil {
		return err
	}
	all, err := measureCrowd(ctx, f, kindIdle, real, idle)
	if err != nil {
		return err
	}
	r.addScale(q.Name, kindIdle, all)
	s, err := newScripted(ctx, q)
	if err != nil {
		return err
	}
	if all, err = measureCrowd(ctx, s, kindScripted, pretended, idle); err != nil {
		return err
	}
	r.addScale(q.Name, kindScripted, all)
	return nil
}

// measureCrowd measures vmsnapd with so many VMs of a kind, and ends them.
func measureCrowd(ctx context.Context, vms crowd, kind string, sizes []int, idle time.Duration) (all []scaled, err error) {
	defer func() { err = errors.Join(err, vms.end()) }()
	for i, n := range sizes {
		progress("%d %s VMs", n, kind)
		one := scaled{vms: n}
		err := vms.grow(ctx, n)
		if err == nil {
			err = one.measure(ctx, vms, idle, i == len(sizes)-1)
		}
		if err != nil {
			return nil, fmt.Errorf("%d %s VMs: %w", n, kind, err)
		}
		all = append(all, one)
	}
	return all, nil
}

// measure measures a vmsnapd that begins with nothing.
func (one *scaled) measure(ctx context.Context, vms crowd, idle time.Duration, burst bool) (err error) {
	address, err := freeAddress()
	if err != nil {
		return err
	}
	dir := filepath.Join(vms.home(), fmt.Sprintf("host%d", one.vms))
	config := daemon.Config{Binary: vmsnapdPath, Dir: dir, VMs: vms.vms(), Metrics: address}
	if one.discovery, err = coldStart(ctx, config); err != nil {
		return err
	}
	d, err := daemon.Start(ctx, config)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Stop()) }()
	one.ready = d.Ready
	// It is idle when it has read what the disks of all take, as it does at its start.
	if err := awaitAll(ctx, d, one.vms, func(vm *vmsnapv1.VM) bool { return vm.GetSpace() != nil }); err != nil {
		return err
	}
	if err := one.watchIdle(ctx, d.PID(), idle); err != nil {
		return err
	}
	if one.goroutines, err = goroutines(ctx, address); err != nil {
		return err
	}
	if err := one.ask(ctx, d, address); err != nil || !burst {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, saveDeadline)
	defer cancel()
	began := time.Now()
	err = vms.burst(ctx, d)
	one.burst = time.Since(began)
	return err
}

// coldStart starts a vmsnapd that knows nothing, and returns how long it took
// until it showed all VMs.
func coldStart(ctx context.Context, config daemon.Config) (took time.Duration, err error) {
	began := time.Now()
	d, err := daemon.Start(ctx, config)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, d.Stop()) }()
	err = awaitAll(ctx, d, len(config.VMs), func(vm *vmsnapv1.VM) bool { return vm.GetProcess().GetQemuVersion() != "" })
	return time.Since(began), err
}

// freeAddress returns an address that nobody listens on.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// lookShare is how many times as long as a look at all VMs takes nobody looks.
const lookShare = 4

// awaitAll waits until the daemon shows so many VMs of which something is known.
func awaitAll(ctx context.Context, d *daemon.Daemon, n int, isKnown func(*vmsnapv1.VM) bool) error {
	ctx, cancel := context.WithTimeout(ctx, roundDeadline)
	defer cancel()
	for {
		began := time.Now()
		res, err := d.VMs().ListVMs(ctx, connect.NewRequest(&vmsnapv1.ListVMsRequest{}))
		if err != nil {
			return err
		}
		known := 0
		for _, vm := range res.Msg.GetVms() {
			if isKnown(vm) {
				known++
			}
		}
		if known == n {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d of %d VMs are known: %w", known, n, ctx.Err())
		case <-time.After(max(fleetInterval, lookShare*time.Since(began))): // which does not slow it down
		}
	}
}

// watchIdle watches a process while nobody asks it for anything.
func (one *scaled) watchIdle(ctx context.Context, pid int, idle time.Duration) error {
	before, err := usageOf(pid)
	if err != nil {
		return err
	}
	began := time.Now()
	select {
	case <-time.After(idle):
	case <-ctx.Done():
		return ctx.Err()
	}
	if one.idle, err = usageOf(pid); err != nil {
		return err
	}
	one.watched = time.Since(began)
	one.idle.cpu -= before.cpu
	return nil
}

// ask measures the list of VMs and the metrics.
func (one *scaled) ask(ctx context.Context, d *daemon.Daemon, address string) error {
	for range shortCalls {
		began := time.Now()
		if _, err := d.VMs().ListVMs(ctx, connect.NewRequest(&vmsnapv1.ListVMsRequest{})); err != nil {
			return err
		}
		one.lists = append(one.lists, time.Since(began))
	}
	for range scrapes {
		began := time.Now()
		if err := scrape(ctx, address, io.Discard); err != nil {
			return err
		}
		one.scrapes = append(one.scrapes, time.Since(began))
	}
	return nil
}

// scrape reads the metrics.
func scrape(ctx context.Context, address string, to io.Writer) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/metrics", nil)
	if err != nil {
		return err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, res.Body)
	if err = errors.Join(err, res.Body.Close()); err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", req.URL, res.Status)
	}
	return err
}

var goroutinesLine = regexp.MustCompile(`(?m)^go_goroutines (\d+)$`)

// goroutines returns how many a vmsnapd has.
func goroutines(ctx context.Context, address string) (int, error) {
	var text bytes.Buffer
	if err := scrape(ctx, address, &text); err != nil {
		return 0, err
	}
	found := goroutinesLine.FindSubmatch(text.Bytes())
	if found == nil {
		return 0, errors.New("the metrics do not tell how many goroutines there are")
	}
	return strconv.Atoi(string(found[1]))
}

// burst takes a snapshot of 100 VMs, all at once.
func (f *fleet) burst(ctx context.Context, d *daemon.Daemon) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, m := range f.members[:min(atOnce, len(f.members))] {
		group.Go(func() error {
			created, err := d.Snapshots().CreateSnapshot(ctx, connect.NewRequest(&vmsnapv1.CreateSnapshotRequest{
				Vm: m.name, Quiesce: vmsnapv1.Quiesce_QUIESCE_NONE,
			}))
			if err != nil {
				return err
			}
			_, err = d.Wait(ctx, created.Msg.GetOperation().GetId())
			return err
		})
	}
	return group.Wait()
}

// burst asks what a snapshot of 100 VMs would do, all at once, for which their
// guest agents are asked.
func (s *scripted) burst(ctx context.Context, d *daemon.Daemon) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, m := range s.members[:min(atOnce, len(s.members))] {
		group.Go(func() error {
			res, err := d.Snapshots().PlanSnapshot(ctx, connect.NewRequest(&vmsnapv1.CreateSnapshotRequest{
				Vm: m.name, Quiesce: vmsnapv1.Quiesce_QUIESCE_REQUIRE,
			}))
			if err == nil && res.Msg.GetPlan().GetConsistency() != vmsnapv1.Consistency_CONSISTENCY_FILESYSTEM {
				err = fmt.Errorf("the snapshot of %s would not be what was asked for: %v", m.name, res.Msg.GetPlan())
			}
			return err
		})
	}
	return group.Wait()
}
