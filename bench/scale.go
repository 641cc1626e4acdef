package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
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
	maxGrowth     = 1.2                   // of a VM's share, beside that in a smaller fleet
	idleTime      = 30 * time.Second
	shortIdleTime = 5 * time.Second
	scrapes       = 100
)

// scaled is what was measured with so many VMs.
type scaled struct {
	vms       int
	discovery time.Duration // from the first start of vmsnapd until it shows them all
	ready     time.Duration // of its second start, which knows them all
	lists     []time.Duration
	scrapes   []time.Duration
	idle      usage // its CPU time is that of the watched time only
	watched   time.Duration
	at100     time.Duration // 100 snapshots at once, of as many VMs
}

// measureScale measures vmsnapd with ever more idle QEMU processes.
func measureScale(ctx context.Context, c config, r *report, q testvm.QEMU) (err error) {
	sizes, idle := []int{100, 200, 300, 400, fullFleet}, idleTime
	if c.short {
		sizes, idle = []int{10, 30}, shortIdleTime
	}
	f, err := newFleet(q)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.end()) }()
	var all []scaled
	for i, n := range sizes {
		progress("QEMU %s: %d VMs", q.Name, n)
		if err := f.grow(ctx, n); err != nil {
			return err
		}
		one, err := f.measure(ctx, filepath.Join(f.dir, fmt.Sprintf("host%d", n)), idle, i == len(sizes)-1)
		if err != nil {
			return fmt.Errorf("%d VMs: %w", n, err)
		}
		all = append(all, one)
	}
	r.addScale(q.Name, all)
	return nil
}

// measure measures a vmsnapd that begins with nothing in a directory.
func (f *fleet) measure(ctx context.Context, dir string, idle time.Duration, snapshots bool) (one scaled, err error) {
	address, err := freeAddress()
	if err != nil {
		return scaled{}, err
	}
	one.vms = len(f.members)
	config := daemon.Config{Binary: vmsnapdPath, Dir: dir, VMs: f.uuids(), Metrics: address}
	if one.discovery, err = coldStart(ctx, config); err != nil {
		return scaled{}, err
	}
	d, err := daemon.Start(ctx, config)
	if err != nil {
		return scaled{}, err
	}
	defer func() { err = errors.Join(err, d.Stop()) }()
	one.ready = d.Ready
	if err := awaitAll(ctx, d, one.vms); err != nil {
		return scaled{}, err
	}
	if err := one.watchIdle(ctx, d.PID(), idle); err != nil {
		return scaled{}, err
	}
	if err := one.ask(ctx, d, address); err != nil {
		return scaled{}, err
	}
	if snapshots {
		one.at100, err = f.snapshotMany(ctx, d)
	}
	return one, err
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
	err = awaitAll(ctx, d, len(config.VMs))
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

// awaitAll waits until the daemon shows so many VMs and what their QEMUs say.
func awaitAll(ctx context.Context, d *daemon.Daemon, n int) error {
	ctx, cancel := context.WithTimeout(ctx, roundDeadline)
	defer cancel()
	for {
		res, err := d.VMs().ListVMs(ctx, connect.NewRequest(&vmsnapv1.ListVMsRequest{}))
		if err != nil {
			return err
		}
		known := 0
		for _, vm := range res.Msg.GetVms() {
			if vm.GetProcess().GetQemuVersion() != "" {
				known++
			}
		}
		if known == n {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d of %d VMs are known: %w", known, n, ctx.Err())
		case <-time.After(fleetInterval):
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
		if err := scrape(ctx, "http://"+address+"/metrics"); err != nil {
			return err
		}
		one.scrapes = append(one.scrapes, time.Since(began))
	}
	return nil
}

func scrape(ctx context.Context, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, res.Body)
	if err = errors.Join(err, res.Body.Close()); err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", url, res.Status)
	}
	return err
}

// snapshotMany takes a snapshot of each VM with a disk, all at once, and returns
// when the last has ended.
func (f *fleet) snapshotMany(ctx context.Context, d *daemon.Daemon) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, saveDeadline)
	defer cancel()
	group, ctx := errgroup.WithContext(ctx)
	began := time.Now()
	for _, m := range f.members[:min(withDisk, len(f.members))] {
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
	err := group.Wait()
	return time.Since(began), err
}

func (r *report) addScale(qemu string, all []scaled) {
	for _, one := range all {
		full := one.vms == fullFleet
		add := func(measure, ours string, allowed string, ratio float64) {
			w := row{measure: fmt.Sprintf("%d idle VMs: %s", one.vms, measure), qemu: qemu, ours: ours}
			if full && ratio > 0 {
				w.rival, w.ratio, w.budget = allowed+" allowed", ratio, 1
			}
			r.rows = append(r.rows, w)
		}
		lasts := func(measure string, d, allowed time.Duration) {
			add(measure, short(d), short(allowed), float64(d)/float64(allowed))
		}
		lasts("discovery, from a cold start", one.discovery, maxDiscovery)
		lasts("ready, known before", one.ready, maxReady)
		add("resident memory", mib(one.idle.resident), mib(maxResident), float64(one.idle.resident)/maxResident)
		cpu := one.idle.cpu.Seconds() / one.watched.Seconds()
		add("CPU", fmt.Sprintf("%.2f%% of a core", 100*cpu), fmt.Sprintf("%.0f%%", 100*maxIdleCPU), cpu/maxIdleCPU)
		lasts("ListVMs, p99", quantile(one.lists, 0.99), maxList)
		lasts("/metrics, p99", quantile(one.scrapes, 0.99), maxScrape)
		add("file descriptors, threads", fmt.Sprintf("%d, %d", one.idle.files, one.idle.threads), "", 0)
		r.run(fmt.Sprintf("Scale/qemu=%s/vms=%d", qemu, one.vms), one.discovery,
			measurement{"ready-ns", int64(one.ready)}, measurement{"resident-bytes", one.idle.resident},
			measurement{"idle-cpu-ns/s", int64(cpu * 1e9)}, measurement{"list-p99-ns", int64(quantile(one.lists, 0.99))},
			measurement{"metrics-p99-ns", int64(quantile(one.scrapes, 0.99))},
			measurement{"fds", int64(one.idle.files)}, measurement{"threads", int64(one.idle.threads)})
	}
	first, last := all[0], all[len(all)-1]
	if last.at100 > 0 {
		r.rows = append(r.rows, row{
			measure: fmt.Sprintf("%d idle VMs: %d snapshots at once", last.vms, min(withDisk, last.vms)), qemu: qemu, ours: short(last.at100),
		})
	}
	growth := func(measure string, figure func(scaled) float64) {
		share := func(s scaled) float64 { return figure(s) / float64(s.vms) }
		r.rows = append(r.rows, row{
			measure: fmt.Sprintf("a VM's share with %d VMs: %s", last.vms, measure), qemu: qemu,
			rival: fmt.Sprintf("with %d VMs", first.vms), ratio: share(last) / share(first), budget: maxGrowth,
		})
	}
	growth("discovery", func(s scaled) float64 { return float64(s.discovery) })
	growth("resident memory", func(s scaled) float64 { return float64(s.idle.resident) })
	growth("ListVMs, median", func(s scaled) float64 { return float64(median(s.lists)) })
	growth("/metrics, median", func(s scaled) float64 { return float64(median(s.scrapes)) })
}
