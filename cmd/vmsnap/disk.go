package main

import (
	"context"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

func (a *app) disk() *cobra.Command {
	return a.group(&cobra.Command{
		Use:   "disk",
		Short: "Linked clones that are gone",
	}, a.diskForget())
}

func (a *app) diskForget() *cobra.Command {
	return &cobra.Command{
		Use:   "forget FILE",
		Short: "Forget a linked clone that was removed",
		Long: `Forget a linked clone that was removed, so that its snapshot can be deleted.
One that was only moved still needs the snapshot. FILE is the path that
vmsnap snapshot show tells.`,
		Example: `  vmsnap disk forget /srv/vm/web2/root.qcow2`,
		Args:    takes("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			path, err := newFile(args[0])
			if err != nil {
				return err
			}
			if _, err := a.client().Snapshots().ForgetClone(ctx, connect.NewRequest(&vmsnapv1.ForgetCloneRequest{Path: path})); err != nil {
				return err
			}
			return a.print(result{document: &vmsnapv1.ForgetCloneResponse{}, names: []string{path}, human: func(p page, _ bool) error {
				p.line("%s is forgotten.", path)
				return nil
			}})
		},
	}
}
