package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"slices"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// groupRestoration is a restore of a group that is asked for.
type groupRestoration struct {
	req            vmsnapv1.RestoreGroupRequest
	dryRun, detach bool
}

func (a *app) snapshotRestoreGroup() *cobra.Command {
	var r groupRestoration
	cmd := &cobra.Command{
		Use:   "restore-group NAME",
		Short: "Take several VMs back to a group of snapshots",
		Long: `Take the disks of all VMs of a group back to its snapshots, at one time: the
guests stand still until the disks of every one are swapped, then all are reset.

All or nothing: if one VM cannot go back, none does. With --best-effort it drops
out instead, and the exit code is 3. The state of each VM before is kept as an
automatic snapshot.`,
		Example: `  vmsnap snapshot restore-group shop-1
  vmsnap snapshot restore-group shop-1 --dry-run`,
		Args:              takes("NAME"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			if r.dryRun && r.detach {
				return usage(cmd, "--dry-run and --detach exclude each other")
			}
			if r.req.Group = args[0]; r.req.RequestId == "" {
				r.req.RequestId = rand.Text()
			}
			if r.dryRun {
				return a.planRestoreGroup(&r.req)
			}
			return a.restoreGroup(&r)
		},
	}
	flags := cmd.Flags()
	flags.BoolVar(&r.req.BestEffort, "best-effort", false, "let a VM that fails drop out, and exit with 3")
	flags.BoolVar(&r.req.NoSafetySnapshot, "no-safety-snapshot", false, "do not keep the states before")
	flags.BoolVar(&r.dryRun, "dry-run", false, "only say what would be done, or why it would be refused")
	flags.BoolVar(&r.detach, "detach", false, "return when the operation has begun")
	flags.StringVar(&r.req.RequestId, "request-id", "", "makes repeating the command safe, for 30 days")
	noFiles(cmd, "request-id")
	return cmd
}

// planRestoreGroup prints what the restore of each VM would do, and fails as it
// would.
func (a *app) planRestoreGroup(req *vmsnapv1.RestoreGroupRequest) error {
	snapshots, err := a.snapshotsOfGroup(req.GetGroup())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(a.asked, planTimeout)
	defer cancel()
	var refused error
	for _, snapshot := range snapshots {
		res, err := a.client().Snapshots().PlanRestore(ctx, connect.NewRequest(&vmsnapv1.RestoreSnapshotRequest{
			Snapshot: snapshot.GetId(), NoSafetySnapshot: req.GetNoSafetySnapshot(),
		}))
		if err != nil {
			return err
		}
		plan := res.Msg.GetPlan()
		one := restorePlanResult(plan)
		human := one.human
		one.human = func(p page, wide bool) error {
			p.line("VM %s:", plan.GetVmName())
			return human(p, wide)
		}
		if err := a.print(one); err != nil {
			return err
		}
		refused = cmp.Or(refused, blocked(plan.GetBlockers()))
	}
	return refused
}

// snapshotsOfGroup returns the snapshots of a group that is called so or was taken
// by that operation.
func (a *app) snapshotsOfGroup(ref string) ([]*vmsnapv1.Snapshot, error) {
	ctx, cancel := context.WithTimeout(a.asked, planTimeout)
	defer cancel()
	res, err := a.client().Snapshots().ListSnapshots(ctx, connect.NewRequest(&vmsnapv1.ListSnapshotsRequest{}))
	if err != nil {
		return nil, err
	}
	of := slices.DeleteFunc(res.Msg.GetSnapshots(), func(s *vmsnapv1.Snapshot) bool {
		g := s.GetGroup()
		return g == nil || g.GetName() != ref && g.GetOperationId() != ref
	})
	if len(of) == 0 {
		return nil, &exitError{code: vmsnapv1.ErrorCode_ERROR_CODE_NOT_FOUND, message: "no group of snapshots is called " + ref}
	}
	return of, nil
}

// restoreGroup restores a group and stays with it to its end.
func (a *app) restoreGroup(r *groupRestoration) error {
	daemon := a.client()
	began, err := a.begin(r.req.GetRequestId(), func(ctx context.Context) (*vmsnapv1.Operation, error) {
		res, err := daemon.Snapshots().RestoreGroup(ctx, connect.NewRequest(&r.req))
		if err != nil {
			return nil, err
		}
		return res.Msg.GetOperation(), nil
	})
	if err != nil {
		return err
	}
	if r.detach {
		return a.print(begunResult(began))
	}
	operation, err := a.stay(daemon, began)
	if err != nil {
		return err
	}
	a.warn(operation.GetWarnings())
	out := operationResult(operation)
	out.human = func(p page, _ bool) error {
		p.line("group %s restored: %s", r.req.GetGroup(), operation.GetVmName())
		return nil
	}
	if err := a.print(out); err != nil {
		return err
	}
	if !operation.GetPartial() {
		return nil
	}
	return &exitError{code: vmsnapv1.ErrorCode_ERROR_CODE_PARTIAL, message: "the restore of group " + r.req.GetGroup() + " is partial; see the warnings"}
}
