package main

import (
	"context"
	"crypto/rand"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// deletion is a deletion that is asked for.
type deletion struct {
	req                 vmsnapv1.DeleteSnapshotsRequest
	labels              []string
	olderThan, speed    string
	dryRun, detach, all bool
}

func (a *app) snapshotDelete() *cobra.Command {
	var d deletion
	cmd := &cobra.Command{
		Use:   "delete VM/NAME… | VM",
		Short: "Delete snapshots, and merge what nothing needs any more",
		Long: `Delete snapshots of a VM: those that are named, or with --label, --older-than or
--all those of a VM that fit. Templates are never chosen so.

The layers that only these snapshots needed are merged with their neighbours, in
the direction that moves fewer bytes, by QEMU while the VM runs. --dry-run shows
what would move. From the first merge on a snapshot cannot be restored any more.

Where several branches lie on a layer the deletion is refused and names them.
--flatten gives each its own copy of what it needs; --keep-layers deletes the
snapshot all the same, and keeps the layer for as long as they are there.`,
		Example: `  vmsnap snapshot delete web/before-upgrade
  vmsnap snapshot delete web/monday web/tuesday --dry-run
  vmsnap snapshot delete web --older-than 30d --label schedule=nightly
  vmsnap snapshot delete web --all --speed 100MiB`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usage(cmd, "VM/NAME is not given")
			}
			return nil
		},
		ValidArgsFunction: a.completing(a.completeSnapshots),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := d.complete(cmd, args); err != nil {
				return err
			}
			if d.dryRun {
				return a.planDelete(&d.req)
			}
			return a.delete(&d)
		},
	}
	flags := cmd.Flags()
	flags.StringArrayVar(&d.labels, "label", nil, "delete those of the VM with this label, `key=value`; may be repeated")
	flags.StringVar(&d.olderThan, "older-than", "", "delete those of the VM that are older than this `age`, such as 30d")
	flags.BoolVar(&d.all, "all", false, "delete all of the VM")
	flags.BoolVar(&d.req.Flatten, "flatten", false, "give each branch that lies on a layer its own copy of what it needs")
	flags.BoolVar(&d.req.KeepLayers, "keep-layers", false, "keep layers on which several branches lie, without a snapshot")
	flags.StringVar(&d.speed, "speed", "", "copy at most this `size` a second, such as 100MiB")
	flags.BoolVar(&d.dryRun, "dry-run", false, "only say what would be done, or why it would be refused")
	flags.BoolVar(&d.detach, "detach", false, "return when the operation has begun")
	flags.StringVar(&d.req.RequestId, "request-id", "", "makes repeating the command safe, for 30 days")
	noFiles(cmd, "request-id", "label", "older-than", "speed")
	return cmd
}

// complete puts the request together from the command line.
func (d *deletion) complete(cmd *cobra.Command, args []string) (err error) {
	if d.dryRun && d.detach {
		return usage(cmd, "--dry-run and --detach exclude each other")
	}
	if d.req.Labels, err = parseLabels(cmd, d.labels); err != nil {
		return err
	}
	if d.olderThan != "" {
		age, err := parseAge(d.olderThan)
		if err != nil || age <= 0 {
			return usage(cmd, "--older-than: %q is not an age such as 30d, 4w or 12h", d.olderThan)
		}
		d.req.OlderThan = durationpb.New(age)
	}
	if d.speed != "" {
		if d.req.Speed, err = parseSize(d.speed); err != nil {
			return usage(cmd, "--speed: %v", err)
		}
	}
	d.req.All = d.all
	if d.req.RequestId == "" {
		d.req.RequestId = rand.Text()
	}
	if !d.all && d.olderThan == "" && len(d.labels) == 0 {
		d.req.Snapshots = args
		return nil
	}
	if len(args) != 1 || strings.Contains(args[0], "/") {
		return usage(cmd, "--label, --older-than and --all choose among the snapshots of one VM: name the VM alone")
	}
	d.req.Vm = args[0]
	return nil
}

// planDelete prints what a deletion would do, and fails as it would.
func (a *app) planDelete(req *vmsnapv1.DeleteSnapshotsRequest) error {
	ctx, cancel := context.WithTimeout(a.asked, planTimeout)
	defer cancel()
	res, err := a.client().Snapshots().PlanDelete(ctx, connect.NewRequest(req))
	if err != nil {
		return err
	}
	plan := res.Msg.GetPlan()
	if err := a.print(deletePlanResult(plan)); err != nil {
		return err
	}
	return blocked(plan.GetBlockers())
}

func deletePlanResult(plan *vmsnapv1.DeletePlan) result {
	r := result{document: plan}
	for _, name := range plan.GetSnapshots() {
		r.names = append(r.names, plan.GetVmName()+"/"+name)
	}
	r.human = func(p page, wide bool) error {
		p.line("Deleting %d %s of %s, which %s, gives back %s.", len(plan.GetSnapshots()), plural(len(plan.GetSnapshots()), "snapshot"), plan.GetVmName(), runsOr(plan.GetLive()), size(plan.GetFreed()))
		if plan.GetMoved() > 0 {
			p.line("%s would be copied.", size(plan.GetMoved()))
		}
		rows := [][]string{{"DISK", "WAY", "COPIED", "BY", "WHY"}}
		if wide {
			rows[0] = append(rows[0], "ROOM", "LAYER", "INTO")
		}
		for _, m := range plan.GetMerges() {
			row := []string{m.GetDevice(), word(m.GetWay()), size(m.GetBytes()), mergedBy(m), mergedSo(m)}
			if wide {
				row = append(row, size(m.GetRoom()), m.GetLayer(), m.GetInto())
			}
			rows = append(rows, row)
		}
		if len(rows) > 1 {
			p.table(rows)
		}
		for _, k := range plan.GetKept() {
			why := k.GetReason()
			if len(k.GetDependants()) > 0 {
				why = "on it lie " + strings.Join(k.GetDependants(), ", ")
			}
			p.line("Disk %s keeps the layer %s: %s", k.GetDevice(), k.GetLayer(), why)
		}
		warningList(p, plan.GetWarnings())
		blockerList(p, plan.GetBlockers())
		return nil
	}
	return r
}

func runsOr(live bool) string {
	if live {
		return "runs"
	}
	return "is stopped"
}

// mergedSo says why a merge goes the way that it does.
func mergedSo(m *vmsnapv1.DeletePlanMerge) string {
	other := vmsnapv1.MergeWay_MERGE_WAY_STREAM
	switch m.GetWay() {
	case vmsnapv1.MergeWay_MERGE_WAY_REMOVE:
		return "nothing lies on it"
	case vmsnapv1.MergeWay_MERGE_WAY_FLATTEN:
		return "several layers lie on it"
	case vmsnapv1.MergeWay_MERGE_WAY_STREAM:
		other = vmsnapv1.MergeWay_MERGE_WAY_COMMIT
	}
	if m.GetOnlyWay() != "" {
		return "no " + word(other) + ": " + m.GetOnlyWay()
	}
	return word(other) + " would copy " + size(m.GetOtherBytes())
}

// mergedBy says who does a merge.
func mergedBy(m *vmsnapv1.DeletePlanMerge) string {
	switch {
	case m.GetWay() == vmsnapv1.MergeWay_MERGE_WAY_REMOVE:
		return ""
	case m.GetLive():
		return "QEMU"
	default:
		return "qemu-img"
	}
}

// delete deletes, and stays with it to its end.
func (a *app) delete(d *deletion) error {
	operation, err := a.carry(d.req.GetRequestId(), d.detach, func(ctx context.Context) (*vmsnapv1.Operation, error) {
		res, err := a.client().Snapshots().DeleteSnapshots(ctx, connect.NewRequest(&d.req))
		if err != nil {
			return nil, err
		}
		return res.Msg.GetOperation(), nil
	})
	if err != nil || operation == nil {
		return err
	}
	out := operationResult(operation)
	out.human = func(p page, _ bool) error {
		if len(d.req.GetSnapshots()) == 0 {
			p.line("Snapshots of %s deleted.", d.req.GetVm())
			return nil
		}
		p.line("%s deleted.", strings.Join(d.req.GetSnapshots(), ", "))
		return nil
	}
	return a.print(out)
}
