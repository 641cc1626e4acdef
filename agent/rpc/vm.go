package rpc

import (
	"context"
	"slices"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/vmsnap/vmsnap/agent"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

type vmService struct{ backend Backend }

func (s vmService) ListVMs(ctx context.Context, _ *connect.Request[vmsnapv1.ListVMsRequest]) (*connect.Response[vmsnapv1.ListVMsResponse], error) {
	vms, discovery := s.backend.VMs(ctx)
	if may := visible(ctx); may != nil {
		vms = slices.DeleteFunc(vms, func(v agent.VMView) bool { return !may(v.ID, v.Name) })
	}
	return connect.NewResponse(&vmsnapv1.ListVMsResponse{
		Vms:             each(vms, vmProto),
		Discovery:       discovery.Source,
		DiscoveryReason: text(discovery.Reason),
	}), nil
}

func (s vmService) GetVM(ctx context.Context, req *connect.Request[vmsnapv1.GetVMRequest]) (*connect.Response[vmsnapv1.GetVMResponse], error) {
	if err := checkRef("vm", req.Msg.GetVm()); err != nil {
		return nil, err
	}
	vm, err := s.backend.VM(ctx, req.Msg.GetVm())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.GetVMResponse{Vm: vmProto(vm)}), nil
}

func (s vmService) ForgetVM(ctx context.Context, req *connect.Request[vmsnapv1.ForgetVMRequest]) (*connect.Response[vmsnapv1.ForgetVMResponse], error) {
	if err := checkRef("vm", req.Msg.GetVm()); err != nil {
		return nil, err
	}
	layers, err := s.backend.Forget(ctx, req.Msg.GetVm(), req.Msg.GetRelease())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.ForgetVMResponse{Layers: each(layers, text)}), nil
}

func (s vmService) FreezeVM(ctx context.Context, req *connect.Request[vmsnapv1.FreezeVMRequest]) (*connect.Response[vmsnapv1.FreezeVMResponse], error) {
	msg := req.Msg
	if err := checkFreeze(msg); err != nil {
		return nil, err
	}
	caller, err := uid(ctx)
	if err != nil {
		return nil, err
	}
	freeze, err := s.backend.Freeze(ctx, agent.FreezeRequest{
		VM:            msg.GetVm(),
		Lease:         msg.GetLease().AsDuration(),
		FreezeTimeout: msg.GetFreezeTimeout().AsDuration(),
		Mountpoints:   msg.GetMountpoints(),
		UID:           caller,
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.FreezeVMResponse{Freeze: freezeProto(&freeze)}), nil
}

func (s vmService) ThawVM(ctx context.Context, req *connect.Request[vmsnapv1.ThawVMRequest]) (*connect.Response[vmsnapv1.ThawVMResponse], error) {
	if err := checkRef("vm", req.Msg.GetVm()); err != nil {
		return nil, err
	}
	result, err := s.backend.Thaw(ctx, req.Msg.GetVm())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.ThawVMResponse{
		WasFrozen:    result.WasFrozen,
		FreezeWindow: durationpb.New(result.Window),
	}), nil
}

func (s vmService) DiagnoseVM(ctx context.Context, req *connect.Request[vmsnapv1.DiagnoseVMRequest]) (*connect.Response[vmsnapv1.DiagnoseVMResponse], error) {
	if err := checkRef("vm", req.Msg.GetVm()); err != nil {
		return nil, err
	}
	d, err := s.backend.Diagnose(ctx, agent.DoctorRequest{VM: req.Msg.GetVm(), Deep: req.Msg.GetDeep()})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.DiagnoseVMResponse{Findings: each(d.Findings, findingProto), Skipped: text(d.Skipped)}), nil
}

func (s vmService) RepairVM(ctx context.Context, req *connect.Request[vmsnapv1.RepairVMRequest]) (*connect.Response[vmsnapv1.RepairVMResponse], error) {
	if err := checkRef("vm", req.Msg.GetVm()); err != nil {
		return nil, err
	}
	caller, err := uid(ctx)
	if err != nil {
		return nil, err
	}
	d, err := s.backend.Repair(ctx, agent.DoctorRequest{VM: req.Msg.GetVm(), Deep: req.Msg.GetDeep(), UID: caller})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.RepairVMResponse{Findings: each(d.Findings, findingProto)}), nil
}

func (s vmService) CheckHost(ctx context.Context, _ *connect.Request[vmsnapv1.CheckHostRequest]) (*connect.Response[vmsnapv1.CheckHostResponse], error) {
	checks, err := s.backend.CheckHost(ctx)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.CheckHostResponse{Checks: each(checks, checkProto)}), nil
}

func (s vmService) RebuildCatalog(ctx context.Context, req *connect.Request[vmsnapv1.RebuildCatalogRequest]) (*connect.Response[vmsnapv1.RebuildCatalogResponse], error) {
	if err := checkList("dirs", req.Msg.GetDirs(), maxDirs, maxDir); err != nil {
		return nil, err
	}
	r, err := s.backend.RebuildCatalog(ctx, req.Msg.GetDirs())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.RebuildCatalogResponse{Skipped: each(r.Skipped, text), Vms: each(r.VMs, func(v agent.RebuiltVM) *vmsnapv1.RebuiltVM {
		return &vmsnapv1.RebuiltVM{Id: text(v.ID), Name: text(v.Name), Layers: uint32(v.Layers), Snapshots: uint32(v.Snapshots)}
	})}), nil
}
