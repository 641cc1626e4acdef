package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/vmsnap/vmsnap/agent"
)

var (
	descLayerBytes       = desc("vm_layer_bytes", "Data in all layers of a VM that vmsnapd may write, branches included.", "vm")
	descForeignBytes     = desc("vm_foreign_bytes", "Data in the layers below them, which other VMs may share.", "vm")
	descMemoryBytes      = desc("vm_memory_bytes", "Saved memory of a VM's snapshots.", "vm")
	descReclaimableBytes = desc("vm_reclaimable_bytes", "What deleting all snapshots of a VM would give back; absent when a file cannot be read.", "vm")
)

// spaceOf tells what VMs take that have been measured.
func spaceOf(vms []agent.VMView) []prometheus.Metric {
	var out []prometheus.Metric
	told := map[string]bool{} // names need not be unique
	for _, vm := range vms {
		name := valid(vm.Name)
		if vm.Space == nil || told[name] {
			continue
		}
		told[name] = true
		out = append(out, gauge(descLayerBytes, float64(vm.Space.Layers), name), gauge(descForeignBytes, float64(vm.Space.Foreign), name),
			gauge(descMemoryBytes, float64(vm.Space.Memory), name))
		if !vm.Space.Incomplete {
			out = append(out, gauge(descReclaimableBytes, float64(vm.Space.Reclaimable), name))
		}
	}
	return out
}
