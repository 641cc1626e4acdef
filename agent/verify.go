package agent

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/memdump"
)

// verifyRequest is what an operation of the kind verify was asked for.
type verifyRequest struct{ Snapshot string }

// VerifySnapshot starts an operation that reads a snapshot's memory file and
// compares it with its checksum. It changes nothing, and so keeps nobody from
// working on the VM.
func (a *Agent) VerifySnapshot(ctx context.Context, ref string, uid uint32) (op.Record, error) {
	s, err := a.Snapshot(ctx, ref)
	if err != nil {
		return op.Record{}, err
	}
	name := s.VMName + "/" + s.Name
	if s.Memory == nil {
		return op.Record{}, fault.New(fault.Unsupported, "snapshot %s has no memory, and nothing else of it has a checksum", name)
	}
	spec := op.Spec{Kind: op.KindVerify, VMName: s.VMName, Request: verifyRequest{s.ID}, UID: uid}
	if v := a.byID(s.VMID); v != nil {
		spec.Storage = v.storage()
	}
	return a.begin(ctx, spec, func(ctx context.Context, o *op.Op) error {
		o.SetSnapshot(s.ID)
		return o.Step(ctx, "memory", func(ctx context.Context) error {
			return a.verifySaved(ctx, s.Snapshot, func(done, total uint64) { o.Progress(done, total, "bytes") })
		})
	})
}

// verifySaved reads all of a snapshot's memory, and compares it with what was
// recorded when it was saved.
func (a *Agent) verifySaved(ctx context.Context, s catalog.Snapshot, progress func(done, total uint64)) error {
	name := s.VMName + "/" + s.Name
	sum, err := a.verifyMemory(ctx, s.Memory.Path, progress)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fault.New(fault.NotFound, "snapshot %s: its memory file %s is gone", name, s.Memory.Path).
			WithHint("the disks can be restored without it")
	case err != nil:
		return fault.New(kindOf(err), "snapshot %s: %w", name, err)
	case sum.StoredChecksum != s.Memory.Checksum:
		return fault.New(fault.Failed, "snapshot %s: %s is a memory file, but not the one that was saved: its checksum is %s instead of %s",
			name, s.Memory.Path, sum.StoredChecksum, s.Memory.Checksum)
	}
	return nil
}

func (a *Agent) verifyMemory(ctx context.Context, path string, progress func(done, total uint64)) (memdump.Sum, error) {
	dir, err := os.OpenRoot(filepath.Dir(path))
	if err != nil {
		return memdump.Sum{}, err
	}
	defer func() { _ = dir.Close() }()
	key, err := a.keyFor(dir, path)
	if err != nil {
		return memdump.Sum{}, err
	}
	_, sum, err := memdump.Verify(ctx, dir, filepath.Base(path), key, progress)
	return sum, err
}
