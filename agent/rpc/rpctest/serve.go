package rpctest

import (
	"context"
	"net"
	"path/filepath"
	"testing"

	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/agent/rpc"
)

// Serve serves a backend on a new socket until the test ends, and returns the
// socket's path.
func Serve(t testing.TB, backend rpc.Backend, opts rpc.Options) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "d.sock")
	ServeAt(t, socket, backend, opts)
	return socket
}

// ServeAt serves a backend at a socket until the test ends or the returned
// function is called, which returns when the socket is gone.
func ServeAt(t testing.TB, socket string, backend rpc.Backend, opts rpc.Options) (stop func()) {
	t.Helper()
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	if opts.Logger == nil {
		opts.Logger = hclog.NewNullLogger()
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		defer close(done)
		done <- rpc.Serve(ctx, listener, rpc.NewHandler(backend, opts), opts.Logger)
	}()
	stop = func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	}
	t.Cleanup(stop)
	return stop
}
