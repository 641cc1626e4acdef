package metrics

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"
)

var (
	descActiveBytes  = desc("disk_active_layer_bytes", "What the layer that a disk grows in takes on its file system.", "vm", "disk")
	descFreeBytes    = desc("disk_free_bytes", "What is free on the file system that a disk grows in.", "vm", "disk")
	descIOBytes      = desc("vm_io_bytes_total", "What a VM has read and written on the host's devices; absent unless it has a control group of its own.", "vm", "direction")
	descIOOperations = desc("vm_io_operations_total", "How often it has done so.", "vm", "direction")
	descPressure     = desc("vm_pressure_seconds_total", "For how long `some` or all (`full`) of a VM's threads stood still for want of something; absent unless it has a control group of its own.", "vm", "resource", "stalled")

	descCatalogBytes   = desc("catalog_bytes", "Size of the catalog's files.", "file")
	descJournalEntries = desc("journal_entries", "Entries in the journals of operations that have not ended.")
	descLastSnapshot   = desc("vm_last_snapshot_timestamp_seconds", "When the newest snapshot of a VM that can be restored was cut; absent when it has none.", "vm")

	descRunsWaiting = desc("schedule_runs_waiting", "Runs of schedules that were due and have not begun.")
	descOldestRun   = desc("schedule_oldest_waiting_timestamp_seconds", "When the oldest of them was to begin; absent when there is none.")
	descLooked      = desc("schedule_look_timestamp_seconds", "When vmsnapd last looked at its schedules, which it does every half a minute; absent before the first time.")
)

func counter(d *prometheus.Desc, value float64, labels ...string) prometheus.Metric {
	return prometheus.MustNewConstMetric(d, prometheus.CounterValue, value, labels...)
}

// readUsage tells what VMs take of the host.
func readUsage(ctx context.Context, source Source) ([]prometheus.Metric, error) {
	var out []prometheus.Metric
	told := map[[2]string]bool{} // names need not be unique
	for _, vm := range source.Usage(ctx) {
		name := valid(vm.Name)
		for _, d := range vm.Disks {
			key := [2]string{name, valid(d.Device)}
			if told[key] {
				continue
			}
			told[key] = true
			out = append(out, gauge(descActiveBytes, float64(d.Active), key[:]...), gauge(descFreeBytes, float64(d.Free), key[:]...))
		}
		whole := [2]string{name, ""}
		if vm.Group == nil || told[whole] {
			continue
		}
		told[whole] = true
		if io := vm.Group.IO; io != nil {
			out = append(out,
				counter(descIOBytes, float64(io.ReadBytes), name, "read"), counter(descIOBytes, float64(io.WriteBytes), name, "write"),
				counter(descIOOperations, float64(io.Reads), name, "read"), counter(descIOOperations, float64(io.Writes), name, "write"))
		}
		for _, p := range vm.Group.Pressure {
			out = append(out, counter(descPressure, p.Some.Seconds(), name, p.Resource, "some"), counter(descPressure, p.Full.Seconds(), name, p.Resource, "full"))
		}
	}
	return out, nil
}

// readLedger tells of the catalog.
func readLedger(ctx context.Context, source Source) ([]prometheus.Metric, error) {
	ledger, err := source.Ledger(ctx)
	if err != nil {
		return nil, err
	}
	out := []prometheus.Metric{
		gauge(descCatalogBytes, float64(ledger.Database), "database"), gauge(descCatalogBytes, float64(ledger.Log), "log"),
		gauge(descJournalEntries, float64(ledger.Journal)),
	}
	told := map[string]bool{} // names need not be unique
	vms, _ := source.VMs(ctx)
	for _, vm := range vms {
		name := valid(vm.Name)
		if cut, has := ledger.LastSnapshots[vm.ID]; has && !told[name] {
			told[name] = true
			out = append(out, gauge(descLastSnapshot, seconds(cut), name))
		}
	}
	return out, nil
}

// readScheduler tells of the schedules.
func readScheduler(_ context.Context, source Source) ([]prometheus.Metric, error) {
	s := source.Scheduler()
	out := []prometheus.Metric{gauge(descRunsWaiting, float64(s.Waiting))}
	if !s.Oldest.IsZero() {
		out = append(out, gauge(descOldestRun, seconds(s.Oldest)))
	}
	if !s.Looked.IsZero() {
		out = append(out, gauge(descLooked, seconds(s.Looked)))
	}
	return out, nil
}
