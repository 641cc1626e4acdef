package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// restoration is a restore that is asked for.
type restoration struct {
	req            vmsnapv1.RestoreSnapshotRequest
	disks          []string
	launcher       string
	dryRun, detach bool
}

func (a *app) snapshotRestore() *cobra.Command {
	var r restoration
	cmd := &cobra.Command{
		Use:   "restore VM/NAME",
		Short: "Take a VM back to a snapshot",
		Long: `Take the disks of a VM back to what a snapshot holds: all of them, or those that
--disk names, each from this snapshot or from another one of the VM.

A running VM keeps its QEMU process. Its guest stands still while the disks are
swapped, and is then reset, as by the button: it boots from the restored disks.
When only some disks are restored the guest's file systems are frozen first.

With --memory the guest goes on from where it was when the snapshot was taken:
its memory is loaded into a new QEMU process. What a running guest has in memory
is saved before, and if the load fails it goes on from that. --launcher says who
starts QEMU; otherwise it is the VM's own unit, systemd, or vmsnapd itself.

The state before is kept as an automatic snapshot, whose name is shown; restoring
that goes back.`,
		Example: `  vmsnap snapshot restore web/before-upgrade
  vmsnap snapshot restore web/before-upgrade --dry-run
  vmsnap snapshot restore web/before-upgrade --disk root
  vmsnap snapshot restore web/monday --disk root --disk data=friday
  vmsnap snapshot restore web/before-upgrade --memory`,
		Args:              takes("VM/NAME"),
		ValidArgsFunction: a.completing(a.completeSnapshots),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := r.complete(cmd, args[0]); err != nil {
				return err
			}
			if r.dryRun {
				return a.planRestore(&r.req)
			}
			return a.restore(&r)
		},
	}
	flags := cmd.Flags()
	flags.StringArrayVar(&r.disks, "disk", nil, "restore only this `disk[=NAME]`, from another snapshot with a NAME; may be repeated")
	flags.StringArrayVar(&r.req.Exclude, "exclude", nil, "leave this `disk` as it is; may be repeated")
	flags.BoolVar(&r.req.NoSafetySnapshot, "no-safety-snapshot", false, "do not keep the state before")
	flags.BoolVar(&r.req.Memory, "memory", false, "the guest goes on from the snapshot's memory, in a new QEMU process")
	flags.StringVar(&r.launcher, "launcher", "auto", "who starts that process: auto, unit, systemd, exec or external")
	flags.BoolVar(&r.dryRun, "dry-run", false, "only say what would be done, or why it would be refused")
	flags.BoolVar(&r.detach, "detach", false, "return when the operation has begun")
	flags.StringVar(&r.req.RequestId, "request-id", "", "makes repeating the command safe, for 30 days")
	noFiles(cmd, "request-id")
	must(cmd.RegisterFlagCompletionFunc("disk", a.completing(a.completeSnapshotDisks)))
	must(cmd.RegisterFlagCompletionFunc("exclude", a.completing(a.completeSnapshotDisks)))
	must(cmd.RegisterFlagCompletionFunc("launcher", cobra.FixedCompletions(launcherNames, cobra.ShellCompDirectiveNoFileComp)))
	return cmd
}

// launcherNames are what --launcher takes.
var launcherNames = []string{"auto", "unit", "systemd", "exec", "external"}

// launcherNamed returns the launcher of a name, and whether there is one.
func launcherNamed(name string) (vmsnapv1.Launcher, bool) {
	if name == "auto" {
		return vmsnapv1.Launcher_LAUNCHER_UNSPECIFIED, true
	}
	n, ok := vmsnapv1.Launcher_value["LAUNCHER_"+strings.ToUpper(name)]
	return vmsnapv1.Launcher(n), ok && n != 0
}

// launcherName is the name of a launcher.
func launcherName(l vmsnapv1.Launcher) string {
	return strings.ToLower(strings.TrimPrefix(l.String(), "LAUNCHER_"))
}

// complete puts the request together from the command line.
func (r *restoration) complete(cmd *cobra.Command, snapshot string) error {
	if r.dryRun && r.detach {
		return usage(cmd, "--dry-run and --detach exclude each other")
	}
	r.req.Snapshot = snapshot
	choices, err := diskChoices(cmd, r.disks)
	if err != nil {
		return err
	}
	r.req.Disks = choices
	known := false
	if r.req.Launcher, known = launcherNamed(r.launcher); !known {
		return usage(cmd, "--launcher %q is none of %s", r.launcher, strings.Join(launcherNames, ", "))
	}
	if r.req.Launcher != 0 && !r.req.Memory {
		return usage(cmd, "--launcher is for --memory")
	}
	if r.req.RequestId == "" {
		r.req.RequestId = rand.Text()
	}
	return nil
}

// planRestore prints what a restore would do, and fails as it would.
func (a *app) planRestore(req *vmsnapv1.RestoreSnapshotRequest) error {
	ctx, cancel := context.WithTimeout(a.asked, planTimeout)
	defer cancel()
	res, err := a.client().Snapshots().PlanRestore(ctx, connect.NewRequest(req))
	if err != nil {
		return err
	}
	plan := res.Msg.GetPlan()
	if err := a.print(restorePlanResult(plan)); err != nil {
		return err
	}
	return blocked(plan.GetBlockers())
}

func restorePlanResult(plan *vmsnapv1.RestorePlan) result {
	r := result{document: plan, names: []string{plan.GetVmName() + "/" + plan.GetSnapshot()}}
	r.human = func(p page, wide bool) error {
		for _, line := range howRestored(plan) {
			p.line("%s", line)
		}
		rows := [][]string{{"DISK", "FROM", "SIZE"}}
		if wide {
			rows[0] = append(rows[0], "LAYER")
		}
		for _, d := range plan.GetDisks() {
			row := []string{d.GetDevice(), d.GetSnapshot(), size(d.GetVirtualSize())}
			if d.GetSnapshot() == "" {
				row[1] = "(stays as it is)"
			}
			if wide {
				row = append(row, d.GetLayer())
			}
			rows = append(rows, row)
		}
		p.table(rows)
		warningList(p, plan.GetWarnings())
		blockerList(p, plan.GetBlockers())
		return nil
	}
	return r
}

// howRestored says what would become of the VM.
func howRestored(plan *vmsnapv1.RestorePlan) (lines []string) {
	m := plan.GetMemory()
	switch {
	case m == nil && plan.GetLive():
		return []string{"The disks are swapped while QEMU runs on, and the guest is reset."}
	case m == nil:
		return []string{"The VM is stopped; its next start finds the restored disks."}
	}
	how := fmt.Sprintf("The guest goes on from its memory (%s) in a new QEMU process", size(m.GetSize()))
	if m.GetLauncher() != 0 {
		how += fmt.Sprintf(" (launcher %s)", launcherName(m.GetLauncher()))
	}
	if !m.GetRuns() {
		how += ", paused as it was"
	}
	lines = append(lines, how+".")
	if m.GetSavedIn() != "" {
		lines = append(lines, fmt.Sprintf("It stands still while its present memory is saved in %s (at most %s).", m.GetSavedIn(), size(m.GetReserve())))
	}
	return lines
}

// restore restores, and stays with it to its end.
func (a *app) restore(r *restoration) error {
	daemon := a.client()
	began, err := a.begin(r.req.GetRequestId(), func(ctx context.Context) (*vmsnapv1.Operation, error) {
		res, err := daemon.Snapshots().RestoreSnapshot(ctx, connect.NewRequest(&r.req))
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
	safety := ""
	if id := operation.GetSnapshotId(); id != "" {
		ctx, cancel := context.WithTimeout(a.forced, callTimeout)
		defer cancel()
		res, err := daemon.Snapshots().GetSnapshot(ctx, connect.NewRequest(&vmsnapv1.GetSnapshotRequest{Snapshot: id}))
		if err != nil {
			return err
		}
		safety = snapshotName(res.Msg.GetSnapshot())
	}
	out := operationResult(operation)
	out.human = func(p page, _ bool) error {
		p.line("%s restored.", r.req.GetSnapshot())
		if safety != "" {
			p.line("The state before is kept: vmsnap snapshot restore %s goes back.", safety)
		}
		return nil
	}
	return a.print(out)
}

// completeSnapshotDisks completes the disks of the snapshot that is named before
// them.
func (a *app) completeSnapshotDisks(ctx context.Context, args []string) []string {
	if len(args) == 0 {
		return nil
	}
	res, err := a.client().Snapshots().GetSnapshot(ctx, connect.NewRequest(&vmsnapv1.GetSnapshotRequest{Snapshot: args[0]}))
	if err != nil {
		return nil
	}
	var devices []string
	for _, d := range res.Msg.GetSnapshot().GetDisks() {
		if !d.GetExcluded() {
			devices = append(devices, printable(d.GetDevice())+"\t"+size(d.GetVirtualSize()))
		}
	}
	return devices
}
