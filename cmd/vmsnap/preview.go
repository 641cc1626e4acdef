package main

import (
	"context"
	"crypto/rand"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

func (a *app) snapshotPreview() *cobra.Command {
	var req vmsnapv1.PreviewSnapshotRequest
	var disks []string
	network, launcher := "isolated", "auto"
	cmd := &cobra.Command{
		Use:   "preview VM/NAME",
		Short: "Have a VM run a snapshot for trial",
		Long: `Have a VM run what a snapshot holds, for trial: vmsnap preview commit keeps it,
vmsnap preview undo goes back to the state before. Until then the VM takes no
other change.

The network links of the VM are down meanwhile, as if their cables were pulled
out; --network connected leaves them up.

What a running guest has in memory is saved first, and undo has it go on from
there, each in a new QEMU process. With --discard-running-state it is lost: the
guest is reset in the process that it has, and undo starts it from its disks.

With --memory the guest goes on from the snapshot's memory instead of booting,
which is possible only with all disks. --launcher says who starts QEMU; otherwise
it is the VM's own unit, systemd, or vmsnapd itself.`,
		Example: `  vmsnap snapshot preview web/before-upgrade --discard-running-state
  vmsnap snapshot preview web/working --memory
  vmsnap snapshot preview web/monday --disk root --network connected --discard-running-state`,
		Args:              takes("VM/NAME"),
		ValidArgsFunction: a.completing(a.completeSnapshots),
		RunE: func(cmd *cobra.Command, args []string) error {
			if network != "isolated" && network != "connected" {
				return usage(cmd, "--network %q is neither isolated nor connected", network)
			}
			known := false
			if req.Launcher, known = launcherNamed(launcher); !known {
				return usage(cmd, "--launcher %q is none of %s", launcher, strings.Join(launcherNames, ", "))
			}
			choices, err := diskChoices(cmd, disks)
			if err != nil {
				return err
			}
			req.Snapshot, req.Disks, req.Connected = args[0], choices, network == "connected"
			if req.RequestId == "" {
				req.RequestId = rand.Text()
			}
			return a.work(req.RequestId, args[0]+" runs. vmsnap preview commit keeps it, vmsnap preview undo goes back.", func(ctx context.Context) (*vmsnapv1.Operation, error) {
				res, err := a.client().Snapshots().PreviewSnapshot(ctx, connect.NewRequest(&req))
				if err != nil {
					return nil, err
				}
				return res.Msg.GetOperation(), nil
			})
		},
	}
	flags := cmd.Flags()
	flags.StringArrayVar(&disks, "disk", nil, "preview only this `disk[=NAME]`, from another snapshot with a NAME; may be repeated")
	flags.StringArrayVar(&req.Exclude, "exclude", nil, "leave this `disk` as it is; may be repeated")
	flags.StringVar(&network, "network", network, "network links: isolated or connected")
	flags.BoolVar(&req.DiscardRunningState, "discard-running-state", false, "what the running guest has in memory may be lost")
	flags.BoolVar(&req.Memory, "memory", false, "the guest goes on from the snapshot's memory, in a new QEMU process")
	flags.StringVar(&launcher, "launcher", launcher, "who starts QEMU: auto, unit, systemd, exec or external")
	must(cmd.RegisterFlagCompletionFunc("launcher", cobra.FixedCompletions(launcherNames, cobra.ShellCompDirectiveNoFileComp)))
	flags.StringVar(&req.RequestId, "request-id", "", "makes repeating the command safe, for 30 days")
	noFiles(cmd, "request-id")
	must(cmd.RegisterFlagCompletionFunc("network", cobra.FixedCompletions([]string{"isolated", "connected"}, cobra.ShellCompDirectiveNoFileComp)))
	must(cmd.RegisterFlagCompletionFunc("disk", a.completing(a.completeSnapshotDisks)))
	must(cmd.RegisterFlagCompletionFunc("exclude", a.completing(a.completeSnapshotDisks)))
	return cmd
}

// diskChoices reads disk[=NAME].
func diskChoices(cmd *cobra.Command, disks []string) ([]*vmsnapv1.DiskChoice, error) {
	var choices []*vmsnapv1.DiskChoice
	for _, d := range disks {
		device, name, named := strings.Cut(d, "=")
		if device == "" || named && name == "" {
			return nil, usage(cmd, "--disk %q is neither a disk nor disk=NAME", d)
		}
		choices = append(choices, &vmsnapv1.DiskChoice{Device: device, Snapshot: name})
	}
	return choices, nil
}

func (a *app) preview() *cobra.Command {
	return a.group(&cobra.Command{
		Use:   "preview",
		Short: "Show, keep and leave the trial states of VMs",
	}, a.previewShow(), a.previewCommit(), a.previewUndo())
}

func (a *app) previewShow() *cobra.Command {
	return &cobra.Command{
		Use:               "show VM",
		Short:             "Show the trial state that a VM runs",
		Example:           "  vmsnap preview show web",
		Args:              takes("VM"),
		ValidArgsFunction: a.completing(a.completeVMs),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			res, err := a.client().Snapshots().GetPreview(ctx, connect.NewRequest(&vmsnapv1.GetPreviewRequest{Vm: args[0]}))
			if err != nil {
				return err
			}
			p := res.Msg.GetPreview()
			return a.print(result{document: p, names: []string{args[0]}, human: func(out page, _ bool) error {
				network := "connected"
				if p.GetIsolated() {
					network = "isolated"
				}
				memory := "not saved"
				if n := p.GetSavedMemory(); n != 0 {
					memory = size(n) + " saved; undo loads it"
				}
				out.fields("VM", args[0], "Snapshot", p.GetSnapshot(), "Disks", strings.Join(p.GetDevices(), ", "),
					"Network", network, "Memory before", memory, "Opened", out.ago(p.GetOpened()))
				return nil
			}})
		},
	}
}

func (a *app) previewCommit() *cobra.Command {
	return &cobra.Command{
		Use:               "commit VM",
		Short:             "Keep the trial state that a VM runs",
		Long:              "Keep the trial state that a VM runs. The state before becomes an automatic snapshot.",
		Example:           "  vmsnap preview commit web",
		Args:              takes("VM"),
		ValidArgsFunction: a.completing(a.completeVMs),
		RunE: func(_ *cobra.Command, args []string) error {
			return a.work("", "The preview of "+args[0]+" is kept.", func(ctx context.Context) (*vmsnapv1.Operation, error) {
				res, err := a.client().Snapshots().CommitPreview(ctx, connect.NewRequest(&vmsnapv1.CommitPreviewRequest{Vm: args[0]}))
				if err != nil {
					return nil, err
				}
				return res.Msg.GetOperation(), nil
			})
		},
	}
}

func (a *app) previewUndo() *cobra.Command {
	return &cobra.Command{
		Use:               "undo VM",
		Short:             "Go back to the state before a preview",
		Long:              "Go back to the state before a preview. What was written since is thrown away.",
		Example:           "  vmsnap preview undo web",
		Args:              takes("VM"),
		ValidArgsFunction: a.completing(a.completeVMs),
		RunE: func(_ *cobra.Command, args []string) error {
			return a.work("", args[0]+" is as it was before the preview.", func(ctx context.Context) (*vmsnapv1.Operation, error) {
				res, err := a.client().Snapshots().UndoPreview(ctx, connect.NewRequest(&vmsnapv1.UndoPreviewRequest{Vm: args[0]}))
				if err != nil {
					return nil, err
				}
				return res.Msg.GetOperation(), nil
			})
		},
	}
}

// work begins an operation, stays with it to its end, and says done.
func (a *app) work(requestID, done string, call func(context.Context) (*vmsnapv1.Operation, error)) error {
	began, err := a.begin(requestID, call)
	if err != nil {
		return err
	}
	operation, err := a.stay(a.client(), began)
	if err != nil {
		return err
	}
	a.warn(operation.GetWarnings())
	out := operationResult(operation)
	out.human = func(p page, _ bool) error {
		p.line("%s", done)
		return nil
	}
	return a.print(out)
}
