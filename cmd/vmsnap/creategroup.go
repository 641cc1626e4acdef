package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/vmsnap/vmsnap/api/client"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// grouping is a group that is asked for.
type grouping struct {
	creation
	group   vmsnapv1.CreateGroupRequest
	maxSkew time.Duration
}

func (a *app) snapshotCreateGroup() *cobra.Command {
	var g grouping
	cmd := &cobra.Command{
		Use:   "create-group NAME VM VM...",
		Short: "Take snapshots of several VMs at one time",
		Long: `Take snapshots of several VMs at one time. The guests are frozen in the order in
which they are given; when all are, all are cut at once; then they are thawed in
reverse. By how much the cuts can lie apart is measured and kept with the
snapshots, which are all called NAME and have the label group=NAME.

All or nothing: if one VM fails, nothing is left of the others. With --best-effort
it drops out instead, and the exit code is 3.`,
		Example: `  vmsnap snapshot create-group shop-1 db queue web --quiesce require
  vmsnap snapshot create-group shop-2 db queue web --best-effort --max-skew 50ms
  vmsnap snapshot list --label group=shop-1`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) < 3 {
				return usage(cmd, "a group has a NAME and at least two VMs")
			}
			return nil
		},
		ValidArgsFunction: a.completing(a.completeVMs),
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("max-skew") && g.maxSkew <= 0 {
				return usage(cmd, "--max-skew must be more than zero")
			}
			if err := g.take(cmd); err != nil {
				return err
			}
			g.group.Name, g.group.Vms, g.group.Options, g.group.MaxSkew = args[0], args[1:], &g.req, optional(g.maxSkew)
			if g.group.RequestId == "" {
				g.group.RequestId = rand.Text()
			}
			return a.createGroup(&g)
		},
	}
	g.options(a, cmd)
	flags := cmd.Flags()
	flags.BoolVar(&g.group.BestEffort, "best-effort", false, "let a VM that fails drop out, and exit with 3")
	flags.DurationVar(&g.maxSkew, "max-skew", 0, "warn, and exit with 3, if the cuts lie further apart (default 1s)")
	flags.BoolVar(&g.detach, "detach", false, "return when the operation has begun")
	flags.StringVar(&g.group.RequestId, "request-id", "", "makes repeating the command safe, for 30 days")
	noFiles(cmd, "request-id", "max-skew")
	for _, name := range []string{"memory", "memory-strategy", "max-pause", "compress"} {
		must(flags.MarkHidden(name)) // memory is saved of one VM at a time
	}
	return cmd
}

// createGroup takes the snapshots of a group and stays with them to their end.
func (a *app) createGroup(g *grouping) error {
	daemon := a.client()
	ctx, cancel := context.WithTimeout(a.forced, callTimeout)
	defer cancel()
	res, err := daemon.Snapshots().CreateGroup(ctx, connect.NewRequest(&g.group))
	if client.OutcomeUnknown(err) {
		code, message, _ := explain(err)
		return &exitError{
			code: code, message: message, err: err,
			hint: "it may have begun all the same; the same command with --request-id " + g.group.GetRequestId() + " finds out",
		}
	}
	if err != nil {
		return err
	}
	if g.detach {
		return a.print(begunResult(res.Msg.GetOperation()))
	}
	operation, err := a.stay(daemon, res.Msg.GetOperation())
	if err != nil {
		return err
	}
	taken, err := a.groupOf(daemon, g.group.GetName(), operation.GetId())
	if err != nil {
		return err
	}
	a.warn(operation.GetWarnings())
	if err := a.print(groupResult(g.group.GetName(), taken)); err != nil {
		return err
	}
	if !operation.GetPartial() {
		return nil
	}
	return &exitError{
		code:    vmsnapv1.ErrorCode_ERROR_CODE_PARTIAL,
		message: fmt.Sprintf("group %s is partial; see the warnings", g.group.GetName()),
	}
}

// groupOf returns the snapshots of a group, in the order of their VMs.
func (a *app) groupOf(daemon *client.Client, name, operation string) (*vmsnapv1.ListSnapshotsResponse, error) {
	ctx, cancel := context.WithTimeout(a.forced, callTimeout)
	defer cancel()
	res, err := daemon.Snapshots().ListSnapshots(ctx, connect.NewRequest(&vmsnapv1.ListSnapshotsRequest{Labels: map[string]string{"group": name}}))
	if err != nil {
		return nil, fmt.Errorf("the group was taken: %w", err)
	}
	res.Msg.Snapshots = slices.DeleteFunc(res.Msg.GetSnapshots(), func(s *vmsnapv1.Snapshot) bool { return s.GetGroup().GetOperationId() != operation })
	return res.Msg, nil
}

// groupResult shows the snapshots that a group came to.
func groupResult(name string, taken *vmsnapv1.ListSnapshotsResponse) result {
	r := snapshotsResult(taken)
	table := r.human
	r.human = func(p page, wide bool) error {
		skew := ""
		if len(taken.GetSnapshots()) > 0 {
			skew = ", cut within " + brief(taken.GetSnapshots()[0].GetGroup().GetSkew().AsDuration())
		}
		p.line("group %s taken: %d snapshots%s", name, len(taken.GetSnapshots()), skew)
		return table(p, wide)
	}
	return r
}

// groupText tells of a snapshot's group.
func groupText(g *vmsnapv1.GroupCut) string {
	switch {
	case g == nil:
		return ""
	case g.GetSkew() == nil:
		return g.GetName() + ", skew unknown"
	default:
		return fmt.Sprintf("%s, %d VMs cut within %s", g.GetName(), g.GetMembers(), brief(g.GetSkew().AsDuration()))
	}
}
