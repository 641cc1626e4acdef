// Package daemon runs a vmsnapd of one's own, for the demo and the benchmarks.
//
// It is the program that was built into bin, in a directory of its own, and it
// manages the VMs it was given and no others, so that it runs beside a vmsnapd
// of the host without touching what that one manages. It ends with the process
// that started it, however that ends.
//
// The methods of Daemon may be called from any goroutine; Stop is for one at a
// time.
package daemon
