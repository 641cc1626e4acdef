package rpctest

import (
	"context"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
)

// ExportSnapshot is an error unless it is scripted.
func (b *Backend) ExportSnapshot(ctx context.Context, req agent.ExportRequest) (op.Record, error) {
	if f := b.scripted().Export; f != nil {
		return f(ctx, req)
	}
	return op.Record{}, fault.New(fault.Unsupported, "no script for exporting snapshots")
}
