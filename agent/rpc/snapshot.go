package rpc

import (
	"context"

	"connectrpc.com/connect"

	"github.com/vmsnap/vmsnap/agent"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

type snapshotService struct{ backend Backend }

func (s snapshotService) CreateSnapshot(ctx context.Context, req *connect.Request[vmsnapv1.CreateSnapshotRequest]) (*connect.Response[vmsnapv1.CreateSnapshotResponse], error) {
	request, err := snapshotRequest(ctx, req.Msg)
	if err != nil {
		return nil, err
	}
	record, err := s.backend.CreateSnapshot(ctx, request)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.CreateSnapshotResponse{Operation: operationProto(record)}), nil
}

func (s snapshotService) PlanSnapshot(ctx context.Context, req *connect.Request[vmsnapv1.CreateSnapshotRequest]) (*connect.Response[vmsnapv1.PlanSnapshotResponse], error) {
	request, err := snapshotRequest(ctx, req.Msg)
	if err != nil {
		return nil, err
	}
	plan, err := s.backend.PlanSnapshot(ctx, request)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.PlanSnapshotResponse{Plan: planProto(plan)}), nil
}

// snapshotRequest checks a request and says who made it.
func snapshotRequest(ctx context.Context, msg *vmsnapv1.CreateSnapshotRequest) (agent.SnapshotRequest, error) {
	if err := checkCreate(msg); err != nil {
		return agent.SnapshotRequest{}, err
	}
	caller, err := uid(ctx)
	if err != nil {
		return agent.SnapshotRequest{}, err
	}
	return agent.SnapshotRequest{
		VM:            msg.GetVm(),
		Name:          msg.GetName(),
		Description:   msg.GetDescription(),
		Labels:        msg.GetLabels(),
		Disks:         msg.GetDisks(),
		Exclude:       msg.GetExclude(),
		Quiesce:       quiesceOf(msg.GetQuiesce()),
		Mountpoints:   msg.GetMountpoints(),
		FreezeTimeout: msg.GetFreezeTimeout().AsDuration(),
		Lease:         msg.GetLease().AsDuration(),
		Strict:        msg.GetStrict(),
		AllowPartial:  msg.GetAllowPartial(),
		Memory:        msg.GetMemory(),
		Strategy:      strategyOf(msg.GetMemoryStrategy()),
		MaxPause:      msg.GetMaxPause().AsDuration(),
		ExpireAfter:   msg.GetExpireAfter().AsDuration(),
		Compress:      msg.GetCompress(),
		Profile:       msg.GetProfile(),
		RequestID:     msg.GetRequestId(),
		UID:           caller,
	}, nil
}

func (s snapshotService) ListSnapshots(ctx context.Context, req *connect.Request[vmsnapv1.ListSnapshotsRequest]) (*connect.Response[vmsnapv1.ListSnapshotsResponse], error) {
	if err := checkListSnapshots(req.Msg); err != nil {
		return nil, err
	}
	snapshots, err := s.backend.Snapshots(ctx, agent.SnapshotFilter{VM: req.Msg.GetVm(), Labels: req.Msg.GetLabels(), Visible: visible(ctx)})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.ListSnapshotsResponse{Snapshots: each(snapshots, snapshotProto)}), nil
}

func (s snapshotService) GetSnapshot(ctx context.Context, req *connect.Request[vmsnapv1.GetSnapshotRequest]) (*connect.Response[vmsnapv1.GetSnapshotResponse], error) {
	if err := checkRef("snapshot", req.Msg.GetSnapshot()); err != nil {
		return nil, err
	}
	snapshot, err := s.backend.Snapshot(ctx, req.Msg.GetSnapshot())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.GetSnapshotResponse{Snapshot: snapshotProto(snapshot)}), nil
}

func (s snapshotService) RenameSnapshot(ctx context.Context, req *connect.Request[vmsnapv1.RenameSnapshotRequest]) (*connect.Response[vmsnapv1.RenameSnapshotResponse], error) {
	if err := checkRename(req.Msg); err != nil {
		return nil, err
	}
	snapshot, err := s.backend.RenameSnapshot(ctx, req.Msg.GetSnapshot(), req.Msg.GetNewName())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.RenameSnapshotResponse{Snapshot: snapshotProto(snapshot)}), nil
}

func (s snapshotService) VerifySnapshot(ctx context.Context, req *connect.Request[vmsnapv1.VerifySnapshotRequest]) (*connect.Response[vmsnapv1.VerifySnapshotResponse], error) {
	if err := checkRef("snapshot", req.Msg.GetSnapshot()); err != nil {
		return nil, err
	}
	caller, err := uid(ctx)
	if err != nil {
		return nil, err
	}
	record, err := s.backend.VerifySnapshot(ctx, req.Msg.GetSnapshot(), caller)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.VerifySnapshotResponse{Operation: operationProto(record)}), nil
}
