package metrics

import (
	"context"
	"fmt"
	"net/http/httptest"
	"testing"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/op"
)

// BenchmarkScrape reads the metrics of 500 VMs with two disks, gathered and
// written as for Prometheus; what the agent takes to tell of them comes on top.
func BenchmarkScrape(b *testing.B) {
	h := host{operations: func(context.Context) ([]op.Record, error) { return nil, nil }}
	process := &agent.ProcessView{PID: 1}
	for i := range 500 {
		vm := agent.VMView{
			ID: fmt.Sprint(i), Name: fmt.Sprintf("web-%03d", i), State: agent.Running, Process: process,
			Disks: []agent.DiskView{{Device: "root", Layers: make([]agent.LayerView, 3)}, {Device: "data", Layers: make([]agent.LayerView, 1)}},
			Space: &agent.VMSpace{Layers: 4096},
		}
		h.vms = append(h.vms, vm)
		h.usage = append(h.usage, agent.VMUsage{ID: vm.ID, Name: vm.Name, Disks: []agent.DiskUsage{{Device: "root", Active: 1, Free: 1}, {Device: "data", Active: 1, Free: 1}}})
	}
	m := New("1.2.3")
	m.Watch(h)
	handler := m.Handler()
	b.ReportAllocs()
	for b.Loop() {
		rec := httptest.NewRecorder()
		handler.ServeHTTP(rec, httptest.NewRequest("GET", "/metrics", nil))
		if rec.Code != 200 {
			b.Fatal(rec.Code, rec.Body)
		}
	}
}
