package main

import (
	"context"
	"crypto/rand"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

func (a *app) disk() *cobra.Command {
	return a.group(&cobra.Command{
		Use:   "disk",
		Short: "Plug disks in and take them out, forget linked clones that are gone",
	}, a.diskAttach(), a.diskDetach(), a.diskForget())
}

func (a *app) diskAttach() *cobra.Command {
	var req vmsnapv1.AttachDiskRequest
	format, detach := "qcow2", false
	cmd := &cobra.Command{
		Use:   "attach VM FILE",
		Short: "Plug a disk into a running VM",
		Long: `Plug an image into a running VM, as a virtio disk on a free PCI Express port or
the machine's PCI bus, or on a virtio-scsi controller. It can be snapshotted like
any other disk.

The disk is there until this QEMU ends: the launch command does not name it. You
must be allowed to read and write FILE, which may lie on nothing but on what vmsnap
knows, such as a linked clone.`,
		Example: `  vmsnap disk attach web /srv/vm/web2/root.qcow2
  vmsnap disk attach web ./scratch.raw --format raw --device scratch --bus scsi`,
		Args:              takes("VM", "FILE"),
		ValidArgsFunction: a.completingThenFiles(a.completeVMs),
		RunE: func(cmd *cobra.Command, args []string) error {
			var known bool
			if req.Format, known = imageFormats[format]; !known {
				return usage(cmd, "the format %q is neither qcow2 nor raw", format)
			}
			var err error
			if req.Path, err = newFile(args[1]); err != nil {
				return err
			}
			req.Vm = args[0]
			return a.attach(&req, args[1], detach)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&format, "format", format, "format of the image: qcow2 or raw")
	flags.StringVar(&req.Device, "device", "", "`id` of the new device, by which the disk is called; chosen when it is left out")
	flags.StringVar(&req.Bus, "bus", "", "virtio or scsi; chosen when it is left out")
	flags.BoolVar(&detach, "detach", false, "return when the operation has begun")
	flags.StringVar(&req.RequestId, "request-id", "", "makes repeating the command safe, for 30 days")
	noFiles(cmd, "request-id", "device")
	must(cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"qcow2", "raw"}, cobra.ShellCompDirectiveNoFileComp)))
	must(cmd.RegisterFlagCompletionFunc("bus", cobra.FixedCompletions([]string{"virtio", "scsi"}, cobra.ShellCompDirectiveNoFileComp)))
	return cmd
}

// attach plugs a disk in, and stays with it to its end.
func (a *app) attach(req *vmsnapv1.AttachDiskRequest, file string, detach bool) error {
	if req.RequestId == "" {
		req.RequestId = rand.Text()
	}
	operation, err := a.carry(req.GetRequestId(), detach, func(ctx context.Context) (*vmsnapv1.Operation, error) {
		res, err := a.client().VMs().AttachDisk(ctx, connect.NewRequest(req))
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
		p.line("%s is plugged into %s.", file, req.GetVm())
		return nil
	}
	return a.print(out)
}

func (a *app) diskDetach() *cobra.Command {
	var req vmsnapv1.DetachDiskRequest
	detach := false
	cmd := &cobra.Command{
		Use:   "detach VM DISK",
		Short: "Take a disk out of a running VM that was plugged in",
		Long: `Take a disk out of a running VM that was plugged in while it ran. The guest has to
let go of it: unmount it there first. Its layers and snapshots stay.`,
		Example: `  vmsnap disk detach web scratch`,
		Args:    takes("VM", "DISK"),
		ValidArgsFunction: a.completing(func(ctx context.Context, args []string) []string {
			if len(args) == 0 {
				return a.completeVMs(ctx, args)
			}
			return a.completeDisks(ctx, args)
		}),
		RunE: func(_ *cobra.Command, args []string) error {
			if req.RequestId == "" {
				req.RequestId = rand.Text()
			}
			req.Vm, req.Device = args[0], args[1]
			operation, err := a.carry(req.GetRequestId(), detach, func(ctx context.Context) (*vmsnapv1.Operation, error) {
				res, err := a.client().VMs().DetachDisk(ctx, connect.NewRequest(&req))
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
				p.line("%s is out of %s.", args[1], args[0])
				return nil
			}
			return a.print(out)
		},
	}
	flags := cmd.Flags()
	flags.BoolVar(&detach, "detach", false, "return when the operation has begun")
	flags.StringVar(&req.RequestId, "request-id", "", "makes repeating the command safe, for 30 days")
	noFiles(cmd, "request-id")
	return cmd
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
