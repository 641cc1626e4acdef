package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

func (a *app) snapshot() *cobra.Command {
	return a.group(&cobra.Command{
		Use:   "snapshot",
		Short: "Take, show, restore, export, clone, verify, rename and delete snapshots",
	}, a.snapshotCreate(), a.snapshotCreateGroup(), a.snapshotList(), a.snapshotShow(), a.snapshotRestore(), a.snapshotRestoreGroup(), a.snapshotPreview(), a.snapshotExport(), a.snapshotClone(), a.snapshotTemplate(), a.snapshotVerify(), a.snapshotRename(), a.snapshotDelete())
}

func (a *app) snapshotList() *cobra.Command {
	var labels []string
	var runs runs
	order, tree := sortTime, false
	cmd := &cobra.Command{
		Use:   "list [VM]",
		Short: "List the snapshots of one VM or of all, the newest first",
		Long: `List the snapshots of one VM or of all, the newest first. With --tree they are
drawn as a tree, with the state that each VM is in now.

EXCLUSIVE is what deleting a snapshot gives back, SHARED what it needs that others
need too; see docs/space.md.`,
		Example: `  vmsnap snapshot list
  vmsnap snapshot list web --tree
  vmsnap snapshot list web --sort name
  vmsnap snapshot list --label team=infra -o name
  vmsnap snapshot list web --scheduled`,
		Args:              takes("[VM]"),
		ValidArgsFunction: a.completing(a.completeVMs),
		RunE: func(cmd *cobra.Command, args []string) error {
			if wanted, err := runs.wanted(cmd); wanted || err != nil {
				if err != nil {
					return err
				}
				return runs.list(cmd.Context(), a, strings.Join(args, ""))
			}
			wanted, err := parseLabels(cmd, labels)
			if err != nil {
				return err
			}
			if tree && (len(labels) > 0 || cmd.Flags().Changed("sort")) {
				return usage(cmd, "--tree draws all snapshots in the order in which they were taken: leave out --label and --sort")
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			req := &vmsnapv1.ListSnapshotsRequest{Labels: wanted}
			if len(args) > 0 {
				req.Vm = args[0]
			}
			res, err := a.client().Snapshots().ListSnapshots(ctx, connect.NewRequest(req))
			if err != nil {
				return err
			}
			if tree {
				return a.print(treeResult(res.Msg))
			}
			order.sort(res.Msg.GetSnapshots())
			return a.print(snapshotsResult(res.Msg))
		},
	}
	runs.flags(a, cmd)
	flags := cmd.Flags()
	flags.StringArrayVar(&labels, "label", nil, "only those with this label, `key=value`; may be repeated")
	flags.BoolVar(&tree, "tree", false, "draw the tree of the snapshots, and where each VM is in it")
	flags.Var(&order, "sort", "how to sort: time (the newest first), name or space (what gives back the most first)")
	must(cmd.RegisterFlagCompletionFunc("sort", cobra.FixedCompletions([]string{string(sortTime), string(sortName), string(sortSpace)}, cobra.ShellCompDirectiveNoFileComp)))
	return cmd
}

// sortOrder is how snapshots are sorted. It is a flag's value.
type sortOrder string

const (
	sortTime  sortOrder = "time"
	sortName  sortOrder = "name"
	sortSpace sortOrder = "space"
)

// Set takes an order's name.
func (o *sortOrder) Set(s string) error {
	if !slices.Contains([]sortOrder{sortTime, sortName, sortSpace}, sortOrder(s)) {
		return fmt.Errorf("%q is none of %s, %s, %s", s, sortTime, sortName, sortSpace)
	}
	*o = sortOrder(s)
	return nil
}

// String returns the order's name.
func (o *sortOrder) String() string { return string(*o) }

// Type returns what the help shows for the value.
func (o *sortOrder) Type() string { return "order" }

// sort sorts snapshots that come with the newest first.
func (o sortOrder) sort(snapshots []*vmsnapv1.Snapshot) {
	switch o {
	case sortName:
		slices.SortStableFunc(snapshots, func(x, y *vmsnapv1.Snapshot) int {
			return cmp.Or(cmp.Compare(x.GetVmName(), y.GetVmName()), cmp.Compare(x.GetName(), y.GetName()))
		})
	case sortSpace:
		slices.SortStableFunc(snapshots, func(x, y *vmsnapv1.Snapshot) int {
			return cmp.Compare(y.GetSpace().GetExclusive(), x.GetSpace().GetExclusive())
		})
	}
}

func snapshotsResult(msg *vmsnapv1.ListSnapshotsResponse) result {
	r := result{document: msg}
	for _, s := range msg.GetSnapshots() {
		r.names = append(r.names, snapshotName(s))
	}
	r.human = func(p page, wide bool) error {
		header := []string{"SNAPSHOT", "CONSISTENCY", "DISKS", "TAKEN"}
		if wide {
			header = append(header, "ID", "FROZEN", "WINDOW", "MEMORY", "EXCLUSIVE", "SHARED", "LABELS", "WARNINGS", "DESCRIPTION")
		}
		rows := [][]string{header}
		for _, s := range msg.GetSnapshots() {
			row := []string{snapshotName(s), consistencyText(s), diskCount(s), p.ago(s.GetCreated())}
			if wide {
				row = append(row, s.GetId(), frozenCount(s.GetQuiesce()), windowText(s.GetQuiesce()), memorySize(s.GetMemory()),
					exclusiveSize(s.GetSpace()), sharedSize(s.GetSpace()), labelsText(s.GetLabels()), warningCodes(s.GetWarnings()), s.GetDescription())
			}
			rows = append(rows, row)
		}
		p.table(rows)
		return nil
	}
	return r
}

// snapshotName returns what to call a snapshot by.
func snapshotName(s *vmsnapv1.Snapshot) string { return s.GetVmName() + "/" + s.GetName() }

func consistencyText(s *vmsnapv1.Snapshot) string {
	text := word(s.GetConsistency())
	if s.GetPartial() {
		text += ",partial"
	}
	if s.GetTemplate() {
		text += ",template"
	}
	if s.GetState() > vmsnapv1.PointState_POINT_STATE_VALID {
		text += "," + word(s.GetState())
	}
	return text
}

func diskCount(s *vmsnapv1.Snapshot) string {
	taken := 0
	for _, d := range s.GetDisks() {
		if !d.GetExcluded() {
			taken++
		}
	}
	return fmt.Sprintf("%d/%d", taken, len(s.GetDisks()))
}

func frozenCount(q *vmsnapv1.QuiesceResult) string {
	if q.GetTotal() == 0 {
		return ""
	}
	return fmt.Sprintf("%d/%d", q.GetFrozen(), q.GetTotal())
}

func windowText(q *vmsnapv1.QuiesceResult) string {
	if q.GetFreezeWindow() == nil {
		return ""
	}
	return brief(q.GetFreezeWindow().AsDuration())
}

func labelsText(labels map[string]string) string {
	var pairs []string
	for key, value := range labels {
		pairs = append(pairs, key+"="+value)
	}
	slices.Sort(pairs)
	return strings.Join(pairs, ",")
}

func warningCodes(warnings []*vmsnapv1.Warning) string {
	var codes []string
	for _, w := range warnings {
		codes = append(codes, w.GetCode())
	}
	slices.Sort(codes)
	return strings.Join(slices.Compact(codes), ",")
}

func (a *app) snapshotShow() *cobra.Command {
	return &cobra.Command{
		Use:               "show VM/NAME",
		Short:             "Show a snapshot with its disks and how consistent it is",
		Example:           `  vmsnap snapshot show web/before-upgrade`,
		Args:              takes("VM/NAME"),
		ValidArgsFunction: a.completing(a.completeSnapshots),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			res, err := a.client().Snapshots().GetSnapshot(ctx, connect.NewRequest(&vmsnapv1.GetSnapshotRequest{Snapshot: args[0]}))
			if err != nil {
				return err
			}
			return a.print(snapshotResult(res.Msg.GetSnapshot()))
		},
	}
}

func memorySize(m *vmsnapv1.SnapshotMemory) string {
	if m == nil {
		return ""
	}
	return size(m.GetSize())
}

// exclusiveSize is what deleting a snapshot gives back.
func exclusiveSize(s *vmsnapv1.SnapshotSpace) string {
	if s == nil {
		return ""
	}
	return size(s.GetExclusive())
}

func sharedSize(s *vmsnapv1.SnapshotSpace) string {
	if s == nil {
		return ""
	}
	return size(s.GetShared())
}

func (a *app) snapshotVerify() *cobra.Command {
	return &cobra.Command{
		Use:   "verify VM/NAME",
		Short: "Check a snapshot's memory against its checksum",
		Long: `Read a snapshot's memory file and compare it with the checksum that was taken
when it was saved. Fails if the file was altered, cut short or is gone.`,
		Example:           `  vmsnap snapshot verify web/before-upgrade`,
		Args:              takes("VM/NAME"),
		ValidArgsFunction: a.completing(a.completeSnapshots),
		RunE: func(_ *cobra.Command, args []string) error {
			daemon := a.client()
			ctx, cancel := context.WithTimeout(a.forced, callTimeout)
			defer cancel()
			res, err := daemon.Snapshots().VerifySnapshot(ctx, connect.NewRequest(&vmsnapv1.VerifySnapshotRequest{Snapshot: args[0]}))
			if err != nil {
				return err
			}
			operation, err := a.stay(daemon, res.Msg.GetOperation())
			if err != nil {
				return err
			}
			r := operationResult(operation)
			r.human = func(p page, _ bool) error {
				p.line("%s is as it was saved.", args[0])
				return nil
			}
			return a.print(r)
		},
	}
}

func (a *app) snapshotRename() *cobra.Command {
	return &cobra.Command{
		Use:               "rename VM/NAME NEW",
		Short:             "Rename a snapshot",
		Example:           `  vmsnap snapshot rename web/before-upgrade before-debian-13`,
		Args:              takes("VM/NAME", "NEW"),
		ValidArgsFunction: a.completing(a.completeSnapshots),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			res, err := a.client().Snapshots().RenameSnapshot(ctx, connect.NewRequest(&vmsnapv1.RenameSnapshotRequest{
				Snapshot: args[0], NewName: args[1],
			}))
			if err != nil {
				return err
			}
			s := res.Msg.GetSnapshot()
			return a.print(result{document: s, names: []string{snapshotName(s)}, human: func(p page, _ bool) error {
				p.line("%s is now %s.", args[0], snapshotName(s))
				return nil
			}})
		},
	}
}

// parseLabels reads labels as they stand on the command line.
func parseLabels(cmd *cobra.Command, pairs []string) (map[string]string, error) {
	labels := make(map[string]string, len(pairs))
	for _, pair := range pairs {
		key, value, ok := strings.Cut(pair, "=")
		if !ok || key == "" {
			return nil, usage(cmd, "the label %q is not of the form key=value", pair)
		}
		if _, twice := labels[key]; twice {
			return nil, usage(cmd, "the label %q is given twice", key)
		}
		labels[key] = value
	}
	return labels, nil
}
