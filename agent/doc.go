// Package agent knows the VMs of this host and what may be done to them.
//
// An Agent follows discovery, keeps one monitor session to each VM, and runs
// the recipes: one file each, read from top to bottom as the story of what
// happens to the VM (snapshot.go, freeze.go, settle.go, recover.go). Recipes
// run as operations (agent/op), one at a time for each VM; mechanism lives in
// blockdev, freeze, qga and monitor.
//
// What is shown of VMs (VMs, VM) comes from memory alone, so that a VM whose
// QEMU hangs delays nobody. Everything that changes a VM asks QEMU again
// first.
//
// All methods of Agent are safe for concurrent use.
package agent
