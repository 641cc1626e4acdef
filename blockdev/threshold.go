package blockdev

import "context"

// SetWriteThreshold has QEMU tell by the event BLOCK_WRITE_THRESHOLD, once, that a
// node is about to be written to beyond an offset in bytes (block-set-write-threshold
// in qapi/block-core.json); 0 takes that back. Node.WriteThreshold is what is set.
func SetWriteThreshold(ctx context.Context, m Monitor, node string, offset uint64) error {
	return m.Execute(ctx, "block-set-write-threshold", map[string]any{"node-name": node, "write-threshold": offset}, nil)
}
