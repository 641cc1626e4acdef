// Package launch starts QEMU processes again, from what was captured of one that
// ran, so that they wait for their memory.
//
// A [Machine] is what was captured. [Machine.Incoming] makes the command line of
// a QEMU that waits for its memory (-incoming defer -S), of the very machine type
// that the memory was saved from. [Choose] says who is to start it, and a [Spec]
// is all of that put together: made for a journal, and for whoever starts QEMU
// when it is not us.
//
// # Launchers
//
//   - unit: the VM has a unit of its own. It is started through that unit, whose
//     command is replaced by a drop-in for this one start (systemd.unit(5)).
//   - systemd: a transient unit, in the slice that the VM was in.
//   - exec: a child of this process in a session of its own, which outlives it; in
//     a scope of its own where systemd runs.
//   - external: somebody else starts it, by the specification.
//
// # Ordering
//
// [Spec.Start] returns once QEMU was started, or is known not to have been. That it
// waits for its memory is for its monitor to say; [Launched.Failed] says meanwhile
// if it will not. [Spec.Clear] takes back what a start leaves behind it, also one
// of a process that is gone, and may be repeated.
//
// # Concurrency
//
// Everything may be called from any goroutine. exec runs one goroutine for each
// QEMU, which waits for its end.
package launch
