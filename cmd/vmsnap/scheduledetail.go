package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// scheduleResult shows a schedule whole.
func scheduleResult(s *vmsnapv1.Schedule) result {
	return result{document: s, names: []string{s.GetSpec().GetName()}, human: func(p page, _ bool) error {
		scheduleDetail(p, s)
		return nil
	}}
}

func scheduleDetail(p page, s *vmsnapv1.Schedule) {
	spec := s.GetSpec()
	paused := ""
	if s.GetPaused() {
		paused = "yes"
	}
	p.fields(
		"Schedule", spec.GetName(),
		"ID", s.GetId(),
		"VMs", scheduleTarget(s),
		"When", s.GetTimingText(),
		"Paused", paused,
		"Jitter", jitterText(s),
		"Missed runs", word(spec.GetMissed()),
		"Overlaps", word(spec.GetOverlap()),
		"Keeps", retentionText(spec.GetRetention()),
		"Names", spec.GetNameTemplate(),
		"Snapshots", optionsText(spec.GetSnapshot()),
		"Changed", p.when(s.GetChanged()),
		"UID", strconv.Itoa(int(s.GetUid())),
	)
	for _, vm := range s.GetVms() {
		p.line("")
		p.line("%s:", vm.GetName())
		rows := [][]string{{"next", p.when(vm.GetNext())}}
		if run := vm.GetLast(); run != nil {
			last := p.when(run.GetBegins()) + ", " + runResult(run)
			if run.GetMessage() != "" {
				last += ": " + run.GetMessage()
			}
			rows = append(rows, []string{"last", last})
		}
		p.columns("  ", rows)
		for _, v := range vm.GetVerdicts() {
			fate := "goes"
			if v.GetStays() {
				fate = "stays"
			}
			p.line("  %s %s: %s", v.GetSnapshot(), fate, strings.Join(v.GetReasons(), "; "))
		}
	}
}

// optionsText tells the options of snapshots that differ from the plain ones.
func optionsText(o *vmsnapv1.CreateSnapshotRequest) string {
	var parts []string
	add := func(given bool, format string, args ...any) {
		if given {
			parts = append(parts, fmt.Sprintf(format, args...))
		}
	}
	add(len(o.GetDisks()) > 0, "disks %s", strings.Join(o.GetDisks(), ","))
	add(len(o.GetExclude()) > 0, "without %s", strings.Join(o.GetExclude(), ","))
	add(o.GetProfile() != "", "profile %s", o.GetProfile())
	add(o.GetQuiesce() != vmsnapv1.Quiesce_QUIESCE_UNSPECIFIED, "quiesce %s", word(o.GetQuiesce()))
	add(o.GetMemory(), "with memory")
	add(o.GetMaxPause() != nil, "max. pause %s", o.GetMaxPause().AsDuration())
	add(o.GetExpireAfter() != nil, "expire after %s", o.GetExpireAfter().AsDuration())
	add(o.GetStrict(), "strict")
	add(o.GetAllowPartial(), "allow partial")
	add(len(o.GetLabels()) > 0, "labels %s", labelsText(o.GetLabels()))
	return strings.Join(parts, "; ")
}

// in returns how far off a time is, in one unit.
func (p page) in(t *timestamppb.Timestamp) string {
	if d := t.AsTime().Sub(p.now); d >= time.Second {
		return "in " + unit(d)
	}
	return "now"
}

// runs are the flags of what schedules have run and will run.
type runs struct {
	taken, scheduled bool
	disk             string
}

func (r *runs) flags(a *app, cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.BoolVar(&r.taken, "taken", false, "what schedules have taken, by VM and disk")
	flags.BoolVar(&r.scheduled, "scheduled", false, "what schedules will take next, by VM and disk")
	flags.StringVar(&r.disk, "disk", "", "with --taken or --scheduled, only this `disk`")
	must(cmd.RegisterFlagCompletionFunc("disk", a.completing(a.completeDisks)))
}

// wanted reports whether runs are asked for instead of snapshots.
func (r *runs) wanted(cmd *cobra.Command) (bool, error) {
	switch {
	case r.taken && r.scheduled:
		return false, usage(cmd, "--taken and --scheduled exclude each other")
	case r.taken || r.scheduled:
		for _, name := range []string{"label", "sort"} {
			if cmd.Flags().Changed(name) {
				return false, usage(cmd, "--%s is not for --taken and --scheduled", name)
			}
		}
		return true, nil
	case r.disk != "":
		return false, usage(cmd, "--disk is for --taken and --scheduled")
	default:
		return false, nil
	}
}

// list prints the runs of one VM, or of all when it is empty.
func (r *runs) list(ctx context.Context, a *app, vm string) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	res, err := a.client().Schedules().ListRuns(ctx, connect.NewRequest(&vmsnapv1.ListRunsRequest{Coming: r.scheduled, Vm: vm, Disk: r.disk}))
	if err != nil {
		return err
	}
	return a.print(runsResult(res.Msg, r.scheduled, r.disk))
}

// runsResult shows runs, a line for each disk.
func runsResult(msg *vmsnapv1.ListRunsResponse, coming bool, disk string) result {
	r := result{document: msg}
	for _, run := range msg.GetRuns() {
		if run.GetSnapshot() != "" {
			r.names = append(r.names, run.GetVmName()+"/"+run.GetSnapshot())
		} else {
			r.names = append(r.names, run.GetVmName()+" "+run.GetSchedule()+" "+run.GetBegins().AsTime().Format(time.RFC3339))
		}
	}
	r.human = func(p page, wide bool) error {
		header := []string{"VM", "DISK", "SCHEDULE", "SNAPSHOT", "RESULT", "TAKEN"}
		if coming {
			header = []string{"VM", "DISK", "SCHEDULE", "WHEN"}
		}
		if wide {
			header = append(header, "FOR", "OPERATION", "MESSAGE")
		}
		rows := [][]string{header}
		for _, run := range msg.GetRuns() {
			devices := run.GetDisks()
			if disk != "" {
				devices = []string{disk}
			}
			if len(devices) == 0 {
				devices = []string{""}
			}
			for _, device := range devices {
				row := []string{run.GetVmName(), device, run.GetSchedule()}
				if coming {
					row = append(row, p.when(run.GetBegins()))
				} else {
					row = append(row, run.GetSnapshot(), runResult(run), p.ago(run.GetBegins()))
				}
				if wide {
					row = append(row, run.GetTime().AsTime().Format("2006-01-02 15:04:05 UTC"), run.GetOperationId(), run.GetMessage())
				}
				rows = append(rows, row)
			}
		}
		p.table(rows)
		return nil
	}
	return r
}
