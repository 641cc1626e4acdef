package rpc

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"connectrpc.com/connect"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/fault"
)

// scope is the VMs that a role was given for: those whose name matches one of the
// patterns. Nil is all of them, and the host itself.
type scope []*regexp.Regexp

// holds reports whether a VM is in the scope.
func (s scope) holds(name string) bool {
	if s == nil {
		return true
	}
	for _, pattern := range s {
		if pattern.MatchString(name) {
			return true
		}
	}
	return false
}

// parsePattern reads a pattern of VMs' names: * stands for any characters, ? for
// one.
func parsePattern(text string) (*regexp.Regexp, error) {
	if text == "" {
		return nil, errors.New("the pattern of VMs' names is empty; without a colon it is for all VMs")
	}
	if strings.ContainsAny(text, `[]{}\,`) {
		return nil, fmt.Errorf("the pattern %q of VMs' names has characters other than of a name, * and ?", text)
	}
	return regexp.Compile(`(?s)\A` + strings.NewReplacer(`\*`, `.*`, `\?`, `.`).Replace(regexp.QuoteMeta(text)) + `\z`)
}

type scopeKey struct{}

// scopeOf returns the scope of the role that a call needed. Of a call that the
// gate has not let in it is nothing.
func scopeOf(ctx context.Context) scope {
	if s, let := ctx.Value(scopeKey{}).(scope); let {
		return s
	}
	return scope{}
}

// visible returns what of a list its caller may see, nil for all.
func visible(ctx context.Context) agent.Visible {
	s := scopeOf(ctx)
	if s == nil {
		return nil
	}
	return func(vmID, vmName string) bool {
		names := []string{vmName}
		if vmID == "" {
			names = strings.Split(vmName, ",")
		}
		return vmName != "" && !slices.ContainsFunc(names, func(name string) bool { return !s.holds(name) })
	}
}

// Owners says which VMs a reference is about. *agent.Agent does.
type Owners interface {
	VMOf(ref string) (name string, err error)
	VMOfSnapshot(ctx context.Context, ref string) (name string, err error)
	VMsOfGroup(ctx context.Context, ref string) (names []string, err error)
	VMsOfOperation(ctx context.Context, id string) (names []string, err error)
}

// about finds the names of the VMs that a request is about. What a reference
// means that nothing answers to is judged by its own text, so that nobody learns
// from the answer what there is outside of their scope.
type about func(ctx context.Context, o Owners, req any) ([]string, error)

// errHost says that a call is about more than VMs that it names.
var errHost = errors.New("the whole host")

// host is of calls about the host, or about VMs that their request does not name.
func host(context.Context, Owners, any) ([]string, error) { return nil, errHost }

// listed is of calls whose handler leaves out what is not visible, see visible.
// One that asks for one VM is about that.
func listed(ctx context.Context, o Owners, req any) ([]string, error) {
	if r, ok := req.(interface{ GetVm() string }); ok && r.GetVm() != "" {
		return ofVM(ctx, o, req)
	}
	return nil, nil
}

func ofVM(_ context.Context, o Owners, req any) ([]string, error) {
	r, ok := req.(interface{ GetVm() string })
	if !ok {
		return nil, errHost
	}
	return []string{vmOf(o, r.GetVm())}, nil
}

func vmOf(o Owners, ref string) string {
	if name, err := o.VMOf(ref); err == nil {
		return name
	}
	return ref
}

func ofVMs(_ context.Context, o Owners, req any) ([]string, error) {
	r, ok := req.(interface{ GetVms() []string })
	if !ok {
		return nil, errHost
	}
	return each(r.GetVms(), func(ref string) string { return vmOf(o, ref) }), nil
}

func ofSnapshot(ctx context.Context, o Owners, req any) ([]string, error) {
	r, ok := req.(interface{ GetSnapshot() string })
	if !ok {
		return nil, errHost
	}
	return []string{vmOfSnapshot(ctx, o, r.GetSnapshot())}, nil
}

func vmOfSnapshot(ctx context.Context, o Owners, ref string) string {
	if name, err := o.VMOfSnapshot(ctx, ref); err == nil {
		return name
	}
	vm, _, _ := strings.Cut(ref, "/")
	return vmOf(o, vm)
}

// ofSnapshots is of calls that name snapshots, or the VM whose snapshots a filter
// chooses.
func ofSnapshots(ctx context.Context, o Owners, req any) ([]string, error) {
	r, ok := req.(interface {
		GetSnapshots() []string
		GetVm() string
	})
	if !ok {
		return nil, errHost
	}
	names := each(r.GetSnapshots(), func(ref string) string { return vmOfSnapshot(ctx, o, ref) })
	if r.GetVm() != "" || len(names) == 0 {
		names = append(names, vmOf(o, r.GetVm()))
	}
	return names, nil
}

// ofNewVM is of calls that make a VM of a snapshot: its name is to be in the scope
// too.
func ofNewVM(ctx context.Context, o Owners, req any) ([]string, error) {
	r, ok := req.(interface{ GetName() string })
	if !ok {
		return nil, errHost
	}
	names, err := ofSnapshot(ctx, o, req)
	return append(names, r.GetName()), err
}

func ofGroup(ctx context.Context, o Owners, req any) ([]string, error) {
	r, ok := req.(interface{ GetGroup() string })
	if !ok {
		return nil, errHost
	}
	names, err := o.VMsOfGroup(ctx, r.GetGroup())
	if err != nil {
		return nil, errHost // also of a name that several groups have
	}
	return names, nil
}

func ofOperation(ctx context.Context, o Owners, req any) ([]string, error) {
	r, ok := req.(interface{ GetId() string })
	if !ok {
		return nil, errHost
	}
	return o.VMsOfOperation(ctx, r.GetId())
}

// inScope refuses a request about VMs that the caller's role is not for.
func (d door) inScope(ctx context.Context, procedure string, req any) error {
	s := scopeOf(ctx)
	if s == nil {
		return nil
	}
	need := needed[procedure]
	names, err := need.vms(ctx, d.owners, req)
	if err != nil && !errors.Is(err, errHost) {
		return wireError(err)
	}
	peer, _ := peerFrom(ctx)
	if err != nil {
		return d.refuse(ctx, procedure, fault.New(fault.Denied, "uid %d has the role %s for some VMs only; this is about %w", peer.UID, need.role, errHost).
			WithHint("ask for membership of a group with the role %s for all VMs", need.role))
	}
	for _, name := range names {
		if !s.holds(name) {
			return d.refuse(ctx, procedure, fault.New(fault.Denied, "uid %d does not have the role %s for VM %q", peer.UID, need.role, name).
				WithHint("ask for membership of a group with the role %s for this VM", need.role))
		}
	}
	return nil
}

// WrapUnary has each request judged by the VMs that it is about.
func (d door) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		if err := d.inScope(ctx, req.Spec().Procedure, req.Any()); err != nil {
			return nil, err
		}
		return next(ctx, req)
	}
}

// WrapStreamingClient is of no use to a server.
func (d door) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

// WrapStreamingHandler has the request of a stream judged when it is received.
func (d door) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		return next(ctx, judgedConn{conn, ctx, d})
	}
}

// judgedConn judges each request that it receives.
type judgedConn struct {
	connect.StreamingHandlerConn
	ctx  context.Context //nolint:containedctx // a connection is of one call
	door door
}

func (c judgedConn) Receive(msg any) error {
	if err := c.StreamingHandlerConn.Receive(msg); err != nil {
		return err
	}
	return c.door.inScope(c.ctx, c.Spec().Procedure, msg)
}
