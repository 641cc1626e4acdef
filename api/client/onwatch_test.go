package client_test

import (
	"context"
	"iter"

	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/agent/rpc/rpctest"
)

// onWatch is a backend in which something happens once a watcher has seen the
// operation for the first time.
type onWatch struct {
	*rpctest.Backend
	then func()
}

func (w *onWatch) WatchOperation(ctx context.Context, id string) iter.Seq2[op.Record, error] {
	return func(yield func(op.Record, error) bool) {
		first := true
		for r, err := range w.Backend.WatchOperation(ctx, id) {
			if !yield(r, err) {
				return
			}
			if first {
				first = false
				w.then()
			}
		}
	}
}
