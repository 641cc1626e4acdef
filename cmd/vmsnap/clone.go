package main

import (
	"context"
	"crypto/rand"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

func (a *app) snapshotClone() *cobra.Command {
	var req vmsnapv1.CloneDiskRequest
	detach := false
	cmd := &cobra.Command{
		Use:   "clone VM/NAME FILE",
		Short: "Make a new disk from a snapshot",
		Long: `Make a new disk that holds what a snapshot has of one. A linked clone is made at
once and takes no space at first: it lies on the snapshot's layer, which cannot be
deleted while it does, and is shown with the snapshot. With --full the data is
copied, and the clone depends on nothing.

FILE is a path with a slash in it, such as ./new.qcow2. It must not exist, and you
must be allowed to write to its directory. What root makes belongs to the owner of
the disk's own files.`,
		Example: `  vmsnap snapshot clone web/golden /srv/vm/web2/root.qcow2 --disk root
  vmsnap snapshot clone web/golden ./root.qcow2 --disk root --full`,
		Args:              takes("VM/NAME", "FILE"),
		ValidArgsFunction: a.completingThenFiles(a.completeSnapshots),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !strings.Contains(args[1], "/") {
				return usage(cmd, "%q is not a path: write ./%s for a file here", args[1], args[1])
			}
			var err error
			if req.Path, err = newFile(args[1]); err != nil {
				return err
			}
			if req.RequestId == "" {
				req.RequestId = rand.Text()
			}
			req.Snapshot = args[0]
			return a.cloneDisk(&req, args[1], detach)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&req.Disk, "disk", "", "the `disk` to clone; may be left out when the snapshot holds one only")
	flags.BoolVar(&req.Full, "full", false, "copy the data")
	flags.BoolVar(&detach, "detach", false, "return when the operation has begun")
	flags.StringVar(&req.RequestId, "request-id", "", "makes repeating the command safe, for 30 days")
	noFiles(cmd, "request-id")
	must(cmd.RegisterFlagCompletionFunc("disk", a.completing(a.completeSnapshotDisks)))
	return cmd
}

// cloneDisk makes a disk, and stays with it to its end.
func (a *app) cloneDisk(req *vmsnapv1.CloneDiskRequest, file string, detach bool) error {
	operation, err := a.carry(req.GetRequestId(), detach, func(ctx context.Context) (*vmsnapv1.Operation, error) {
		res, err := a.client().Snapshots().CloneDisk(ctx, connect.NewRequest(req))
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
		if req.GetFull() {
			p.line("%s is a copy of what %s holds.", file, req.GetSnapshot())
		} else {
			p.line("%s lies on %s, which is needed from now on.", file, req.GetSnapshot())
		}
		return nil
	}
	return a.print(out)
}

func (a *app) snapshotTemplate() *cobra.Command {
	off := false
	cmd := &cobra.Command{
		Use:   "template VM/NAME",
		Short: "Keep a snapshot from being deleted",
		Long: `Make a snapshot a template: it cannot be deleted, and no retention touches it,
until --off makes it a snapshot like others again.`,
		Example: `  vmsnap snapshot template web/golden
  vmsnap snapshot template web/golden --off`,
		Args:              takes("VM/NAME"),
		ValidArgsFunction: a.completing(a.completeSnapshots),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			res, err := a.client().Snapshots().SetTemplate(ctx, connect.NewRequest(&vmsnapv1.SetTemplateRequest{Snapshot: args[0], Template: !off}))
			if err != nil {
				return err
			}
			s := res.Msg.GetSnapshot()
			return a.print(result{document: s, names: []string{snapshotName(s)}, human: func(p page, _ bool) error {
				if s.GetTemplate() {
					p.line("%s is a template, and cannot be deleted.", snapshotName(s))
				} else {
					p.line("%s is a snapshot like others.", snapshotName(s))
				}
				return nil
			}})
		},
	}
	cmd.Flags().BoolVar(&off, "off", false, "make it a snapshot like others again")
	return cmd
}
