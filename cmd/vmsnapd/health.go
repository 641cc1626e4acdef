package main

import (
	"context"
	"fmt"

	"connectrpc.com/connect"

	"github.com/vmsnap/vmsnap/api/client"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// health looks at the daemon as its callers do: through its socket, handlers
// and catalog. No VM is asked, since one that hangs must not look like a daemon
// that does.
type health struct{ client *client.Client }

func (h health) check(ctx context.Context) error {
	if _, err := h.client.VMs().ListVMs(ctx, connect.NewRequest(&vmsnapv1.ListVMsRequest{})); err != nil {
		return fmt.Errorf("list VMs: %w", err)
	}
	one := connect.NewRequest(&vmsnapv1.ListOperationsRequest{Limit: 1})
	if _, err := h.client.Operations().ListOperations(ctx, one); err != nil {
		return fmt.Errorf("read the catalog: %w", err)
	}
	return nil
}
