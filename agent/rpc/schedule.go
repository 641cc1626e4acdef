package rpc

import (
	"context"

	"connectrpc.com/connect"

	"github.com/vmsnap/vmsnap/agent"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

type scheduleService struct{ backend Backend }

func (s scheduleService) CreateSchedule(ctx context.Context, req *connect.Request[vmsnapv1.CreateScheduleRequest]) (*connect.Response[vmsnapv1.CreateScheduleResponse], error) {
	spec, err := scheduleSpec(ctx, req.Msg.GetSpec())
	if err != nil {
		return nil, err
	}
	caller, err := uid(ctx)
	if err != nil {
		return nil, err
	}
	view, err := s.backend.CreateSchedule(ctx, spec, caller)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.CreateScheduleResponse{Schedule: scheduleProto(view)}), nil
}

func (s scheduleService) ListSchedules(ctx context.Context, _ *connect.Request[vmsnapv1.ListSchedulesRequest]) (*connect.Response[vmsnapv1.ListSchedulesResponse], error) {
	all, err := s.backend.Schedules(ctx)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.ListSchedulesResponse{Schedules: each(all, scheduleProto)}), nil
}

func (s scheduleService) GetSchedule(ctx context.Context, req *connect.Request[vmsnapv1.GetScheduleRequest]) (*connect.Response[vmsnapv1.GetScheduleResponse], error) {
	if err := checkRef("schedule", req.Msg.GetSchedule()); err != nil {
		return nil, err
	}
	view, err := s.backend.Schedule(ctx, req.Msg.GetSchedule())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.GetScheduleResponse{Schedule: scheduleProto(view)}), nil
}

func (s scheduleService) PlanSchedule(ctx context.Context, req *connect.Request[vmsnapv1.PlanScheduleRequest]) (*connect.Response[vmsnapv1.PlanScheduleResponse], error) {
	if err := checkLength("schedule", req.Msg.GetSchedule(), maxRef); err != nil {
		return nil, err
	}
	spec, err := scheduleSpec(ctx, req.Msg.GetSpec())
	if err != nil {
		return nil, err
	}
	view, err := s.backend.PlanSchedule(ctx, req.Msg.GetSchedule(), spec)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.PlanScheduleResponse{Schedule: scheduleProto(view)}), nil
}

func (s scheduleService) EditSchedule(ctx context.Context, req *connect.Request[vmsnapv1.EditScheduleRequest]) (*connect.Response[vmsnapv1.EditScheduleResponse], error) {
	if err := checkRef("schedule", req.Msg.GetSchedule()); err != nil {
		return nil, err
	}
	spec, err := scheduleSpec(ctx, req.Msg.GetSpec())
	if err != nil {
		return nil, err
	}
	view, err := s.backend.EditSchedule(ctx, req.Msg.GetSchedule(), spec, req.Msg.GetRevision())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.EditScheduleResponse{Schedule: scheduleProto(view)}), nil
}

func (s scheduleService) PauseSchedule(ctx context.Context, req *connect.Request[vmsnapv1.PauseScheduleRequest]) (*connect.Response[vmsnapv1.PauseScheduleResponse], error) {
	view, err := s.pause(ctx, req.Msg.GetSchedule(), true)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.PauseScheduleResponse{Schedule: view}), nil
}

func (s scheduleService) ResumeSchedule(ctx context.Context, req *connect.Request[vmsnapv1.ResumeScheduleRequest]) (*connect.Response[vmsnapv1.ResumeScheduleResponse], error) {
	view, err := s.pause(ctx, req.Msg.GetSchedule(), false)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.ResumeScheduleResponse{Schedule: view}), nil
}

func (s scheduleService) pause(ctx context.Context, ref string, paused bool) (*vmsnapv1.Schedule, error) {
	if err := checkRef("schedule", ref); err != nil {
		return nil, err
	}
	view, err := s.backend.PauseSchedule(ctx, ref, paused)
	if err != nil {
		return nil, err
	}
	return scheduleProto(view), nil
}

func (s scheduleService) DeleteSchedule(ctx context.Context, req *connect.Request[vmsnapv1.DeleteScheduleRequest]) (*connect.Response[vmsnapv1.DeleteScheduleResponse], error) {
	if err := checkRef("schedule", req.Msg.GetSchedule()); err != nil {
		return nil, err
	}
	if err := s.backend.DeleteSchedule(ctx, req.Msg.GetSchedule()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.DeleteScheduleResponse{}), nil
}

func (s scheduleService) ListRuns(ctx context.Context, req *connect.Request[vmsnapv1.ListRunsRequest]) (*connect.Response[vmsnapv1.ListRunsResponse], error) {
	msg := req.Msg
	if msg.GetLimit() > maxList {
		return nil, usage("limit is %d; at most %d is allowed", msg.GetLimit(), maxList)
	}
	err := first(checkLength("vm", msg.GetVm(), maxRef), checkLength("schedule", msg.GetSchedule(), maxRef), checkLength("disk", msg.GetDisk(), maxRef))
	if err != nil {
		return nil, err
	}
	list := s.backend.TakenRuns
	if msg.GetComing() {
		list = s.backend.ComingRuns
	}
	runs, err := list(ctx, agent.RunFilter{VM: msg.GetVm(), Schedule: msg.GetSchedule(), Disk: msg.GetDisk(), Limit: int(msg.GetLimit())})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.ListRunsResponse{Runs: each(runs, runProto)}), nil
}
