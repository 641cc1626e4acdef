package docs_test

import (
	"context"
	"flag"
	"fmt"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/metrics"
)

var update = flag.Bool("update", false, "write the metrics reference instead of comparing with it")

// oneVM is a host with something in every metric.
type oneVM struct{}

func (oneVM) VMs(context.Context) ([]agent.VMView, agent.Discovery) {
	disks := []agent.DiskView{{Device: "root", SpaceLow: true}}
	return []agent.VMView{
		{ID: "1", Name: "web", State: agent.Paused, Process: &agent.ProcessView{}, Disks: disks, Freeze: &agent.FreezeView{}, Space: &agent.VMSpace{}, OutOfSpace: true},
	}, agent.Discovery{}
}

func (oneVM) Operations(context.Context, agent.OperationFilter) ([]op.Record, error) {
	return []op.Record{{Kind: op.KindSnapshot, VMName: "web", Progress: op.Progress{Done: 1, Total: 2, Unit: "bytes"}}}, nil
}

func (oneVM) Usage(context.Context) []agent.VMUsage {
	group := &discover.Usage{IO: &discover.IOUsage{}, Pressure: []discover.Pressure{{Resource: "io"}}}
	return []agent.VMUsage{{ID: "1", Name: "web", Disks: []agent.DiskUsage{{Device: "root"}}, Group: group}}
}

func (oneVM) Ledger(context.Context) (agent.Ledger, error) {
	return agent.Ledger{Size: catalog.Size{}, LastSnapshots: map[string]time.Time{"1": time.Unix(1, 0)}}, nil
}

func (oneVM) Scheduler() agent.SchedulerView {
	return agent.SchedulerView{Looked: time.Unix(1, 0), Waiting: 1, Oldest: time.Unix(1, 0)}
}

// reference returns the rows of the metrics reference as the metrics themselves
// tell them.
func reference() string {
	m := metrics.New("1.2.3")
	m.Watch(oneVM{})
	m.ObserveFreezeWindow(time.Second)
	answer := httptest.NewRecorder()
	m.Handler().ServeHTTP(answer, httptest.NewRequest("GET", "/metrics", nil))
	var names []string
	help, kinds, labels := map[string]string{}, map[string]string{}, map[string][]string{}
	sample := regexp.MustCompile(`^(vmsnap_\w+?)(?:_bucket|_sum|_count)?(?:\{(.*)\})? `)
	label := regexp.MustCompile(`(\w+)="`)
	for line := range strings.Lines(answer.Body.String()) {
		line = strings.TrimSpace(line)
		words := strings.SplitN(line, " ", 4)
		switch {
		case strings.HasPrefix(line, "# HELP vmsnap_"):
			names = append(names, words[2])
			help[words[2]] = words[3]
		case strings.HasPrefix(line, "# TYPE vmsnap_"):
			kinds[words[2]] = words[3]
		}
		if m := sample.FindStringSubmatch(line); m != nil && kinds[m[1]] != "" {
			for _, l := range label.FindAllStringSubmatch(m[2], -1) {
				if quoted := "`" + l[1] + "`"; l[1] != "le" && !slices.Contains(labels[m[1]], quoted) {
					labels[m[1]] = append(labels[m[1]], quoted)
				}
			}
		}
	}
	var rows strings.Builder
	for _, name := range names {
		fmt.Fprintf(&rows, "| `%s` | %s | %s | %s |\n", name, kinds[name], strings.Join(labels[name], ", "), strings.TrimSuffix(help[name], "."))
	}
	return rows.String()
}

// TestMetrics compares the reference with the metrics, or writes it (-update).
func TestMetrics(t *testing.T) {
	const header = "| metric | type | labels | meaning |\n|---|---|---|---|\n"
	data, err := os.ReadFile("metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	before, rest, found := strings.Cut(string(data), header)
	if !found {
		t.Fatalf("metrics.md has no table that begins with\n%s", header)
	}
	got, after, _ := strings.Cut(rest, "\n\n")
	want := reference()
	if *update {
		if err := os.WriteFile("metrics.md", []byte(before+header+want+"\n"+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(want, got+"\n"); diff != "" {
		t.Errorf("metrics.md and the metrics differ, which go test -run TestMetrics -update puts right (-metrics +document):\n%s", diff)
	}
}

// TestAlerts compares the alerts with the rules that the packages bring.
func TestAlerts(t *testing.T) {
	data, err := os.ReadFile("../packaging/prometheus/vmsnap.rules.yml")
	if err != nil {
		t.Fatal(err)
	}
	var want, got []string
	for _, m := range regexp.MustCompile(`(?m)^ +- alert: (\w+)$`).FindAllStringSubmatch(string(data), -1) {
		want = append(want, m[1])
	}
	for _, row := range table(t, "metrics.md", "alert") {
		got = append(got, strings.Split(row[0], ", ")...)
	}
	if diff := cmp.Diff(slices.Sorted(slices.Values(want)), slices.Sorted(slices.Values(got))); diff != "" {
		t.Errorf("metrics.md and the rules differ (-rules +document):\n%s", diff)
	}
}
