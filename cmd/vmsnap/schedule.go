package main

import (
	"context"
	"fmt"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

func (a *app) schedule() *cobra.Command {
	return a.group(&cobra.Command{
		Use:   "schedule",
		Short: "Take snapshots at times",
	}, a.scheduleCreate(), a.scheduleList(), a.scheduleShow(), a.scheduleEdit(), a.schedulePause(), a.scheduleResume(), a.scheduleDelete())
}

const scheduleRules = `
Times are of the zone that --zone names. A time that a change of clocks leaves
out runs at the first instant after the gap; one that is there twice runs once,
at its first, but a schedule of every hour runs in both.`

func (a *app) scheduleCreate() *cobra.Command {
	var c chosen
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "create [VM]",
		Short: "Take snapshots of a VM, or of several, from now on",
		Long: `Take snapshots of a VM, or with --selector of all VMs whose names match, from now
on. The options of the snapshots are those of "vmsnap snapshot create".
` + scheduleRules,
		Example: `  vmsnap schedule create web --daily --hour 2 --minute 30 --zone Europe/Berlin
  vmsnap schedule create --selector 'db-*' --name dbs --hourly --jitter 10m --quiesce require
  vmsnap schedule create web --cron '0 6 L * *' --name monthly --missed skip`,
		Args:              takes("[VM]"),
		ValidArgsFunction: a.completing(a.completeVMs),
		RunE: func(cmd *cobra.Command, args []string) error {
			spec := &vmsnapv1.ScheduleSpec{}
			if err := c.apply(cmd, spec); err != nil {
				return err
			}
			if len(args) > 0 {
				spec.Vm = args[0]
			}
			switch {
			case (spec.GetVm() == "") == (spec.GetSelector() == ""):
				return usage(cmd, "give either a VM or --selector")
			case spec.GetName() == "" && spec.GetVm() == "":
				return usage(cmd, "a schedule of several VMs needs --name")
			case spec.GetName() == "":
				spec.Name = spec.GetVm() + "-" + word(spec.GetTiming().GetKind())
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			if dryRun {
				return a.planSchedule(ctx, &vmsnapv1.PlanScheduleRequest{Spec: spec})
			}
			res, err := a.client().Schedules().CreateSchedule(ctx, connect.NewRequest(&vmsnapv1.CreateScheduleRequest{Spec: spec}))
			if err != nil {
				return err
			}
			return a.print(changedResult(res.Msg.GetSchedule(), "is made"))
		},
	}
	c.flags(a, cmd)
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only show what would come")
	return cmd
}

// planSchedule shows what a schedule would come to.
func (a *app) planSchedule(ctx context.Context, req *vmsnapv1.PlanScheduleRequest) error {
	res, err := a.client().Schedules().PlanSchedule(ctx, connect.NewRequest(req))
	if err != nil {
		return err
	}
	return a.print(scheduleResult(res.Msg.GetSchedule()))
}

// changedResult shows a schedule that was just changed.
func changedResult(s *vmsnapv1.Schedule, what string) result {
	r := scheduleResult(s)
	r.human = func(p page, _ bool) error {
		next := "no run is to come"
		if vm := firstToRun(s); vm != nil {
			next = fmt.Sprintf("next %s at %s", vm.GetName(), p.when(vm.GetNext()))
		}
		p.line("schedule %s %s: %s; %s", s.GetSpec().GetName(), what, s.GetTimingText(), next)
		return nil
	}
	return r
}

// firstToRun returns the VM of a schedule that is next, nil if none is.
func firstToRun(s *vmsnapv1.Schedule) (first *vmsnapv1.ScheduleVM) {
	for _, vm := range s.GetVms() {
		if vm.GetNext() != nil && (first == nil || vm.GetNext().AsTime().Before(first.GetNext().AsTime())) {
			first = vm
		}
	}
	return first
}

func (a *app) scheduleList() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the schedules",
		Example: `  vmsnap schedule list
  vmsnap snapshot list --scheduled`,
		Args:              takes(),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			res, err := a.client().Schedules().ListSchedules(ctx, connect.NewRequest(&vmsnapv1.ListSchedulesRequest{}))
			if err != nil {
				return err
			}
			return a.print(schedulesResult(res.Msg))
		},
	}
}

func schedulesResult(msg *vmsnapv1.ListSchedulesResponse) result {
	r := result{document: msg}
	for _, s := range msg.GetSchedules() {
		r.names = append(r.names, s.GetSpec().GetName())
	}
	r.human = func(p page, wide bool) error {
		header := []string{"NAME", "VMS", "WHEN", "NEXT", "LAST"}
		if wide {
			header = append(header, "ID", "JITTER", "MISSED", "OVERLAP", "KEEPS", "UID")
		}
		rows := [][]string{header}
		for _, s := range msg.GetSchedules() {
			row := []string{s.GetSpec().GetName(), scheduleTarget(s), s.GetTimingText(), nextText(p, s), lastText(p, s)}
			if wide {
				row = append(row, s.GetId(), jitterText(s), word(s.GetSpec().GetMissed()), word(s.GetSpec().GetOverlap()),
					retentionText(s.GetSpec().GetRetention()), fmt.Sprint(s.GetUid()))
			}
			rows = append(rows, row)
		}
		p.table(rows)
		return nil
	}
	return r
}

func scheduleTarget(s *vmsnapv1.Schedule) string {
	if s.GetSpec().GetSelector() == "" {
		return s.GetSpec().GetVm()
	}
	return fmt.Sprintf("%s (%d)", s.GetSpec().GetSelector(), len(s.GetVms()))
}

func jitterText(s *vmsnapv1.Schedule) string {
	if s.GetSpec().GetJitter() == nil {
		return ""
	}
	return s.GetSpec().GetJitter().AsDuration().String()
}

func nextText(p page, s *vmsnapv1.Schedule) string {
	if s.GetPaused() {
		return "paused"
	}
	vm := firstToRun(s)
	if vm == nil {
		return ""
	}
	return p.in(vm.GetNext())
}

func lastText(p page, s *vmsnapv1.Schedule) string {
	var last *vmsnapv1.Run
	for _, vm := range s.GetVms() {
		if run := vm.GetLast(); run != nil && (last == nil || run.GetBegins().AsTime().After(last.GetBegins().AsTime())) {
			last = run
		}
	}
	if last == nil {
		return ""
	}
	return runResult(last) + " " + p.ago(last.GetBegins())
}

// runResult is what a run came to, in a word.
func runResult(r *vmsnapv1.Run) string {
	switch {
	case r.GetResult() != vmsnapv1.OperationState_OPERATION_STATE_UNSPECIFIED && r.GetLate():
		return word(r.GetResult()) + ",late"
	case r.GetResult() != vmsnapv1.OperationState_OPERATION_STATE_UNSPECIFIED:
		return word(r.GetResult())
	default:
		return word(r.GetState())
	}
}

func (a *app) scheduleShow() *cobra.Command {
	return &cobra.Command{
		Use:   "show NAME",
		Short: "Show a schedule, what comes next, and which snapshots stay and why",
		Example: `  vmsnap schedule show nightly
  vmsnap schedule show nightly -o json | jq -r '.vms[].next'`,
		Args:              takes("NAME"),
		ValidArgsFunction: a.completing(a.completeSchedules),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := a.getSchedule(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.print(scheduleResult(s))
		},
	}
}

func (a *app) getSchedule(ctx context.Context, ref string) (*vmsnapv1.Schedule, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	res, err := a.client().Schedules().GetSchedule(ctx, connect.NewRequest(&vmsnapv1.GetScheduleRequest{Schedule: ref}))
	if err != nil {
		return nil, err
	}
	return res.Msg.GetSchedule(), nil
}

func (a *app) scheduleEdit() *cobra.Command {
	var c chosen
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "edit NAME",
		Short: "Change what is given of a schedule, and leave the rest",
		Long: `Change what is given of a schedule, and leave the rest. If its times change, it
runs from now on by the new ones. --name gives it another name.
` + scheduleRules,
		Example: `  vmsnap schedule edit nightly --hour 3
  vmsnap schedule edit nightly --weekly sat,sun --overlap skip
  vmsnap schedule edit nightly --keep-last 7 --dry-run
  vmsnap schedule edit nightly --name weekends`,
		Args:              takes("NAME"),
		ValidArgsFunction: a.completing(a.completeSchedules),
		RunE: func(cmd *cobra.Command, args []string) error {
			given := false
			cmd.LocalFlags().VisitAll(func(f *pflag.Flag) { given = given || f.Changed })
			if !given {
				return usage(cmd, "what to change of schedule %s is not given", args[0])
			}
			s, err := a.getSchedule(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			c.req.Memory = c.req.Memory || s.GetSpec().GetSnapshot().GetMemory() && !cmd.Flags().Changed("memory")
			if err := c.apply(cmd, s.GetSpec()); err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			if dryRun {
				return a.planSchedule(ctx, &vmsnapv1.PlanScheduleRequest{Schedule: s.GetId(), Spec: s.GetSpec()})
			}
			res, err := a.client().Schedules().EditSchedule(ctx, connect.NewRequest(&vmsnapv1.EditScheduleRequest{
				Schedule: s.GetId(), Spec: s.GetSpec(), Revision: s.GetRevision(),
			}))
			if err != nil {
				return err
			}
			return a.print(changedResult(res.Msg.GetSchedule(), "is edited"))
		},
	}
	c.flags(a, cmd)
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only show what would come, and which snapshots would stay and why")
	return cmd
}

func (a *app) schedulePause() *cobra.Command {
	return &cobra.Command{
		Use:               "pause NAME",
		Short:             "Keep a schedule from running",
		Example:           `  vmsnap schedule pause nightly`,
		Args:              takes("NAME"),
		ValidArgsFunction: a.completing(a.completeSchedules),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			res, err := a.client().Schedules().PauseSchedule(ctx, connect.NewRequest(&vmsnapv1.PauseScheduleRequest{Schedule: args[0]}))
			if err != nil {
				return err
			}
			return a.print(changedResult(res.Msg.GetSchedule(), "is paused"))
		},
	}
}

func (a *app) scheduleResume() *cobra.Command {
	return &cobra.Command{
		Use:               "resume NAME",
		Short:             "Let a paused schedule run again, without what it missed",
		Example:           `  vmsnap schedule resume nightly`,
		Args:              takes("NAME"),
		ValidArgsFunction: a.completing(a.completeSchedules),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			res, err := a.client().Schedules().ResumeSchedule(ctx, connect.NewRequest(&vmsnapv1.ResumeScheduleRequest{Schedule: args[0]}))
			if err != nil {
				return err
			}
			return a.print(changedResult(res.Msg.GetSchedule(), "is resumed"))
		},
	}
}

func (a *app) scheduleDelete() *cobra.Command {
	return &cobra.Command{
		Use:               "delete NAME",
		Short:             "Remove a schedule; its snapshots stay",
		Example:           `  vmsnap schedule delete nightly`,
		Args:              takes("NAME"),
		ValidArgsFunction: a.completing(a.completeSchedules),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			res, err := a.client().Schedules().DeleteSchedule(ctx, connect.NewRequest(&vmsnapv1.DeleteScheduleRequest{Schedule: args[0]}))
			if err != nil {
				return err
			}
			return a.print(result{document: res.Msg, names: args, human: func(p page, _ bool) error {
				p.line("schedule %s is deleted; its snapshots stay", args[0])
				return nil
			}})
		},
	}
}

func (a *app) completeSchedules(ctx context.Context, args []string) []string {
	if len(args) > 0 {
		return nil
	}
	res, err := a.client().Schedules().ListSchedules(ctx, connect.NewRequest(&vmsnapv1.ListSchedulesRequest{}))
	if err != nil {
		return nil
	}
	var names []string
	for _, s := range res.Msg.GetSchedules() {
		names = append(names, printable(s.GetSpec().GetName())+"\t"+word(s.GetSpec().GetTiming().GetKind()))
	}
	return names
}
