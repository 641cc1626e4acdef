// Package blockdev knows QEMU's block layer: the graph of nodes behind a VM's
// drives, overlays, the cut that puts overlays on several drives in one
// instant, and the files that layers are.
//
// It works on one QEMU at a time, through a Monitor, and knows nothing of
// operations, catalogs or guests. Nothing here retries or decides: each
// function does one thing to QEMU or to a directory and says how it went. The
// order in which they are safe is the caller's. For a cut:
//
//	Graph.Drives          which drives there are and what each would cut
//	Dir.CreateFile        an empty file for the overlay, never an existing one
//	Overlay.Build         qcow2 header and nodes in QEMU, attached to nothing
//	Cut                   one transaction over all drives
//	Dir.PointAt           the launch path leads to the new active layer
//	Overlay.ReopenBacking no node is called by the launch path any more
//	Dir.SetImmutable      the covered layer cannot be written by mistake
//
// Merges are block jobs on a running VM (ActiveMerge, Commit, Stream) and the work
// of qemu-img on a stopped one (Offline). The caller has declared the layer that
// is written to no restore point any more, and knows that nothing else lies on it;
// both must be durable before. Each can be done again after it was interrupted.
//
// Functions are safe for concurrent use on different VMs. On one VM the caller
// holds its lock: QEMU's graph must not change between a Graph and its use.
package blockdev
