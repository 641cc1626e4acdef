package metrics

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/op"
)

// Source tells what is on this host at the moment. *agent.Agent is one.
type Source interface {
	VMs(ctx context.Context) ([]agent.VMView, agent.Discovery)
	Operations(ctx context.Context, filter agent.OperationFilter) ([]op.Record, error)
}

// readTimeout bounds each reading. Prometheus gives up on a scrape after 10 s
// by default, and all readings together stay far below it.
const readTimeout = 2 * time.Second

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName(namespace, "", name), help, labels, nil)
}

var (
	descVMs          = desc("vms", "VMs that are known, by state.", "state")
	descGuestsFrozen = desc("guests_frozen", "Guests that are held frozen.")
	descGuestFrozen  = desc("guest_frozen", "1 for each guest that is held frozen; absent for the others.", "vm")
	descUnresolved   = desc("guests_freeze_unresolved", "Guests that may be frozen still, since their agent does not answer.")
	descFallback     = desc("discovery_fallback", "1 when VMs are found by scanning, since process events cannot be had.")
	descRunning      = desc("operations_running", "Operations that have not ended, by kind.", "kind")
	descBytes        = desc("operation_bytes", "Bytes that an operation which runs has moved.", "vm", "kind")
	descBytesTotal   = desc("operation_bytes_expected", "Bytes that it will have moved; absent when unknown.", "vm", "kind")
	descRate         = desc("operation_bytes_per_second", "How fast it moves them, over the last seconds.", "vm", "kind")
	descSuccess      = desc("collector_success", "Whether this part of the scrape could be read.", "collector")
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
		descVMs, descGuestsFrozen, descGuestFrozen, descUnresolved, descFallback, descRunning,
		descBytes, descBytesTotal, descRate, descSuccess,
		descLayerBytes, descForeignBytes, descMemoryBytes, descReclaimableBytes,
	} {
		out <- d
	}
}

// Collect reads everything, each reading for itself.
func (r *reader) Collect(out chan<- prometheus.Metric) {
	for _, reading := range r.readings {
		metrics, err := reading.fenced(r.source)
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
	return append(out, spaceOf(vms)...), nil
}

// maxRunning bounds the operations that are counted; there is one for each VM.
const maxRunning = 10000

func readOperations(ctx context.Context, source Source) ([]prometheus.Metric, error) {
	records, err := source.Operations(ctx, agent.OperationFilter{Active: true, Limit: maxRunning})
	if err != nil {
		return nil, err
	}
	running := map[op.Kind]int{}
	for _, kind := range kinds {
		running[kind] = 0
	}
	var out []prometheus.Metric
	told := map[[2]string]bool{} // names need not be unique
	for _, r := range records {
		running[r.Kind]++
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
	return out, nil
}

// valid makes a string of the host fit for a label.
func valid(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }
