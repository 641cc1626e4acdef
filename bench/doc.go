// Command bench measures what vmsnap costs a guest and its host; `make bench`
// runs it. Each figure with a budget is a ratio to a rival that is measured in
// the same run, on the same guest, in turns with it, so that it means the same
// on every machine. It exits with 1 if a budget is missed.
//
// The rival of the freeze window is a bare script: over sockets that are open
// already it freezes, sends the one transaction, and thaws, and does nothing
// else (bare.go). vmsnap is used through its API, as a controller does.
//
// A restore in place stands beside a bare stop, reset and resume of the same
// guest, which change no disk (restore.go).
//
// Merges, of a running disk and of a stopped one, stand beside `virsh blockcommit`
// and `qemu-img commit` of equal layers (merge.go).
//
// The rival of snapshots with memory is libvirt (virsh snapshot-create-as --live
// --memspec) with an equal guest, in a libvirtd of the benchmark's own, which
// the host's is not touched by (libvirt.go). The guest changes its memory at a
// steady rate; how long it stands still is what its heartbeat shows from
// outside, whoever saves it. How fast memory gets to the disk is compared with
// what QEMU alone does, with the null device and with a file, and with what the
// disk takes (floors.go).
//
// The memory is loaded by a restore, and by QEMU alone from a file of its own
// (load.go).
//
// How all of it grows is measured with ever more VMs (scale.go): with idle QEMU
// processes (fleet.go), and with VMs that have a process and sockets and no QEMU,
// of which a host can have thousands (scripted.go); and with ever more snapshots
// in the catalog (catalog.go).
//
// The table, the raw runs, which benchstat reads, and plots of them (plots.go) are
// left in bench/results/DATE-HOST.
package main
