package rpc

import (
	"context"

	"connectrpc.com/connect"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// maxDeletes bounds the snapshots that are named in one request.
const maxDeletes = 10000

func (s snapshotService) DeleteSnapshots(ctx context.Context, req *connect.Request[vmsnapv1.DeleteSnapshotsRequest]) (*connect.Response[vmsnapv1.DeleteSnapshotsResponse], error) {
	request, err := deleteRequest(ctx, req.Msg)
	if err != nil {
		return nil, err
	}
	record, err := s.backend.DeleteSnapshots(ctx, request)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.DeleteSnapshotsResponse{Operation: operationProto(record)}), nil
}

func (s snapshotService) PlanDelete(ctx context.Context, req *connect.Request[vmsnapv1.DeleteSnapshotsRequest]) (*connect.Response[vmsnapv1.PlanDeleteResponse], error) {
	request, err := deleteRequest(ctx, req.Msg)
	if err != nil {
		return nil, err
	}
	plan, err := s.backend.PlanDelete(ctx, request)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.PlanDeleteResponse{Plan: deletePlanProto(plan)}), nil
}

// deleteRequest checks a request and says who made it.
func deleteRequest(ctx context.Context, msg *vmsnapv1.DeleteSnapshotsRequest) (agent.DeleteRequest, error) {
	age := msg.GetOlderThan()
	if age != nil && (age.CheckValid() != nil || age.AsDuration() < 0) {
		return agent.DeleteRequest{}, usage("older_than is not a duration of zero or more")
	}
	err := first(
		checkList("snapshots", msg.GetSnapshots(), maxDeletes, maxRef),
		checkLength("vm", msg.GetVm(), maxRef),
		checkLabels(msg.GetLabels()),
		checkLength("request_id", msg.GetRequestId(), maxRequestID),
	)
	if err != nil {
		return agent.DeleteRequest{}, err
	}
	caller, err := uid(ctx)
	return agent.DeleteRequest{
		Snapshots: msg.GetSnapshots(), VM: msg.GetVm(), Labels: msg.GetLabels(), OlderThan: age.AsDuration(), All: msg.GetAll(),
		Flatten: msg.GetFlatten(), KeepLayers: msg.GetKeepLayers(), Speed: msg.GetSpeed(),
		RequestID: msg.GetRequestId(), UID: caller,
	}, err
}

var mergeWays = map[agent.MergeWay]vmsnapv1.MergeWay{
	agent.MergeRemove:  vmsnapv1.MergeWay_MERGE_WAY_REMOVE,
	agent.MergeCommit:  vmsnapv1.MergeWay_MERGE_WAY_COMMIT,
	agent.MergeStream:  vmsnapv1.MergeWay_MERGE_WAY_STREAM,
	agent.MergeFlatten: vmsnapv1.MergeWay_MERGE_WAY_FLATTEN,
}

var pointStates = map[catalog.PointState]vmsnapv1.PointState{
	"":                    vmsnapv1.PointState_POINT_STATE_VALID,
	catalog.PointValid:    vmsnapv1.PointState_POINT_STATE_VALID,
	catalog.PointDeleting: vmsnapv1.PointState_POINT_STATE_DELETING,
	catalog.PointInvalid:  vmsnapv1.PointState_POINT_STATE_INVALID,
}

func deletePlanProto(p agent.DeletePlan) *vmsnapv1.DeletePlan {
	return &vmsnapv1.DeletePlan{
		VmName:    text(p.VM),
		Snapshots: each(p.Snapshots, text),
		Live:      p.Live,
		Merges: each(p.Merges, func(m agent.PlanMerge) *vmsnapv1.DeletePlanMerge {
			return &vmsnapv1.DeletePlanMerge{
				Device: text(m.Device), Way: mergeWays[m.Way], Layer: text(m.Layer), Into: text(m.Into), Live: m.Live, Bytes: m.Bytes, Room: m.Room,
				OtherBytes: m.Other, OnlyWay: text(m.Only),
			}
		}),
		Kept: each(p.Kept, func(k agent.PlanKept) *vmsnapv1.DeletePlanKept {
			return &vmsnapv1.DeletePlanKept{Device: text(k.Device), Layer: text(k.Layer), Reason: text(k.Reason), Dependants: each(k.Dependants, text)}
		}),
		Memory:   p.Memory,
		Moved:    p.Moved,
		Freed:    p.Freed,
		Warnings: each(p.Warnings, warningProto),
		Blockers: each(p.Blockers, func(e *fault.Error) *vmsnapv1.Error { return detailOf(e) }),
	}
}
