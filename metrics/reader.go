package metrics

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/op"
)

// Source tells what is on this host at the moment. *agent.Agent is one.
type Source interface {
	VMs(ctx context.Context) ([]agent.VMView, agent.Discovery)
	Operations(ctx context.Context, filter agent.OperationFilter) ([]op.Record, error)
	Usage(ctx context.Context) []agent.VMUsage
	Ledger(ctx context.Context) (agent.Ledger, error)
	Scheduler() agent.SchedulerView
}

// readTimeout bounds each reading. Prometheus gives up on a scrape after 10 s
// by default, and all readings together stay far below it.
const readTimeout = 2 * time.Second

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName(namespace, "", name), help, labels, nil)
}

// words lists kinds as the reference of the metrics shows them.
func words(kinds []op.Kind) string {
	var all []string
	for _, k := range kinds {
		all = append(all, "`"+string(k)+"`")
	}
	return strings.Join(all, ", ")
}

var (
	descVMs          = desc("vms", "VMs that are known: `running`, `paused`, `stopped`, `unknown`.", "state")
	descGuestsFrozen = desc("guests_frozen", "Guests that are held frozen.")
	descGuestFrozen  = desc("guest_frozen", "1 for each guest that is held frozen; absent for the others.", "vm")
	descUnresolved   = desc("guests_freeze_unresolved", "Guests that may be frozen still, since their agent does not answer.")
	descPaused       = desc("guest_paused", "1 for each guest whose CPUs stand still; absent for the others.", "vm")
	descOutOfSpace   = desc("guest_out_of_space", "1 for each guest that QEMU has stopped since a disk of it could not grow; absent for the others.", "vm")
	descMonitorUp    = desc("monitor_up", "Whether the QEMU of a VM that runs talks to vmsnapd.", "vm")
	descChain        = desc("disk_chain_layers", "Layers of a disk that lie on each other, the active one included.", "vm", "disk")
	descSpaceLow     = desc("disk_space_low", "1 for each disk that grows where less is free than is to be (`low-space`), and less than it may still grow by; absent for the others.", "vm", "disk")
	descFallback     = desc("discovery_fallback", "1 when VMs are found by scanning, with a delay of seconds, since process events cannot be had.")
	descRunning      = desc("operations_running", "Operations that have not ended, those that wait included: "+words(op.Kinds)+".", "kind")
	descQueued       = desc("operations_queued", "Operations that wait for their turn.")
	descBytes        = desc("operation_bytes", "Bytes that an operation which runs has moved; absent for one that moves none.", "vm", "kind")
	descBytesTotal   = desc("operation_bytes_expected", "Bytes that it will have moved; absent when unknown.", "vm", "kind")
	descRate         = desc("operation_bytes_per_second", "How fast it moves them, over the last seconds.", "vm", "kind")
	descSuccess      = desc("collector_success", "0 when this part of the scrape could not be read within two seconds.", "collector")
)

// reading is one part of what is read at each scrape.
type reading struct {
	name string
	read func(context.Context, Source) ([]prometheus.Metric, error)
	turn chan struct{} // holds one token while nothing reads
}

// reader is the collector of what a source tells.
type reader struct {
	source   Source
	readings []*reading
}

func newReader(source Source) *reader {
	r := &reader{source: source, readings: []*reading{
		{name: "vms", read: readVMs},
		{name: "operations", read: readOperations},
		{name: "usage", read: readUsage},
		{name: "ledger", read: readLedger},
		{name: "scheduler", read: readScheduler},
	}}
	for _, reading := range r.readings {
		reading.turn = make(chan struct{}, 1)
		reading.turn <- struct{}{}
	}
	return r
}

// Describe tells which metrics there are.
func (r *reader) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		descVMs, descGuestsFrozen, descGuestFrozen, descUnresolved, descPaused, descOutOfSpace, descMonitorUp, descChain, descSpaceLow, descFallback,
		descRunning, descQueued, descBytes, descBytesTotal, descRate, descSuccess,
		descLayerBytes, descForeignBytes, descMemoryBytes, descReclaimableBytes,
		descActiveBytes, descFreeBytes, descIOBytes, descIOOperations, descPressure,
		descCatalogBytes, descJournalEntries, descLastSnapshot,
		descRunsWaiting, descOldestRun, descLooked,
	} {
		out <- d
	}
}

// scraped is a source during one scrape: the VMs, whose layers are looked at for
// it, are read once.
type scraped struct {
	Source
	once      sync.Once
	vms       []agent.VMView
	discovery agent.Discovery
}

func (s *scraped) VMs(ctx context.Context) ([]agent.VMView, agent.Discovery) {
	s.once.Do(func() { s.vms, s.discovery = s.Source.VMs(ctx) })
	return s.vms, s.discovery
}

// Collect reads everything, each reading for itself.
func (r *reader) Collect(out chan<- prometheus.Metric) {
	source := &scraped{Source: r.source}
	for _, reading := range r.readings {
		metrics, err := reading.fenced(source)
		success := 1.0
		if err != nil {
			success = 0
		}
		for _, m := range metrics {
			out <- m
		}
		out <- prometheus.MustNewConstMetric(descSuccess, prometheus.GaugeValue, success, reading.name)
	}
}

// fenced reads within the deadline. A reading that ignores it is left behind,
// and no other is begun until it has returned.
func (r *reading) fenced(source Source) ([]prometheus.Metric, error) {
	ctx, cancel := context.WithTimeout(context.Background(), readTimeout)
	defer cancel()
	select {
	case <-r.turn:
	case <-ctx.Done():
		return nil, fmt.Errorf("read %s: an earlier reading hangs", r.name)
	}
	type answer struct {
		metrics []prometheus.Metric
		err     error
	}
	answers := make(chan answer, 1)
	go func() {
		defer func() { r.turn <- struct{}{} }()
		metrics, err := r.read(ctx, source)
		answers <- answer{metrics, err}
	}()
	select {
	case a := <-answers:
		return a.metrics, a.err
	case <-ctx.Done():
		return nil, fmt.Errorf("read %s: %w", r.name, ctx.Err())
	}
}

func gauge(d *prometheus.Desc, value float64, labels ...string) prometheus.Metric {
	return prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
}

func readVMs(ctx context.Context, source Source) ([]prometheus.Metric, error) {
	vms, discovery := source.VMs(ctx)
	states := map[agent.State]int{agent.Running: 0, agent.Paused: 0, agent.Stopped: 0, agent.Unknown: 0}
	frozen, unresolved := map[string]bool{}, map[string]bool{} // by id: processes of one identity are several views
	names := map[string]bool{}                                 // names need not be unique
	for _, vm := range vms {
		states[vm.State]++
		if vm.Freeze == nil {
			continue
		}
		frozen[vm.ID] = true
		names[valid(vm.Name)] = true
		if vm.Freeze.Unresolved {
			unresolved[vm.ID] = true
		}
	}
	fallback := 0.0
	if discovery.Source == "scan" {
		fallback = 1
	}
	out := []prometheus.Metric{
		gauge(descGuestsFrozen, float64(len(frozen))),
		gauge(descUnresolved, float64(len(unresolved))),
		gauge(descFallback, fallback),
	}
	for state, n := range states {
		out = append(out, gauge(descVMs, float64(n), string(state)))
	}
	for name := range names {
		out = append(out, gauge(descGuestFrozen, 1, name))
	}
	out = append(out, standOf(vms)...)
	return append(out, spaceOf(vms)...), nil
}

// standOf tells of each VM that runs whether its monitor answers and whether its
// guest stands still, and of each disk how long its chain is and whether it can grow. Of VMs of one name
// it is the worst that counts.
func standOf(vms []agent.VMView) []prometheus.Metric {
	up, paused, chains := map[string]float64{}, map[string]bool{}, map[[2]string]float64{}
	full, low := map[string]bool{}, map[[2]string]bool{}
	for _, vm := range vms {
		name := valid(vm.Name)
		if vm.State == agent.Paused {
			paused[name] = true
		}
		if vm.OutOfSpace {
			full[name] = true
		}
		if vm.Process != nil {
			answers := 1.0
			if vm.State == agent.Unknown {
				answers = 0
			}
			if before, told := up[name]; !told || answers < before {
				up[name] = answers
			}
		}
		for _, d := range vm.Disks {
			key := [2]string{name, valid(d.Device)}
			chains[key] = max(chains[key], float64(len(d.Layers)))
			if d.SpaceLow {
				low[key] = true
			}
		}
	}
	var out []prometheus.Metric
	for name := range paused {
		out = append(out, gauge(descPaused, 1, name))
	}
	for name := range full {
		out = append(out, gauge(descOutOfSpace, 1, name))
	}
	for key := range low {
		out = append(out, gauge(descSpaceLow, 1, key[:]...))
	}
	for name, answers := range up {
		out = append(out, gauge(descMonitorUp, answers, name))
	}
	for key, layers := range chains {
		out = append(out, gauge(descChain, layers, key[:]...))
	}
	return out
}

// maxRunning bounds the operations that are counted; there is one for each VM.
const maxRunning = 10000

func readOperations(ctx context.Context, source Source) ([]prometheus.Metric, error) {
	records, err := source.Operations(ctx, agent.OperationFilter{Active: true, Limit: maxRunning})
	if err != nil {
		return nil, err
	}
	running := map[op.Kind]int{}
	for _, kind := range op.Kinds {
		running[kind] = 0
	}
	var out []prometheus.Metric
	queued := 0
	told := map[[2]string]bool{} // names need not be unique
	for _, r := range records {
		running[r.Kind]++
		if r.State == op.Queued {
			queued++
		}
		labels := [2]string{valid(r.VMName), string(r.Kind)}
		if r.Progress.Unit != "bytes" || told[labels] {
			continue
		}
		told[labels] = true
		out = append(out, gauge(descBytes, float64(r.Progress.Done), labels[:]...), gauge(descRate, r.Progress.Rate, labels[:]...))
		if r.Progress.Total > 0 {
			out = append(out, gauge(descBytesTotal, float64(r.Progress.Total), labels[:]...))
		}
	}
	for kind, n := range running {
		out = append(out, gauge(descRunning, float64(n), string(kind)))
	}
	return append(out, gauge(descQueued, float64(queued))), nil
}

// valid makes a string of the host fit for a label.
func valid(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

// seconds is a time as Prometheus has it.
func seconds(t time.Time) float64 { return float64(t.UnixNano()) / 1e9 }
