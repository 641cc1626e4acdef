package rpc

import (
	"context"
	"fmt"
	"net/http"
	"os/user"
	"strconv"
	"strings"

	"connectrpc.com/connect"
	"connectrpc.com/grpchealth"
	"connectrpc.com/grpcreflect"
	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/agent/event"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/api/vmsnap/v1/vmsnapv1connect"
)

// Role is what a peer may do. Each role may do all that the one before it may.
type Role int

// The roles.
const (
	NoRole   Role = iota // nothing
	Viewer               // look at VMs, snapshots and operations
	Operator             // also take and rename snapshots, freeze, thaw and cancel
	Admin                // also delete, restore and export, and remove records and protections
)

// String returns the role's name in the configuration.
func (r Role) String() string {
	switch r {
	case Viewer:
		return "viewer"
	case Operator:
		return "operator"
	case Admin:
		return "admin"
	default:
		return "none"
	}
}

// needed is the role that each procedure needs. What is not in it is refused.
var needed = map[string]Role{
	vmsnapv1connect.VMServiceListVMsProcedure:  Viewer,
	vmsnapv1connect.VMServiceGetVMProcedure:    Viewer,
	vmsnapv1connect.VMServiceFreezeVMProcedure: Operator,
	vmsnapv1connect.VMServiceThawVMProcedure:   Operator,
	// A diagnosis changes nothing, but it reads images and talks to the guest.
	vmsnapv1connect.VMServiceDiagnoseVMProcedure: Operator,
	vmsnapv1connect.VMServiceRepairVMProcedure:   Operator,
	vmsnapv1connect.VMServiceForgetVMProcedure:   Admin,
	vmsnapv1connect.VMServiceAttachDiskProcedure: Admin,
	vmsnapv1connect.VMServiceDetachDiskProcedure: Admin,
	// It names directories and users, and no guest is asked.
	vmsnapv1connect.VMServiceCheckHostProcedure:      Viewer,
	vmsnapv1connect.VMServiceRebuildCatalogProcedure: Admin,

	vmsnapv1connect.SnapshotServiceListSnapshotsProcedure:  Viewer,
	vmsnapv1connect.SnapshotServiceGetSnapshotProcedure:    Viewer,
	vmsnapv1connect.SnapshotServiceCreateSnapshotProcedure: Operator,
	vmsnapv1connect.SnapshotServiceCreateGroupProcedure:    Operator,
	// A plan changes nothing, but it talks to the guest.
	vmsnapv1connect.SnapshotServicePlanSnapshotProcedure:   Operator,
	vmsnapv1connect.SnapshotServiceRenameSnapshotProcedure: Operator,
	vmsnapv1connect.SnapshotServiceVerifySnapshotProcedure: Operator,
	vmsnapv1connect.SnapshotServicePlanRestoreProcedure:    Operator,
	vmsnapv1connect.SnapshotServiceGetPreviewProcedure:     Viewer,
	vmsnapv1connect.SnapshotServicePlanDeleteProcedure:     Operator,
	// What is deleted is gone.
	vmsnapv1connect.SnapshotServiceDeleteSnapshotsProcedure: Admin,
	// A restore takes away what was written since.
	vmsnapv1connect.SnapshotServiceRestoreSnapshotProcedure: Admin,
	vmsnapv1connect.SnapshotServiceRestoreGroupProcedure:    Admin,
	vmsnapv1connect.SnapshotServicePreviewSnapshotProcedure: Admin,
	vmsnapv1connect.SnapshotServiceCommitPreviewProcedure:   Admin,
	vmsnapv1connect.SnapshotServiceUndoPreviewProcedure:     Admin,
	// An export hands over what the guest has on its disk.
	vmsnapv1connect.SnapshotServiceExportSnapshotProcedure: Admin,
	vmsnapv1connect.SnapshotServiceCloneDiskProcedure:      Admin,
	vmsnapv1connect.SnapshotServiceCloneVMProcedure:        Admin,
	// Protections.
	vmsnapv1connect.SnapshotServiceForgetCloneProcedure: Admin,
	vmsnapv1connect.SnapshotServiceSetTemplateProcedure: Admin,

	vmsnapv1connect.OperationServiceListOperationsProcedure:  Viewer,
	vmsnapv1connect.OperationServiceGetOperationProcedure:    Viewer,
	vmsnapv1connect.OperationServiceWatchOperationProcedure:  Viewer,
	vmsnapv1connect.OperationServiceCancelOperationProcedure: Operator,
	vmsnapv1connect.OperationServicePauseOperationProcedure:  Operator,
	vmsnapv1connect.OperationServiceResumeOperationProcedure: Operator,

	vmsnapv1connect.EventServiceListEventsProcedure:  Viewer,
	vmsnapv1connect.EventServiceWatchEventsProcedure: Viewer,

	vmsnapv1connect.ScheduleServiceListSchedulesProcedure:  Viewer,
	vmsnapv1connect.ScheduleServiceGetScheduleProcedure:    Viewer,
	vmsnapv1connect.ScheduleServiceListRunsProcedure:       Viewer,
	vmsnapv1connect.ScheduleServiceCreateScheduleProcedure: Operator,
	vmsnapv1connect.ScheduleServiceEditScheduleProcedure:   Operator,
	vmsnapv1connect.ScheduleServicePlanScheduleProcedure:   Operator,
	vmsnapv1connect.ScheduleServicePauseScheduleProcedure:  Operator,
	vmsnapv1connect.ScheduleServiceResumeScheduleProcedure: Operator,
	vmsnapv1connect.ScheduleServiceDeleteScheduleProcedure: Operator,

	"/" + grpchealth.HealthV1ServiceName + "/Check":                       Viewer,
	"/" + grpchealth.HealthV1ServiceName + "/Watch":                       Viewer,
	"/" + grpcreflect.ReflectV1ServiceName + "/ServerReflectionInfo":      Viewer,
	"/" + grpcreflect.ReflectV1AlphaServiceName + "/ServerReflectionInfo": Viewer,
}

// Roles says which groups have which role. Root and the daemon's own user are
// always Admin. The zero value gives nobody else a role.
type Roles struct {
	groups map[uint32]Role
	self   uint32 // the daemon's own uid
}

// ResolveRoles looks up the groups of each role, given by name or number, and
// takes the uid that the daemon runs as. A group that does not exist is an
// error: a misspelt one would leave people locked out for no visible reason.
func ResolveRoles(self uint32, viewers, operators, admins []string) (Roles, error) {
	roles := Roles{groups: map[uint32]Role{}, self: self}
	for _, set := range []struct {
		role   Role
		groups []string
	}{{Viewer, viewers}, {Operator, operators}, {Admin, admins}} {
		for _, name := range set.groups {
			gid, err := groupID(name)
			if err != nil {
				return Roles{}, fmt.Errorf("group %q of role %s: %w", name, set.role, err)
			}
			roles.groups[gid] = max(roles.groups[gid], set.role)
		}
	}
	return roles, nil
}

func groupID(name string) (uint32, error) {
	text := name
	if _, err := strconv.ParseUint(name, 10, 32); err != nil {
		group, err := user.LookupGroup(name)
		if err != nil {
			return 0, err
		}
		text = group.Gid
	}
	gid, err := strconv.ParseUint(text, 10, 32)
	return uint32(gid), err
}

// Of returns the highest role that a peer has.
func (r Roles) Of(p Peer) Role {
	if p.UID == 0 || p.UID == r.self {
		return Admin
	}
	role := r.groups[p.GID]
	for _, gid := range p.Groups {
		role = max(role, r.groups[gid])
	}
	return role
}

// door lets calls in.
type door struct {
	roles   Roles
	log     hclog.Logger
	refused func(uid uint32, pid int32, procedure, reason string) // may be nil
}

// gate refuses calls that the peer's role does not permit, before anything of
// the request is read, and logs each refusal. It marks the others with who
// calls.
func (d door) gate(ctx context.Context, spec connect.Spec, _ connect.Peer, _ http.Header) (context.Context, error) {
	if peer, known := peerFrom(ctx); known {
		ctx = event.WithActor(ctx, peer.UID)
	}
	return ctx, d.permit(ctx, spec.Procedure)
}

func (d door) permit(ctx context.Context, procedure string) error {
	peer, known := peerFrom(ctx)
	role := NoRole
	if known {
		role = d.roles.Of(peer)
	}
	need, listed := needed[procedure]
	if known && listed && role >= need {
		return nil
	}
	d.log.Warn("call refused", "procedure", procedure, "uid", peer.UID, "pid", peer.PID,
		"role", role.String(), "needed", need.String(), "identified", known, "listed", listed)
	err := refusal(peer, role, need, listed, procedure)
	if d.refused != nil && listed {
		d.refused(peer.UID, peer.PID, strings.TrimPrefix(procedure, "/vmsnap.v1."), err.Error())
	}
	return wireError(err)
}

// refusal is what a caller is told that may not make a call.
func refusal(peer Peer, role, need Role, listed bool, procedure string) error {
	switch {
	case role == NoRole:
		return fault.New(fault.Denied, "uid %d has no role here", peer.UID).
			WithHint("join one of the groups that the daemon's configuration gives a role")
	case !listed:
		return fault.New(fault.Unsupported, "this vmsnapd has no procedure %s", procedure).
			WithHint("vmsnapd may be older than its client")
	default:
		return fault.New(fault.Denied, "uid %d has the role %s; this needs %s", peer.UID, role, need).
			WithHint("ask for membership of a group with the role %s", need)
	}
}
