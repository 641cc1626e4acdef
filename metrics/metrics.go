package metrics

import (
	"net/http"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
)

// namespace begins the names of all metrics of this program.
const namespace = "vmsnap"

// Metrics are the metrics of one daemon.
type Metrics struct {
	registry   *prometheus.Registry
	operations *prometheus.CounterVec
	durations  *prometheus.HistogramVec
	windows    prometheus.Histogram
	pauses     prometheus.Histogram
	lateness   prometheus.Histogram
	skipped    prometheus.Counter
}

// The values of the label "result" beside the fault kinds.
const (
	resultSucceeded = "succeeded"
	resultPartial   = string(fault.Partial)
)

var (
	faults = []fault.Kind{
		fault.Failed, fault.Usage, fault.NotFound, fault.NotQuiesced, fault.NoSpace, fault.Denied, fault.Unresponsive,
		fault.Busy, fault.HasDependants, fault.Exists, fault.Unsupported, fault.TooLate, fault.Cancelled,
	}
)

// New returns the metrics of a daemon of this version.
func New(version string) *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		operations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: namespace, Name: "operations_total",
			Help: "Operations that have ended: `succeeded`, `partial`, or why not, in the words of the exit codes.",
		}, []string{"kind", "result"}),
		durations: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: namespace, Name: "operation_duration_seconds",
			Help:    "How long operations ran, from their start to their end.",
			Buckets: []float64{.1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200},
		}, []string{"kind"}),
		windows: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: namespace, Name: "freeze_window_seconds",
			Help:    "How long guests were frozen, from the freeze request to the thaw reply.",
			Buckets: []float64{.01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 30, 60, 300},
		}),
		pauses: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: namespace, Name: "guest_pause_seconds",
			Help:    "How long guests' CPUs stood still for a snapshot with memory.",
			Buckets: []float64{.005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 60, 300},
		}),
	}
	m.lateness = prometheus.NewHistogram(prometheus.HistogramOpts{
		Namespace: namespace, Name: "schedule_lateness_seconds",
		Help:    "By how much the runs of schedules began too late, jitter left out.",
		Buckets: []float64{1, 5, 15, 60, 300, 900, 3600, 14400, 86400},
	})
	m.skipped = prometheus.NewCounter(prometheus.CounterOpts{
		Namespace: namespace, Name: "schedule_runs_skipped_total",
		Help: "Runs of schedules that did not begin; an event says why.",
	})
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Namespace: namespace, Name: "build_info",
		Help:        "Always 1; the labels say which program this is.",
		ConstLabels: prometheus.Labels{"version": valid(version), "goversion": runtime.Version()},
	})
	build.Set(1)
	// A counter that appears with its first event hides that event from rate().
	for _, kind := range op.Kinds {
		m.durations.WithLabelValues(string(kind))
		for _, result := range append([]fault.Kind{resultSucceeded, fault.Partial}, faults...) {
			m.operations.WithLabelValues(string(kind), string(result))
		}
	}
	m.registry.MustRegister(build, m.operations, m.durations, m.windows, m.pauses, m.lateness, m.skipped,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// ObserveOperation counts an operation that has ended.
func (m *Metrics) ObserveOperation(r op.Record) {
	m.operations.WithLabelValues(string(r.Kind), resultOf(r)).Inc()
	if !r.Started.IsZero() && !r.Ended.IsZero() {
		m.durations.WithLabelValues(string(r.Kind)).Observe(r.Ended.Sub(r.Started).Seconds())
	}
}

// resultOf returns how an operation ended, as one of a fixed set of words.
func resultOf(r op.Record) string {
	switch {
	case r.State == op.Succeeded && r.Partial:
		return resultPartial
	case r.State == op.Succeeded:
		return resultSucceeded
	case r.State == op.Cancelled:
		return string(fault.Cancelled)
	}
	if r.Failure != nil {
		for _, kind := range faults {
			if r.Failure.Kind == kind {
				return string(kind)
			}
		}
	}
	return string(fault.Failed)
}

// ObserveFreezeWindow notes how long a guest was frozen.
func (m *Metrics) ObserveFreezeWindow(d time.Duration) { m.windows.Observe(d.Seconds()) }

// ObservePause notes how long a guest's CPUs stood still.
func (m *Metrics) ObservePause(d time.Duration) { m.pauses.Observe(d.Seconds()) }

// ObserveRun notes a run of a schedule that begins or is skipped, and by how much
// that was late.
func (m *Metrics) ObserveRun(begun bool, late time.Duration) {
	if !begun {
		m.skipped.Inc()
		return
	}
	m.lateness.Observe(late.Seconds())
}

// Watch adds what a source tells whenever it is asked. It is called once.
func (m *Metrics) Watch(source Source) { m.registry.MustRegister(newReader(source)) }

// Handler serves the metrics.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{
		ErrorHandling:       promhttp.ContinueOnError,
		MaxRequestsInFlight: 8, // scrapers are few; what comes in masses is a mistake
	})
}
