package rpc

import (
	"context"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/catalog"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

func (s snapshotService) CreateGroup(ctx context.Context, req *connect.Request[vmsnapv1.CreateGroupRequest]) (*connect.Response[vmsnapv1.CreateGroupResponse], error) {
	request, err := groupRequest(ctx, req.Msg)
	if err != nil {
		return nil, err
	}
	record, err := s.backend.CreateGroup(ctx, request)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.CreateGroupResponse{Operation: operationProto(record)}), nil
}

func (s snapshotService) RestoreGroup(ctx context.Context, req *connect.Request[vmsnapv1.RestoreGroupRequest]) (*connect.Response[vmsnapv1.RestoreGroupResponse], error) {
	msg := req.Msg
	if err := first(checkRef("group", msg.GetGroup()), checkLength("request_id", msg.GetRequestId(), maxRequestID)); err != nil {
		return nil, err
	}
	caller, err := uid(ctx)
	if err != nil {
		return nil, err
	}
	record, err := s.backend.RestoreGroup(ctx, agent.GroupRestoreRequest{
		Group: msg.GetGroup(), BestEffort: msg.GetBestEffort(), NoSafety: msg.GetNoSafetySnapshot(), RequestID: msg.GetRequestId(), UID: caller,
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.RestoreGroupResponse{Operation: operationProto(record)}), nil
}

// maxGroup bounds the VMs of a group.
const maxGroup = 64

func groupRequest(ctx context.Context, msg *vmsnapv1.CreateGroupRequest) (agent.GroupRequest, error) {
	o := msg.GetOptions()
	if o.GetVm() != "" || o.GetName() != "" || o.GetRequestId() != "" {
		return agent.GroupRequest{}, usage("options has a vm, a name or a request_id: they are the group's to choose")
	}
	err := first(
		checkRef("name", msg.GetName()),
		checkLength("name", msg.GetName(), maxName),
		checkList("vms", msg.GetVms(), maxGroup, maxRef),
		checkDuration("max_skew", msg.GetMaxSkew()),
		checkLength("request_id", msg.GetRequestId(), maxRequestID),
	)
	if err != nil {
		return agent.GroupRequest{}, err
	}
	whole := &vmsnapv1.CreateSnapshotRequest{}
	proto.Merge(whole, o)
	whole.Vm = "any" // the rest is checked as that of a single snapshot
	options, err := snapshotRequest(ctx, whole)
	options.VM = ""
	return agent.GroupRequest{
		Name: msg.GetName(), VMs: msg.GetVms(), BestEffort: msg.GetBestEffort(), MaxSkew: msg.GetMaxSkew().AsDuration(),
		Options: options, RequestID: msg.GetRequestId(), UID: options.UID,
	}, err
}

func groupProto(g *catalog.GroupCut) *vmsnapv1.GroupCut {
	if g == nil {
		return nil
	}
	return &vmsnapv1.GroupCut{Name: text(g.Name), OperationId: text(g.Operation), Members: uint32(max(g.Members, 0)), Skew: span(g.Skew)}
}
