package metrics

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http/httptest"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
)

var update = flag.Bool("update", false, "write the golden file instead of comparing with it")

// host is a source with fixed answers.
type host struct {
	vms        []agent.VMView
	discovery  agent.Discovery
	operations func(context.Context) ([]op.Record, error)
	usage      []agent.VMUsage
	ledger     agent.Ledger
	scheduler  agent.SchedulerView
}

func (h host) Usage(context.Context) []agent.VMUsage { return h.usage }

func (h host) Ledger(context.Context) (agent.Ledger, error) { return h.ledger, nil }

func (h host) Scheduler() agent.SchedulerView { return h.scheduler }

func (h host) VMs(context.Context) ([]agent.VMView, agent.Discovery) { return h.vms, h.discovery }

func (h host) Operations(ctx context.Context, f agent.OperationFilter) ([]op.Record, error) {
	if !f.Active {
		return nil, errors.New("only what runs is asked for")
	}
	return h.operations(ctx)
}

func busyHost() host {
	held := &agent.FreezeView{Frozen: 2, Total: 2}
	process := &agent.ProcessView{PID: 1}
	chain := []agent.DiskView{{Device: "root", Layers: make([]agent.LayerView, 3), SpaceLow: true}, {Device: "data", Layers: make([]agent.LayerView, 1)}}
	group := &discover.Usage{
		IO:       &discover.IOUsage{ReadBytes: 4096, WriteBytes: 512, Reads: 2, Writes: 1},
		Pressure: []discover.Pressure{{Resource: "io", Some: 1500 * time.Millisecond, Full: 500 * time.Millisecond}},
	}
	return host{
		vms: []agent.VMView{
			{ID: "1", Name: "web", State: agent.Running, Process: process, Disks: chain, Freeze: held, Space: &agent.VMSpace{Layers: 4096, Foreign: 512, Memory: 1024, Reclaimable: 2048}},
			{ID: "2", Name: "db", State: agent.Running, Process: process, Freeze: &agent.FreezeView{Unresolved: true}},
			// Two processes of one identity are one guest in two views.
			{ID: "3", Name: "twin", State: agent.Running, Freeze: held},
			{ID: "3", Name: "twin", State: agent.Running, Freeze: held},
			// Another VM may have the same name, and any bytes in it.
			{ID: "4", Name: "web", State: agent.Paused, Freeze: held, OutOfSpace: true, Disks: chain[:1]},
			{ID: "5", Name: "odd\xff\"\n", State: agent.Paused, Freeze: held},
			{ID: "7", Name: "mute", State: agent.Unknown, Process: process},
			{ID: "8", Name: "mute", State: agent.Running, Process: process}, // another VM of the same name
			{ID: "6", Name: "off", State: agent.Stopped, Space: &agent.VMSpace{Layers: 1, Incomplete: true}},
		},
		usage: []agent.VMUsage{
			{ID: "1", Name: "web", Disks: []agent.DiskUsage{{Device: "root", Active: 1 << 20, Free: 1 << 30}, {Device: "data"}}, Group: group},
			{ID: "4", Name: "web", Disks: []agent.DiskUsage{{Device: "root", Active: 1, Free: 1}}, Group: group}, // another VM of the same name
			{ID: "2", Name: "db", Group: &discover.Usage{}},
		},
		ledger: agent.Ledger{
			Size:          catalog.Size{Database: 8192, Log: 4096, Journal: 7},
			LastSnapshots: map[string]time.Time{"1": began.Add(1500 * time.Millisecond), "gone": began},
		},
		scheduler: agent.SchedulerView{Looked: began, Waiting: 2, Oldest: began.Add(-time.Minute)},
		discovery: agent.Discovery{Source: "scan", Reason: "no netlink"},
		operations: func(context.Context) ([]op.Record, error) {
			saving := op.Progress{Done: 3 << 20, Total: 4 << 20, Unit: "bytes", Rate: 1 << 20}
			return []op.Record{
				{Kind: op.KindSnapshot, VMName: "web", Progress: saving},
				{Kind: op.KindSnapshot, VMName: "web", Progress: saving}, // another VM of the same name
				{Kind: op.KindSnapshot, VMName: "db", Progress: op.Progress{Done: 5, Unit: "bytes"}},
				{Kind: op.KindClone, VMName: "db", State: op.Queued},
				{Kind: op.KindFreeze, VMName: "db", Progress: op.Progress{Done: 1, Total: 3, Unit: "steps"}},
			}, nil
		},
	}
}

var began = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func ended(kind op.Kind, state op.State, took time.Duration, change func(*op.Record)) op.Record {
	r := op.Record{Kind: kind, State: state, Started: began, Ended: began.Add(took)}
	if change != nil {
		change(&r)
	}
	return r
}

func failing(kind fault.Kind) func(*op.Record) {
	return func(r *op.Record) { r.Failure = &op.Failure{Kind: kind} }
}

// busy returns metrics in which everything has happened.
func busy() *Metrics {
	m := New("1.2.3")
	m.Watch(busyHost())
	m.ObserveFreezeWindow(84 * time.Millisecond)
	m.ObserveFreezeWindow(31 * time.Second)
	m.ObservePause(21 * time.Millisecond)
	m.ObserveRun(true, 90*time.Second)
	m.ObserveRun(false, time.Hour)
	for _, r := range []op.Record{
		ended(op.KindSnapshot, op.Succeeded, 700*time.Millisecond, nil),
		ended(op.KindSnapshot, op.Succeeded, 3*time.Second, func(r *op.Record) { r.Partial = true }),
		ended(op.KindSnapshot, op.Failed, 20*time.Second, failing(fault.NoSpace)),
		ended(op.KindSnapshot, op.Failed, time.Second, failing("never heard of")),
		ended(op.KindSnapshot, op.Cancelled, time.Second, failing(fault.Cancelled)),
		ended(op.KindFreeze, op.Failed, time.Second, nil),
		// Cancelled before it ran: counted, without a duration.
		ended(op.KindSettle, op.Cancelled, 0, func(r *op.Record) { r.Started = time.Time{} }),
	} {
		m.ObserveOperation(r)
	}
	return m
}

func scrape(t *testing.T, m *Metrics) string {
	t.Helper()
	rec := httptest.NewRecorder()
	m.Handler().ServeHTTP(rec, httptest.NewRequest("GET", "/metrics", nil))
	if rec.Code != 200 {
		t.Fatalf("the scrape failed with %d: %s", rec.Code, rec.Body)
	}
	return rec.Body.String()
}

var goVersion = regexp.MustCompile(`goversion="[^"]*"`)

// ours leaves out what the libraries tell of the process.
func ours(text string) string {
	var out strings.Builder
	for line := range strings.Lines(text) {
		name := strings.TrimPrefix(strings.TrimPrefix(line, "# HELP "), "# TYPE ")
		if !strings.HasPrefix(name, "go_") && !strings.HasPrefix(name, "process_") {
			out.WriteString(line)
		}
	}
	return goVersion.ReplaceAllString(out.String(), `goversion="GO"`)
}

func TestGolden(t *testing.T) {
	text := scrape(t, busy())
	for _, family := range []string{"go_goroutines ", "process_resident_memory_bytes ", "process_open_fds "} {
		if !strings.Contains(text, "\n"+family) {
			t.Errorf("the process is not told of: %s is missing", family)
		}
	}
	got := ours(text)
	const file = "testdata/metrics.golden"
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", file, diff)
	}
}

func TestPromtool(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "promtool", "check", "metrics")
	cmd.Stdin = strings.NewReader(scrape(t, busy()))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil || out.Len() > 0 {
		t.Errorf("promtool: %v\n%s", err, &out)
	}
}

// TestFailedReading has a source that fails: the rest is still told.
func TestFailedReading(t *testing.T) {
	h := busyHost()
	h.operations = func(context.Context) ([]op.Record, error) { return nil, errors.New("the catalog is gone") }
	m := New("1")
	m.Watch(h)
	text := scrape(t, m)
	for _, line := range []string{
		`vmsnap_collector_success{collector="operations"} 0`,
		`vmsnap_collector_success{collector="vms"} 1`,
		`vmsnap_vms{state="running"} 5`,
	} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("missing: %s", line)
		}
	}
	if strings.Contains(text, "vmsnap_operations_running{") {
		t.Error("what could not be read is told all the same")
	}
}

// TestHungReading has a source that hangs and ignores its context: scrapes go
// on, none piles up behind it, and it is read again once it has returned.
func TestHungReading(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		var calls atomic.Int32
		h := busyHost()
		h.operations = func(context.Context) ([]op.Record, error) {
			calls.Add(1)
			<-release
			return nil, nil
		}
		m := New("1")
		m.Watch(h)
		for range 3 {
			before := time.Now()
			if text := scrape(t, m); !strings.Contains(text, `vmsnap_collector_success{collector="operations"} 0`) {
				t.Error("a hung reading is called a success")
			}
			if took := time.Since(before); took > readTimeout {
				t.Errorf("the scrape took %s", took)
			}
		}
		if n := calls.Load(); n != 1 {
			t.Errorf("%d readings hang; want 1", n)
		}
		close(release)
		synctest.Wait()
		if text := scrape(t, m); !strings.Contains(text, `vmsnap_collector_success{collector="operations"} 1`) {
			t.Error("it is not read again")
		}
	})
}

// TestCardinality has a host with many VMs and much work on them: what is told
// grows with the VMs and their disks, and with nothing else.
func TestCardinality(t *testing.T) {
	series := func(vms, operations int) int {
		var h host
		for i := range vms {
			name := fmt.Sprint("vm", i)
			h.vms = append(h.vms, agent.VMView{
				ID: name, Name: name, State: agent.Paused, Process: &agent.ProcessView{}, Freeze: &agent.FreezeView{}, Space: &agent.VMSpace{},
				Disks: []agent.DiskView{{Device: "root", Layers: make([]agent.LayerView, i), SpaceLow: true}}, OutOfSpace: true,
			})
			h.usage = append(h.usage, agent.VMUsage{ID: name, Name: name, Disks: []agent.DiskUsage{{Device: "root"}}})
		}
		h.operations = func(context.Context) ([]op.Record, error) {
			var all []op.Record
			for i := range operations { // of VMs that other operations held before
				all = append(all, op.Record{ID: fmt.Sprint(i), Kind: op.KindSnapshot, VMName: "vm0", Progress: op.Progress{Done: 1, Total: 2, Unit: "bytes"}})
			}
			return all, nil
		}
		m := New("1")
		m.Watch(h)
		for i := range operations {
			m.ObserveOperation(ended(op.KindSnapshot, op.Failed, time.Second, failing(fault.Kind(fmt.Sprint("of a kind of its own ", i)))))
		}
		n := 0
		for line := range strings.Lines(scrape(t, m)) {
			if strings.HasPrefix(line, "vmsnap_") {
				n++
			}
		}
		return n
	}
	if one, many := series(1, 1), series(1, 1000); one != many {
		t.Errorf("%d series with one operation, %d with 1000", one, many)
	}
	const ofEach = 12 // of a VM with one disk
	if few, many := series(10, 1), series(110, 1); many-few > 100*ofEach {
		t.Errorf("100 more VMs make %d more series; want %d at most", many-few, 100*ofEach)
	}
}
