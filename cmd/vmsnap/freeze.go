package main

import (
	"context"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

func (a *app) freeze() *cobra.Command {
	var f freezing
	cmd := &cobra.Command{
		Use:   "freeze VM",
		Short: "Freeze a guest's file systems until they are thawed or the lease ends",
		Long: `Freeze a guest's file systems and return when they are frozen. They are thawed
by "vmsnap thaw", and when the lease ends, whatever else happens.`,
		Example: `  vmsnap freeze web --lease 10s
  vmsnap freeze web --mountpoint /var/lib/postgresql`,
		Args:              takes("VM"),
		ValidArgsFunction: a.completing(a.completeVMs),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(cmd); err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), max(f.timeout, callTimeout)+freezeMargin)
			defer cancel()
			res, err := a.client().VMs().FreezeVM(ctx, connect.NewRequest(&vmsnapv1.FreezeVMRequest{
				Vm: args[0], Lease: optional(f.lease), FreezeTimeout: optional(f.timeout), Mountpoints: f.mountpoints,
			}))
			if err != nil {
				return err
			}
			frozen := res.Msg.GetFreeze()
			return a.print(result{document: frozen, names: []string{args[0]}, human: func(p page, _ bool) error {
				p.line("%s is frozen: %s", args[0], frozenText(p, frozen))
				return nil
			}})
		},
	}
	f.flags(cmd)
	return cmd
}

func (a *app) thaw() *cobra.Command {
	return &cobra.Command{
		Use:   "thaw VM",
		Short: "Thaw a guest that was frozen",
		Long: `Thaw a guest that was frozen, and return when it has answered. The exit code is
5 when the guest was no longer frozen just before: what was read of it in the
meantime is not consistent.`,
		Example:           `  vmsnap thaw web`,
		Args:              takes("VM"),
		ValidArgsFunction: a.completing(a.completeVMs),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), thawTimeout)
			defer cancel()
			res, err := a.client().VMs().ThawVM(ctx, connect.NewRequest(&vmsnapv1.ThawVMRequest{Vm: args[0]}))
			if err != nil {
				return err
			}
			err = a.print(result{document: res.Msg, names: []string{args[0]}, human: func(p page, _ bool) error {
				if !res.Msg.GetWasFrozen() {
					return nil // the error below says so
				}
				if window := res.Msg.GetFreezeWindow().AsDuration(); window > 0 {
					p.line("%s is thawed after %s", args[0], brief(window.Round(time.Millisecond)))
				} else {
					p.line("%s is thawed: something else had frozen it", args[0])
				}
				return nil
			}})
			if err != nil || res.Msg.GetWasFrozen() {
				return err
			}
			notFrozen := &exitError{
				code:    vmsnapv1.ErrorCode_ERROR_CODE_NOT_QUIESCED,
				message: args[0] + " was no longer frozen when it was thawed",
				hint:    "what was read of it in the meantime is not consistent; a longer --lease may help",
			}
			if res.Msg.GetFreezeWindow().AsDuration() == 0 {
				notFrozen.message = args[0] + " was not frozen"
				notFrozen.hint = "what was read of it in the belief that it was is not consistent; vmsnap operation list tells whether a lease has ended"
			}
			return notFrozen
		},
	}
}
