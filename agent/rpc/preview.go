package rpc

import (
	"context"

	"connectrpc.com/connect"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/launch"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

func (s snapshotService) PreviewSnapshot(ctx context.Context, req *connect.Request[vmsnapv1.PreviewSnapshotRequest]) (*connect.Response[vmsnapv1.PreviewSnapshotResponse], error) {
	msg := req.Msg
	restore, err := restoreRequest(ctx, &vmsnapv1.RestoreSnapshotRequest{
		Snapshot: msg.GetSnapshot(), Disks: msg.GetDisks(), Exclude: msg.GetExclude(), Memory: msg.GetMemory(), RequestId: msg.GetRequestId(),
	})
	if err != nil {
		return nil, err
	}
	if l := msg.GetLauncher(); l != 0 {
		if restore.Launcher = launcherOf(l); restore.Launcher == launch.Automatic {
			return nil, usage("launcher %d is unknown", l)
		}
	}
	record, err := s.backend.PreviewSnapshot(ctx, agent.PreviewRequest{
		RestoreRequest: restore, Connected: msg.GetConnected(), DiscardRunning: msg.GetDiscardRunningState(),
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.PreviewSnapshotResponse{Operation: operationProto(record)}), nil
}

func (s snapshotService) GetPreview(ctx context.Context, req *connect.Request[vmsnapv1.GetPreviewRequest]) (*connect.Response[vmsnapv1.GetPreviewResponse], error) {
	if err := checkRef("vm", req.Msg.GetVm()); err != nil {
		return nil, err
	}
	p, err := s.backend.Preview(ctx, req.Msg.GetVm())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.GetPreviewResponse{Preview: previewProto(p)}), nil
}

func (s snapshotService) CommitPreview(ctx context.Context, req *connect.Request[vmsnapv1.CommitPreviewRequest]) (*connect.Response[vmsnapv1.CommitPreviewResponse], error) {
	if err := checkRef("vm", req.Msg.GetVm()); err != nil {
		return nil, err
	}
	caller, err := uid(ctx)
	if err != nil {
		return nil, err
	}
	record, err := s.backend.CommitPreview(ctx, req.Msg.GetVm(), caller)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.CommitPreviewResponse{Operation: operationProto(record)}), nil
}

func (s snapshotService) UndoPreview(ctx context.Context, req *connect.Request[vmsnapv1.UndoPreviewRequest]) (*connect.Response[vmsnapv1.UndoPreviewResponse], error) {
	if err := checkRef("vm", req.Msg.GetVm()); err != nil {
		return nil, err
	}
	caller, err := uid(ctx)
	if err != nil {
		return nil, err
	}
	record, err := s.backend.UndoPreview(ctx, req.Msg.GetVm(), caller)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.UndoPreviewResponse{Operation: operationProto(record)}), nil
}

func previewProto(p agent.PreviewView) *vmsnapv1.Preview {
	return &vmsnapv1.Preview{
		Snapshot: text(p.Snapshot), OperationId: text(p.Operation), Opened: stamp(p.Opened), Isolated: p.Isolated,
		Devices: each(p.Disks, text), SavedMemory: p.Saved,
	}
}
