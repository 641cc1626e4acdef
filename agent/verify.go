package agent

import (
	"context"

	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
)

// VerifySnapshot starts an operation that compares a snapshot's memory file
// with its checksum.
func (a *Agent) VerifySnapshot(ctx context.Context, ref string, uid uint32) (op.Record, error) {
	s, err := a.Snapshot(ctx, ref)
	if err != nil {
		return op.Record{}, err
	}
	if s.Memory == nil {
		return op.Record{}, fault.New(fault.Unsupported, "snapshot %s/%s has no memory, and nothing else of it has a checksum", s.VMName, s.Name)
	}
	return op.Record{}, fault.New(fault.Unsupported, "snapshot %s/%s cannot be verified yet", s.VMName, s.Name)
}
