package rpc

import (
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/api/vmsnap/v1/vmsnapv1connect"
)

// changeNothing are the procedures that need more than a viewer, and only look.
var changeNothing = map[string]bool{
	vmsnapv1connect.VMServiceDiagnoseVMProcedure:         true,
	vmsnapv1connect.SnapshotServicePlanSnapshotProcedure: true,
	vmsnapv1connect.SnapshotServicePlanRestoreProcedure:  true,
	vmsnapv1connect.SnapshotServicePlanDeleteProcedure:   true,
	vmsnapv1connect.ScheduleServicePlanScheduleProcedure: true,
}

// changes reports whether a procedure changes anything.
func changes(procedure string) bool {
	return needed[procedure].role > Viewer && !changeNothing[procedure]
}

// made describes a call that has been made. res is nil when it failed.
func made(peer Peer, req connect.AnyRequest, res connect.AnyResponse, err error) agent.Call {
	c := agent.Call{UID: peer.UID, PID: peer.PID, Procedure: strings.TrimPrefix(req.Spec().Procedure, "/vmsnap.v1.")}
	if m, ok := req.Any().(proto.Message); ok {
		c.VM, c.Subject, c.RequestID = textField(m, "vm"), firstField(m, "snapshot", "name", "schedule", "path", "id"), textField(m, "request_id")
		if vm, name, ok := strings.Cut(textField(m, "snapshot"), "/"); ok && name != "" {
			c.VM = vm
		}
	}
	if err != nil {
		c.Failed, c.Reason = string(kindOf(err)), err.Error()
		return c
	}
	if m, ok := res.Any().(proto.Message); ok {
		if o := m.ProtoReflect().Descriptor().Fields().ByName("operation"); o != nil && o.Kind() == protoreflect.MessageKind {
			c.Operation = textField(m.ProtoReflect().Get(o).Message().Interface(), "id")
		}
	}
	return c
}

// textField returns the value of a string field, "" when a message has no such
// field.
func textField(m proto.Message, name protoreflect.Name) string {
	f := m.ProtoReflect().Descriptor().Fields().ByName(name)
	if f == nil || f.Kind() != protoreflect.StringKind || f.IsList() {
		return ""
	}
	return m.ProtoReflect().Get(f).String()
}

func firstField(m proto.Message, names ...protoreflect.Name) string {
	for _, name := range names {
		if value := textField(m, name); value != "" {
			return value
		}
	}
	return ""
}
