package rpc

import (
	"context"
	"slices"

	"connectrpc.com/connect"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/event"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

type eventService struct{ backend Backend }

func (s eventService) ListEvents(ctx context.Context, req *connect.Request[vmsnapv1.ListEventsRequest]) (*connect.Response[vmsnapv1.ListEventsResponse], error) {
	filter, err := eventFilter(req.Msg.GetFilter())
	if err != nil {
		return nil, err
	}
	if req.Msg.GetLimit() > maxList {
		return nil, usage("limit is %d; at most %d is allowed", req.Msg.GetLimit(), maxList)
	}
	filter.Since, filter.Limit, filter.Visible = req.Msg.Since, int(req.Msg.GetLimit()), visible(ctx)
	list, err := s.backend.Events(ctx, filter)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&vmsnapv1.ListEventsResponse{
		Events: each(list.Events, eventProto), FirstSeq: list.Bounds.First, LastSeq: list.Bounds.Last,
	}), nil
}

func (s eventService) WatchEvents(ctx context.Context, req *connect.Request[vmsnapv1.WatchEventsRequest], stream *connect.ServerStream[vmsnapv1.WatchEventsResponse]) error {
	filter, err := eventFilter(req.Msg.GetFilter())
	if err != nil {
		return err
	}
	filter.Since, filter.Visible = req.Msg.Since, visible(ctx)
	ctx, cancel := whileServing(ctx)
	defer cancel()
	for news, err := range s.backend.WatchEvents(ctx, filter) {
		if err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return err
		}
		if err := stream.Send(newsProto(news)); err != nil {
			return err
		}
	}
	return context.Cause(ctx)
}

// newsProto returns nil for a watch that stands: only the headers go out then,
// which tell the client.
func newsProto(news agent.EventNews) *vmsnapv1.WatchEventsResponse {
	switch {
	case news.Stands:
		return nil
	case news.Gap != nil:
		return &vmsnapv1.WatchEventsResponse{Gap: &vmsnapv1.EventGap{FromSeq: news.Gap.From, ToSeq: news.Gap.To}}
	default:
		return &vmsnapv1.WatchEventsResponse{Event: eventProto(news.Event)}
	}
}

var severities = map[vmsnapv1.EventSeverity]event.Severity{
	vmsnapv1.EventSeverity_EVENT_SEVERITY_UNSPECIFIED: "",
	vmsnapv1.EventSeverity_EVENT_SEVERITY_INFO:        event.Info,
	vmsnapv1.EventSeverity_EVENT_SEVERITY_WARNING:     event.Warning,
	vmsnapv1.EventSeverity_EVENT_SEVERITY_ERROR:       event.Error,
}

var severityValues = map[event.Severity]vmsnapv1.EventSeverity{
	event.Info:    vmsnapv1.EventSeverity_EVENT_SEVERITY_INFO,
	event.Warning: vmsnapv1.EventSeverity_EVENT_SEVERITY_WARNING,
	event.Error:   vmsnapv1.EventSeverity_EVENT_SEVERITY_ERROR,
}

// eventFilter checks a filter.
func eventFilter(msg *vmsnapv1.EventFilter) (agent.EventFilter, error) {
	severity, known := severities[msg.GetSeverity()]
	if !known {
		return agent.EventFilter{}, usage("severity has the unknown value %d", msg.GetSeverity())
	}
	f := agent.EventFilter{VM: msg.GetVm(), Severity: severity, Operation: msg.GetOperationId(), Schedule: msg.GetSchedule()}
	if len(msg.GetKinds()) > len(event.Kinds) {
		return f, usage("kinds has %d entries; there are %d", len(msg.GetKinds()), len(event.Kinds))
	}
	for _, k := range msg.GetKinds() {
		if !slices.Contains(event.Kinds, event.Kind(k)) {
			return f, usage("there is no kind of event %q", k)
		}
		f.Kinds = append(f.Kinds, event.Kind(k))
	}
	if after := msg.GetAfter(); after != nil {
		if err := after.CheckValid(); err != nil {
			return f, usage("after is not a time")
		}
		f.After = after.AsTime()
	}
	return f, first(checkLength("vm", f.VM, maxRef), checkLength("operation_id", f.Operation, maxRef), checkLength("schedule", f.Schedule, maxRef))
}

func eventProto(e event.Event) *vmsnapv1.Event {
	return &vmsnapv1.Event{
		Seq:         e.Seq,
		Time:        stamp(e.Time),
		Kind:        text(string(e.Kind)),
		Severity:    severityValues[e.Severity],
		VmId:        text(e.VMID),
		VmName:      text(e.VMName),
		OperationId: text(e.Operation),
		SnapshotId:  text(e.Snapshot),
		Schedule:    text(e.Schedule),
		Uid:         e.UID,
		Disk:        text(e.Disk),
		Code:        text(e.Code),
		Result:      text(e.Result),
		Message:     text(e.Message),
	}
}
