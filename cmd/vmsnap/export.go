package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// imageFormats are the words for the formats of new images.
var imageFormats = map[string]vmsnapv1.ImageFormat{
	"qcow2": vmsnapv1.ImageFormat_IMAGE_FORMAT_QCOW2,
	"raw":   vmsnapv1.ImageFormat_IMAGE_FORMAT_RAW,
}

func (a *app) snapshotExport() *cobra.Command {
	var req vmsnapv1.ExportSnapshotRequest
	format, detach := "qcow2", false
	cmd := &cobra.Command{
		Use:   "export VM/NAME FILE",
		Short: "Make a standalone image of a snapshot's disk",
		Long: `Copy what a snapshot holds of a disk into an image that depends on nothing. The
VM may run on meanwhile; its snapshots are not changed.

The image is compared with the snapshot before it gets its name. It is sparse,
and belongs to you. FILE must not exist, and you must be allowed to write to its
directory. Cancelling leaves nothing behind.`,
		Example: `  vmsnap snapshot export web/before-upgrade /srv/images/web.qcow2
  vmsnap snapshot export web/nightly /srv/images/data.raw --disk data --format raw
  vmsnap snapshot export web/nightly /srv/images/root.qcow2 --disk root --compress`,
		Args:              takes("VM/NAME", "FILE"),
		ValidArgsFunction: a.completingThenFiles(a.completeSnapshots),
		RunE: func(cmd *cobra.Command, args []string) error {
			var known bool
			if req.Format, known = imageFormats[format]; !known {
				return usage(cmd, "the format %q is neither qcow2 nor raw", format)
			}
			if req.GetCompress() && format == "raw" {
				return usage(cmd, "--compress is for qcow2: a raw image cannot be compressed")
			}
			var err error
			if req.Path, err = newFile(args[1]); err != nil {
				return err
			}
			if req.RequestId == "" {
				req.RequestId = rand.Text()
			}
			req.Snapshot = args[0]
			return a.export(&req, args[1], detach)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&req.Disk, "disk", "", "the `disk` to export; may be left out when the snapshot holds one only")
	flags.StringVar(&format, "format", format, "format of the image: qcow2 or raw")
	flags.BoolVar(&req.Compress, "compress", false, "compress the data (qcow2)")
	flags.BoolVar(&detach, "detach", false, "return when the operation has begun")
	flags.StringVar(&req.RequestId, "request-id", "", "makes repeating the command safe, for 30 days")
	noFiles(cmd, "request-id")
	must(cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"qcow2", "raw"}, cobra.ShellCompDirectiveNoFileComp)))
	must(cmd.RegisterFlagCompletionFunc("disk", a.completing(a.completeSnapshotDisks)))
	return cmd
}

// newFile returns the absolute path of a file that is to be made. The links on the
// way are followed here, as the user who runs the command: the daemon follows
// none.
func newFile(path string) (string, error) {
	whole, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(whole))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return whole, nil // the daemon says so, in its own words
	}
	if err != nil {
		return "", fmt.Errorf("directory of %s: %w", path, err)
	}
	return filepath.Join(dir, filepath.Base(whole)), nil
}

// export exports, and stays with it to its end.
func (a *app) export(req *vmsnapv1.ExportSnapshotRequest, file string, detach bool) error {
	operation, err := a.carry(req.GetRequestId(), detach, func(ctx context.Context) (*vmsnapv1.Operation, error) {
		res, err := a.client().Snapshots().ExportSnapshot(ctx, connect.NewRequest(req))
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
		p.line("%s exported to %s.", req.GetSnapshot(), file)
		return nil
	}
	return a.print(out)
}

// carry begins an operation and stays with it to its end. When it is to be left
// alone, it is shown, and nil is returned.
func (a *app) carry(requestID string, detach bool, call func(context.Context) (*vmsnapv1.Operation, error)) (*vmsnapv1.Operation, error) {
	began, err := a.begin(requestID, call)
	if err != nil {
		return nil, err
	}
	if detach {
		return nil, a.print(begunResult(began))
	}
	operation, err := a.stay(a.client(), began)
	if err != nil {
		return nil, err
	}
	a.warn(operation.GetWarnings())
	return operation, nil
}

// completingThenFiles completes the first argument from the daemon, and files
// after it.
func (a *app) completingThenFiles(ask func(ctx context.Context, args []string) []string) cobra.CompletionFunc {
	first := a.completing(ask)
	return func(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveDefault
		}
		return first(cmd, args, word)
	}
}
