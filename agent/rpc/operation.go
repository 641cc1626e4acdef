package rpc

import (
	"context"

	"connectrpc.com/connect"

	"github.com/vmsnap/vmsnap/agent"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

type operationService struct{ backend Backend }

func (s operationService) ListOperations(ctx context.Context, req *connect.Request[vmsnapv1.ListOperationsRequest]) (*connect.Response[vmsnapv1.ListOperationsResponse], error) {
	if err := checkListOperations(req.Msg); err != nil {
		return nil, err
	}
	records, err := s.backend.Operations(ctx, agent.OperationFilter{
		VM: req.Msg.GetVm(), Active: req.Msg.GetActive(), Limit: int(req.Msg.GetLimit()), Visible: visible(ctx),
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.ListOperationsResponse{Operations: each(records, operationProto)}), nil
}

func (s operationService) GetOperation(ctx context.Context, req *connect.Request[vmsnapv1.GetOperationRequest]) (*connect.Response[vmsnapv1.GetOperationResponse], error) {
	if err := checkRef("id", req.Msg.GetId()); err != nil {
		return nil, err
	}
	record, err := s.backend.Operation(ctx, req.Msg.GetId())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.GetOperationResponse{Operation: operationProto(record)}), nil
}

func (s operationService) WatchOperation(ctx context.Context, req *connect.Request[vmsnapv1.WatchOperationRequest], stream *connect.ServerStream[vmsnapv1.WatchOperationResponse]) error {
	if err := checkRef("id", req.Msg.GetId()); err != nil {
		return err
	}
	ctx, cancel := whileServing(ctx)
	defer cancel()
	final := false
	for record, err := range s.backend.WatchOperation(ctx, req.Msg.GetId()) {
		if err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return err
		}
		if err := stream.Send(&vmsnapv1.WatchOperationResponse{Operation: operationProto(record)}); err != nil {
			return err
		}
		final = record.State.Final()
	}
	if !final {
		return context.Cause(ctx)
	}
	return nil
}

func (s operationService) CancelOperation(ctx context.Context, req *connect.Request[vmsnapv1.CancelOperationRequest]) (*connect.Response[vmsnapv1.CancelOperationResponse], error) {
	if err := checkRef("id", req.Msg.GetId()); err != nil {
		return nil, err
	}
	record, err := s.backend.CancelOperation(ctx, req.Msg.GetId())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.CancelOperationResponse{Operation: operationProto(record)}), nil
}

func (s operationService) PauseOperation(ctx context.Context, req *connect.Request[vmsnapv1.PauseOperationRequest]) (*connect.Response[vmsnapv1.PauseOperationResponse], error) {
	if err := checkRef("id", req.Msg.GetId()); err != nil {
		return nil, err
	}
	record, err := s.backend.PauseOperation(ctx, req.Msg.GetId())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.PauseOperationResponse{Operation: operationProto(record)}), nil
}

func (s operationService) ResumeOperation(ctx context.Context, req *connect.Request[vmsnapv1.ResumeOperationRequest]) (*connect.Response[vmsnapv1.ResumeOperationResponse], error) {
	if err := checkRef("id", req.Msg.GetId()); err != nil {
		return nil, err
	}
	record, err := s.backend.ResumeOperation(ctx, req.Msg.GetId())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.ResumeOperationResponse{Operation: operationProto(record)}), nil
}
