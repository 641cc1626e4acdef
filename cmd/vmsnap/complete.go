package main

import (
	"context"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// noFiles keeps file names out of the completion of flags with free values.
func noFiles(cmd *cobra.Command, flags ...string) {
	for _, flag := range flags {
		must(cmd.RegisterFlagCompletionFunc(flag, cobra.NoFileCompletions))
	}
}

// completing makes a completion out of a question to the daemon. A daemon that
// does not answer at once completes nothing, and an argument beyond the first
// is of the user's own choosing.
func (a *app) completing(ask func(ctx context.Context, args []string) []string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		ctx, cancel := context.WithTimeout(cmd.Context(), completeTimeout)
		defer cancel()
		return ask(ctx, args), cobra.ShellCompDirectiveNoFileComp
	}
}

func (a *app) completeVMs(ctx context.Context, args []string) []string {
	if len(args) > 0 {
		return nil
	}
	res, err := a.client().VMs().ListVMs(ctx, connect.NewRequest(&vmsnapv1.ListVMsRequest{}))
	if err != nil {
		return nil
	}
	var names []string
	for _, vm := range res.Msg.GetVms() {
		names = append(names, printable(vmName(vm))+"\t"+vmState(vm))
	}
	return names
}

func (a *app) completeSnapshots(ctx context.Context, args []string) []string {
	if len(args) > 0 {
		return nil
	}
	res, err := a.client().Snapshots().ListSnapshots(ctx, connect.NewRequest(&vmsnapv1.ListSnapshotsRequest{}))
	if err != nil {
		return nil
	}
	p := page{now: a.now()}
	var names []string
	for _, s := range res.Msg.GetSnapshots() {
		names = append(names, printable(snapshotName(s))+"\t"+consistencyText(s)+", "+p.ago(s.GetCreated()))
	}
	return names
}

func (a *app) completeOperations(active bool) func(context.Context, []string) []string {
	return func(ctx context.Context, args []string) []string {
		if len(args) > 0 {
			return nil
		}
		res, err := a.client().Operations().ListOperations(ctx, connect.NewRequest(&vmsnapv1.ListOperationsRequest{Active: active}))
		if err != nil {
			return nil
		}
		var ids []string
		for _, o := range res.Msg.GetOperations() {
			ids = append(ids, o.GetId()+"\t"+printable(o.GetKind()+" of "+operationVM(o))+", "+operationState(o))
		}
		return ids
	}
}

// completeDisks completes the disks of the VM that is named before them.
func (a *app) completeDisks(ctx context.Context, args []string) []string {
	if len(args) == 0 {
		return nil
	}
	res, err := a.client().VMs().GetVM(ctx, connect.NewRequest(&vmsnapv1.GetVMRequest{Vm: args[0]}))
	if err != nil {
		return nil
	}
	var devices []string
	for _, d := range res.Msg.GetVm().GetDisks() {
		devices = append(devices, printable(d.GetDevice())+"\t"+size(d.GetVirtualSize()))
	}
	return devices
}
