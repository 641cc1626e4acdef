package rpc

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime/debug"
	"time"

	"connectrpc.com/connect"
	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/fault"
)

// calls is the interceptor around every permitted call: it logs the call, tells
// of one that was to change something, and gives its error the form of the wire.
type calls struct {
	log  hclog.Logger
	made func(agent.Call) // may be nil
}

func (c calls) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		started := time.Now()
		res, err := next(ctx, req)
		if peer, known := peerFrom(ctx); known && c.made != nil && changes(req.Spec().Procedure) {
			c.made(made(peer, req, res, err))
		}
		return res, c.finish(ctx, req.Spec().Procedure, started, err)
	}
}

func (c calls) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

func (c calls) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		started := time.Now()
		err := next(ctx, conn)
		return c.finish(ctx, conn.Spec().Procedure, started, err)
	}
}

// finish logs a call's end. Errors that are the daemon's own fault are logged
// for the operator; the others are the caller's business.
func (c calls) finish(ctx context.Context, procedure string, started time.Time, err error) error {
	peer, _ := peerFrom(ctx)
	attrs := []any{"procedure", procedure, "uid", peer.UID, "pid", peer.PID, "took", time.Since(started)}
	if err == nil {
		c.log.Debug("call", attrs...)
		return nil
	}
	err = wireError(err)
	code := connect.CodeOf(err)
	attrs = append(attrs, "code", code, "error", err)
	if code == connect.CodeInternal {
		c.log.Error("call failed", attrs...)
	} else {
		c.log.Debug("call", attrs...)
	}
	return err
}

// recovered turns a panic in a handler into an error: the other VMs of the
// host must not lose their agent over it.
func recovered(log hclog.Logger) func(context.Context, connect.Spec, http.Header, any) error {
	return func(_ context.Context, spec connect.Spec, _ http.Header, cause any) error {
		log.Error("call panicked", "procedure", spec.Procedure, "panic", fmt.Sprint(cause), "stack", string(debug.Stack()))
		return fault.New(fault.Failed, "vmsnapd failed inside").
			WithHint("its log has the details; please report them")
	}
}

// errNoPeer is for a call that came on a connection whose peer is unknown. The
// gate refuses those, so only a wiring mistake brings it up.
var errNoPeer = errors.New("the call's peer is unknown")

// uid returns who called.
func uid(ctx context.Context) (uint32, error) {
	peer, ok := peerFrom(ctx)
	if !ok {
		return 0, errNoPeer
	}
	return peer.UID, nil
}

// caller returns who called, for the agent to judge where they may write.
func caller(ctx context.Context) (agent.Caller, error) {
	peer, ok := peerFrom(ctx)
	if !ok {
		return agent.Caller{}, errNoPeer
	}
	return agent.Caller{UID: peer.UID, GID: peer.GID, Groups: peer.Groups}, nil
}
