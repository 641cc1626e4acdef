package rpc

import (
	"context"
	"strings"

	"connectrpc.com/connect"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/launch"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// maxPath is the kernel's limit of a path.
const maxPath = 4095

var imageFormats = map[vmsnapv1.ImageFormat]string{
	vmsnapv1.ImageFormat_IMAGE_FORMAT_UNSPECIFIED: "qcow2",
	vmsnapv1.ImageFormat_IMAGE_FORMAT_QCOW2:       "qcow2",
	vmsnapv1.ImageFormat_IMAGE_FORMAT_RAW:         "raw",
}

func (s snapshotService) ExportSnapshot(ctx context.Context, req *connect.Request[vmsnapv1.ExportSnapshotRequest]) (*connect.Response[vmsnapv1.ExportSnapshotResponse], error) {
	msg := req.Msg
	if err := checkExport(msg); err != nil {
		return nil, err
	}
	who, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	record, err := s.backend.ExportSnapshot(ctx, agent.ExportRequest{
		Snapshot: msg.GetSnapshot(), Disk: msg.GetDisk(), Format: imageFormats[msg.GetFormat()], Compress: msg.GetCompress(),
		Path: msg.GetPath(), Caller: who, RequestID: msg.GetRequestId(),
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.ExportSnapshotResponse{Operation: operationProto(record)}), nil
}

func checkExport(msg *vmsnapv1.ExportSnapshotRequest) error {
	if _, known := imageFormats[msg.GetFormat()]; !known {
		return usage("format has the unknown value %d", msg.GetFormat())
	}
	if msg.GetCompress() && imageFormats[msg.GetFormat()] != "qcow2" {
		return usage("compress is given for a raw image, which cannot be compressed")
	}
	return first(
		checkRef("snapshot", msg.GetSnapshot()),
		checkLength("disk", msg.GetDisk(), maxRef),
		checkPath("path", msg.GetPath()),
		checkLength("request_id", msg.GetRequestId(), maxRequestID),
	)
}

// checkPath checks a field that must be a path.
func checkPath(field, value string) error {
	if value == "" {
		return usage("%s is not given", field)
	}
	return checkLength(field, value, maxPath)
}

func (s snapshotService) CloneDisk(ctx context.Context, req *connect.Request[vmsnapv1.CloneDiskRequest]) (*connect.Response[vmsnapv1.CloneDiskResponse], error) {
	msg := req.Msg
	err := first(
		checkRef("snapshot", msg.GetSnapshot()),
		checkLength("disk", msg.GetDisk(), maxRef),
		checkPath("path", msg.GetPath()),
		checkLength("request_id", msg.GetRequestId(), maxRequestID),
	)
	if err != nil {
		return nil, err
	}
	who, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	record, err := s.backend.CloneDisk(ctx, agent.CloneDiskRequest{
		Snapshot: msg.GetSnapshot(), Disk: msg.GetDisk(), Full: msg.GetFull(), Path: msg.GetPath(), Caller: who, RequestID: msg.GetRequestId(),
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.CloneDiskResponse{Operation: operationProto(record)}), nil
}

func (s snapshotService) CloneVM(ctx context.Context, req *connect.Request[vmsnapv1.CloneVMRequest]) (*connect.Response[vmsnapv1.CloneVMResponse], error) {
	msg := req.Msg
	if err := checkCloneVM(msg); err != nil {
		return nil, err
	}
	who, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	record, err := s.backend.CloneVM(ctx, agent.CloneVMRequest{
		Snapshot: msg.GetSnapshot(), Name: msg.GetName(), Disks: msg.GetDisks(), Full: msg.GetFull(), Dir: msg.GetDir(),
		Start: msg.GetStart(), Launcher: launcherOf(msg.GetLauncher()), Replace: msg.GetReplace(), Caller: who, RequestID: msg.GetRequestId(),
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.CloneVMResponse{Operation: operationProto(record)}), nil
}

// maxReplaced bounds how many resources of the host a request replaces.
const maxReplaced = 256

func checkCloneVM(msg *vmsnapv1.CloneVMRequest) error {
	if l := msg.GetLauncher(); l != 0 {
		if launcherOf(l) == launch.Automatic {
			return usage("launcher %d is unknown", l)
		}
		if !msg.GetStart() {
			return usage("a launcher is for a clone that is started")
		}
	}
	if len(msg.GetReplace()) > maxReplaced {
		return usage("replace has %d entries; at most %d are allowed", len(msg.GetReplace()), maxReplaced)
	}
	for old, now := range msg.GetReplace() {
		err := first(
			checkPath("an entry of replace: its key", old),
			checkPath("an entry of replace: its value", now),
		)
		if err == nil && strings.ContainsRune(now, 0) {
			err = usage("an entry of replace: its value holds a byte of zero")
		}
		if err != nil {
			return err
		}
	}
	return first(
		checkRef("snapshot", msg.GetSnapshot()),
		checkRef("name", msg.GetName()),
		checkList("disks", msg.GetDisks(), maxDisks, maxRef),
		checkLength("dir", msg.GetDir(), maxPath),
		checkLength("request_id", msg.GetRequestId(), maxRequestID),
	)
}

func (s snapshotService) ForgetClone(ctx context.Context, req *connect.Request[vmsnapv1.ForgetCloneRequest]) (*connect.Response[vmsnapv1.ForgetCloneResponse], error) {
	if err := checkPath("path", req.Msg.GetPath()); err != nil {
		return nil, err
	}
	if err := s.backend.ForgetClone(ctx, req.Msg.GetPath()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.ForgetCloneResponse{}), nil
}

func (s snapshotService) SetTemplate(ctx context.Context, req *connect.Request[vmsnapv1.SetTemplateRequest]) (*connect.Response[vmsnapv1.SetTemplateResponse], error) {
	if err := checkRef("snapshot", req.Msg.GetSnapshot()); err != nil {
		return nil, err
	}
	snapshot, err := s.backend.SetTemplate(ctx, req.Msg.GetSnapshot(), req.Msg.GetTemplate())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.SetTemplateResponse{Snapshot: snapshotProto(snapshot)}), nil
}

func cloneProto(c agent.CloneView) *vmsnapv1.Clone {
	return &vmsnapv1.Clone{Disk: text(c.Disk), Path: text(c.Path), VmName: text(c.VM), Created: stamp(c.Created), Missing: c.Missing}
}

func (s vmService) AttachDisk(ctx context.Context, req *connect.Request[vmsnapv1.AttachDiskRequest]) (*connect.Response[vmsnapv1.AttachDiskResponse], error) {
	msg := req.Msg
	if _, known := imageFormats[msg.GetFormat()]; !known {
		return nil, usage("format has the unknown value %d", msg.GetFormat())
	}
	err := first(
		checkRef("vm", msg.GetVm()),
		checkPath("path", msg.GetPath()),
		checkLength("device", msg.GetDevice(), maxRef),
		checkLength("bus", msg.GetBus(), maxRef),
		checkLength("request_id", msg.GetRequestId(), maxRequestID),
	)
	if err != nil {
		return nil, err
	}
	who, err := caller(ctx)
	if err != nil {
		return nil, err
	}
	record, err := s.backend.AttachDisk(ctx, agent.AttachRequest{
		VM: msg.GetVm(), Path: msg.GetPath(), Format: imageFormats[msg.GetFormat()], Device: msg.GetDevice(), Bus: msg.GetBus(),
		Caller: who, RequestID: msg.GetRequestId(),
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.AttachDiskResponse{Operation: operationProto(record)}), nil
}

func (s vmService) DetachDisk(ctx context.Context, req *connect.Request[vmsnapv1.DetachDiskRequest]) (*connect.Response[vmsnapv1.DetachDiskResponse], error) {
	msg := req.Msg
	err := first(
		checkRef("vm", msg.GetVm()),
		checkRef("device", msg.GetDevice()),
		checkLength("request_id", msg.GetRequestId(), maxRequestID),
	)
	if err != nil {
		return nil, err
	}
	who, err := uid(ctx)
	if err != nil {
		return nil, err
	}
	record, err := s.backend.DetachDisk(ctx, agent.DetachRequest{VM: msg.GetVm(), Device: msg.GetDevice(), RequestID: msg.GetRequestId(), UID: who})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.DetachDiskResponse{Operation: operationProto(record)}), nil
}
