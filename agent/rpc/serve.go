package rpc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/hashicorp/go-hclog"
)

// The deadlines of connections.
const (
	// A client sends its headers at once; one that does not only holds memory.
	headerTimeout = 10 * time.Second
	// Controllers keep a connection between calls; opening another is cheap.
	idleTimeout = 5 * time.Minute
	// The longest call, a freeze, waits for a guest for some 15 s by default.
	// It reverts when it is cut off, so it need not be waited for.
	stopTimeout = 5 * time.Second
)

// Serve serves the API on a Unix socket until ctx ends: HTTP/1.1 and HTTP/2
// without TLS, each connection's peer identified when it is accepted, and the
// number of each user's connections bounded. Then it stops to accept, ends the
// streams with an error that tells clients to resume them, and gives the other
// calls five seconds. It closes the listener.
func Serve(ctx context.Context, listener net.Listener, handler http.Handler, log hclog.Logger) error {
	base := context.WithValue(context.WithoutCancel(ctx), stoppingKey{}, ctx)
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{
		Handler:           handler,
		Protocols:         protocols,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		BaseContext:       func(net.Listener) context.Context { return base },
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			if known, ok := conn.(*knownConn); ok {
				return context.WithValue(ctx, peerKey{}, known.peer)
			}
			return ctx
		},
		ErrorLog: log.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Debug}),
	}
	stopped := make(chan error, 1)
	unhook := context.AfterFunc(ctx, func() {
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		err := server.Shutdown(grace)
		if errors.Is(err, context.DeadlineExceeded) {
			log.Warn("calls cut off, the daemon stops")
			err = server.Close()
		}
		stopped <- err
	})
	err := server.Serve(&frontListener{Listener: listener, log: log, open: map[uint32]int{}})
	if unhook() { // ctx has not ended: the listener failed
		return fmt.Errorf("serve the API: %w", errors.Join(err, server.Close()))
	}
	return <-stopped
}
