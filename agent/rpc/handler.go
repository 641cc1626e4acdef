package rpc

import (
	"context"
	"net/http"

	"connectrpc.com/connect"
	"connectrpc.com/grpchealth"
	"connectrpc.com/grpcreflect"
	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/api/vmsnap/v1/vmsnapv1connect"
)

// maxRequest bounds a request, in bytes as sent and as decompressed. The
// largest honest one, a snapshot of 256 disks by name, is some 100 KiB.
const maxRequest = 1 << 20

// Options are what a handler needs beside its backend.
type Options struct {
	Logger  hclog.Logger // nil: no log
	Roles   Roles
	Version string // of the daemon; told in the Server header as "vmsnapd/VERSION"
	// Refused, when not nil, is called with every call that a peer's role did not
	// permit.
	Refused func(uid uint32, pid int32, procedure, reason string)
	// Made, when not nil, is called with every call that was permitted and was to
	// change something, when it has ended.
	Made func(agent.Call)
}

// NewHandler returns the handler of the whole API: the services, health
// and reflection. It serves connections that Serve has accepted; a call on any
// other is refused, since its peer is unknown.
func NewHandler(backend Backend, opts Options) http.Handler {
	log := opts.Logger
	if log == nil {
		log = hclog.NewNullLogger()
	}
	door := door{opts.Roles, backend, log, opts.Refused}
	common := []connect.HandlerOption{
		connect.WithReadMaxBytes(maxRequest),
		connect.WithRequestGate(door.gate),
		connect.WithInterceptors(door, calls{log, opts.Made}),
		connect.WithRecover(recovered(log)),
	}
	served := []string{
		vmsnapv1connect.VMServiceName,
		vmsnapv1connect.SnapshotServiceName,
		vmsnapv1connect.OperationServiceName,
		vmsnapv1connect.EventServiceName,
		vmsnapv1connect.ScheduleServiceName,
	}
	mux := http.NewServeMux()
	mux.Handle(vmsnapv1connect.NewVMServiceHandler(vmService{backend}, common...))
	mux.Handle(vmsnapv1connect.NewSnapshotServiceHandler(snapshotService{backend}, common...))
	mux.Handle(vmsnapv1connect.NewOperationServiceHandler(operationService{backend}, common...))
	mux.Handle(vmsnapv1connect.NewEventServiceHandler(eventService{backend}, common...))
	mux.Handle(vmsnapv1connect.NewScheduleServiceHandler(scheduleService{backend}, common...))
	mux.Handle(grpchealth.NewHandler(grpchealth.NewStaticChecker(served...), common...))
	reflector := grpcreflect.NewStaticReflector(served...)
	mux.Handle(grpcreflect.NewHandlerV1(reflector, common...))
	mux.Handle(grpcreflect.NewHandlerV1Alpha(reflector, common...))
	errs := connect.NewErrorWriter(common...)
	taken := newAllowances()
	server := "vmsnapd"
	if opts.Version != "" {
		server += "/" + opts.Version
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Server", server)
		leave, err := taken.enter(r.Context())
		if err == nil {
			defer leave()
			if _, listed := needed[r.URL.Path]; listed {
				mux.ServeHTTP(w, r)
				return
			}
			err = door.permit(r.Context(), r.URL.Path)
		}
		if err := errs.Write(w, r, wireError(err)); err != nil {
			log.Debug("refusal not sent", "error", err)
		}
	})
}

type stoppingKey struct{}

// whileServing returns a context that also ends when the daemon stops to
// serve. It is for streams, which would hold the daemon back for ever.
func whileServing(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stopping, ok := ctx.Value(stoppingKey{}).(context.Context)
	if !ok {
		return ctx, func() { cancel(nil) }
	}
	stop := context.AfterFunc(stopping, func() { cancel(errStopping()) })
	return ctx, func() { stop(); cancel(nil) }
}
