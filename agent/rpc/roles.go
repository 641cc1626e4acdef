package rpc

import (
	"context"
	"fmt"
	"iter"
	"net/http"
	"os/user"
	"regexp"
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

// need is what a call needs: a role, and that for the VMs that it is about.
type need struct {
	role Role
	vms  about
}

// needed is what each procedure needs. What is not in it is refused.
var needed = map[string]need{
	vmsnapv1connect.VMServiceListVMsProcedure:  {Viewer, listed},
	vmsnapv1connect.VMServiceGetVMProcedure:    {Viewer, ofVM},
	vmsnapv1connect.VMServiceFreezeVMProcedure: {Operator, ofVM},
	vmsnapv1connect.VMServiceThawVMProcedure:   {Operator, ofVM},
	// A diagnosis changes nothing, but it reads images and talks to the guest.
	vmsnapv1connect.VMServiceDiagnoseVMProcedure: {Operator, ofVM},
	vmsnapv1connect.VMServiceRepairVMProcedure:   {Operator, ofVM},
	vmsnapv1connect.VMServiceForgetVMProcedure:   {Admin, ofVM},
	vmsnapv1connect.VMServiceAttachDiskProcedure: {Admin, ofVM},
	vmsnapv1connect.VMServiceDetachDiskProcedure: {Admin, ofVM},
	// It names directories and users, and no guest is asked.
	vmsnapv1connect.VMServiceCheckHostProcedure:      {Viewer, host},
	vmsnapv1connect.VMServiceRebuildCatalogProcedure: {Admin, host},

	vmsnapv1connect.SnapshotServiceListSnapshotsProcedure:  {Viewer, listed},
	vmsnapv1connect.SnapshotServiceGetSnapshotProcedure:    {Viewer, ofSnapshot},
	vmsnapv1connect.SnapshotServiceCreateSnapshotProcedure: {Operator, ofVM},
	vmsnapv1connect.SnapshotServiceCreateGroupProcedure:    {Operator, ofVMs},
	// A plan changes nothing, but it talks to the guest.
	vmsnapv1connect.SnapshotServicePlanSnapshotProcedure:   {Operator, ofVM},
	vmsnapv1connect.SnapshotServiceRenameSnapshotProcedure: {Operator, ofSnapshot},
	vmsnapv1connect.SnapshotServiceVerifySnapshotProcedure: {Operator, ofSnapshot},
	vmsnapv1connect.SnapshotServicePlanRestoreProcedure:    {Operator, ofSnapshot},
	vmsnapv1connect.SnapshotServiceGetPreviewProcedure:     {Viewer, ofVM},
	vmsnapv1connect.SnapshotServicePlanDeleteProcedure:     {Operator, ofSnapshots},
	// What is deleted is gone.
	vmsnapv1connect.SnapshotServiceDeleteSnapshotsProcedure: {Admin, ofSnapshots},
	// A restore takes away what was written since.
	vmsnapv1connect.SnapshotServiceRestoreSnapshotProcedure: {Admin, ofSnapshot},
	vmsnapv1connect.SnapshotServiceRestoreGroupProcedure:    {Admin, ofGroup},
	vmsnapv1connect.SnapshotServicePreviewSnapshotProcedure: {Admin, ofSnapshot},
	vmsnapv1connect.SnapshotServiceCommitPreviewProcedure:   {Admin, ofVM},
	vmsnapv1connect.SnapshotServiceUndoPreviewProcedure:     {Admin, ofVM},
	// An export hands over what the guest has on its disk.
	vmsnapv1connect.SnapshotServiceExportSnapshotProcedure: {Admin, ofSnapshot},
	vmsnapv1connect.SnapshotServiceCloneDiskProcedure:      {Admin, ofSnapshot},
	vmsnapv1connect.SnapshotServiceCloneVMProcedure:        {Admin, ofNewVM},
	// Protections.
	vmsnapv1connect.SnapshotServiceForgetCloneProcedure: {Admin, host},
	vmsnapv1connect.SnapshotServiceSetTemplateProcedure: {Admin, ofSnapshot},

	vmsnapv1connect.OperationServiceListOperationsProcedure:  {Viewer, listed},
	vmsnapv1connect.OperationServiceGetOperationProcedure:    {Viewer, ofOperation},
	vmsnapv1connect.OperationServiceWatchOperationProcedure:  {Viewer, ofOperation},
	vmsnapv1connect.OperationServiceCancelOperationProcedure: {Operator, ofOperation},
	vmsnapv1connect.OperationServicePauseOperationProcedure:  {Operator, ofOperation},
	vmsnapv1connect.OperationServiceResumeOperationProcedure: {Operator, ofOperation},

	vmsnapv1connect.EventServiceListEventsProcedure:  {Viewer, listed},
	vmsnapv1connect.EventServiceWatchEventsProcedure: {Viewer, listed},

	vmsnapv1connect.ScheduleServiceListSchedulesProcedure:  {Viewer, host},
	vmsnapv1connect.ScheduleServiceGetScheduleProcedure:    {Viewer, host},
	vmsnapv1connect.ScheduleServiceListRunsProcedure:       {Viewer, host},
	vmsnapv1connect.ScheduleServiceCreateScheduleProcedure: {Operator, host},
	vmsnapv1connect.ScheduleServiceEditScheduleProcedure:   {Operator, host},
	vmsnapv1connect.ScheduleServicePlanScheduleProcedure:   {Operator, host},
	vmsnapv1connect.ScheduleServicePauseScheduleProcedure:  {Operator, host},
	vmsnapv1connect.ScheduleServiceResumeScheduleProcedure: {Operator, host},
	vmsnapv1connect.ScheduleServiceDeleteScheduleProcedure: {Operator, host},

	"/" + grpchealth.HealthV1ServiceName + "/Check":                       {Viewer, listed},
	"/" + grpchealth.HealthV1ServiceName + "/Watch":                       {Viewer, listed},
	"/" + grpcreflect.ReflectV1ServiceName + "/ServerReflectionInfo":      {Viewer, listed},
	"/" + grpcreflect.ReflectV1AlphaServiceName + "/ServerReflectionInfo": {Viewer, listed},
}

// Roles says which groups have which role, and for which VMs. Root and the
// daemon's own user are always Admin of all. The zero value gives nobody else a
// role.
type Roles struct {
	groups map[uint32][]grant
	self   uint32 // the daemon's own uid
}

// grant is a role that a group has for some VMs, or for all.
type grant struct {
	role Role
	vms  *regexp.Regexp // nil: all
}

// ResolveRoles looks up the groups of each role and takes the uid that the daemon
// runs as. Each is GROUP, or GROUP:PATTERN for the VMs whose name matches, the
// group by name or number. A group that does not exist is an error: a misspelt
// one would leave people locked out for no visible reason.
func ResolveRoles(self uint32, viewers, operators, admins []string) (Roles, error) {
	roles := Roles{groups: map[uint32][]grant{}, self: self}
	for _, set := range []struct {
		role   Role
		groups []string
	}{{Viewer, viewers}, {Operator, operators}, {Admin, admins}} {
		for _, text := range set.groups {
			name, pattern, some := strings.Cut(text, ":")
			gid, err := groupID(name)
			if err != nil {
				return Roles{}, fmt.Errorf("group %q of role %s: %w", name, set.role, err)
			}
			g := grant{role: set.role}
			if some {
				if g.vms, err = parsePattern(pattern); err != nil {
					return Roles{}, fmt.Errorf("group %q of role %s: %w", name, set.role, err)
				}
			}
			roles.groups[gid] = append(roles.groups[gid], g)
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

// Of returns the highest role that a peer has for any VM.
func (r Roles) Of(p Peer) Role {
	if r.owns(p) {
		return Admin
	}
	role := NoRole
	for g := range r.grants(p) {
		role = max(role, g.role)
	}
	return role
}

// scope returns the VMs for which a peer has a role or a higher one. Without any
// it is not nil, and empty.
func (r Roles) scope(p Peer, role Role) scope {
	if r.owns(p) {
		return nil
	}
	s := scope{}
	for g := range r.grants(p) {
		switch {
		case g.role < role:
		case g.vms == nil:
			return nil
		default:
			s = append(s, g.vms)
		}
	}
	return s
}

func (r Roles) owns(p Peer) bool { return p.UID == 0 || p.UID == r.self }

// grants yields what the groups of a peer have.
func (r Roles) grants(p Peer) iter.Seq[grant] {
	return func(yield func(grant) bool) {
		for _, gid := range append([]uint32{p.GID}, p.Groups...) {
			for _, g := range r.groups[gid] {
				if !yield(g) {
					return
				}
			}
		}
	}
}

// door lets calls in. A call passes it twice: the gate knows who calls and what
// for, the interceptor also the VMs that the request is about.
type door struct {
	roles   Roles
	owners  Owners
	log     hclog.Logger
	refused func(uid uint32, pid int32, procedure, reason string) // may be nil
}

// gate refuses calls that the peer's role does not permit, before anything of
// the request is read, and logs each refusal. It marks the others with who
// calls, and with the VMs that they may be about.
func (d door) gate(ctx context.Context, spec connect.Spec, _ connect.Peer, _ http.Header) (context.Context, error) {
	peer, known := peerFrom(ctx)
	if known {
		ctx = event.WithActor(ctx, peer.UID)
		ctx = context.WithValue(ctx, scopeKey{}, d.roles.scope(peer, needed[spec.Procedure].role))
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
	if known && listed && role >= need.role {
		return nil
	}
	return d.refuse(ctx, procedure, refusal(peer, role, need.role, listed, procedure))
}

// refuse logs and tells of a refusal, and gives it the form of the wire.
func (d door) refuse(ctx context.Context, procedure string, err error) error {
	peer, known := peerFrom(ctx)
	_, listed := needed[procedure]
	d.log.Warn("call refused", "procedure", procedure, "uid", peer.UID, "pid", peer.PID, "identified", known, "listed", listed, "error", err)
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
