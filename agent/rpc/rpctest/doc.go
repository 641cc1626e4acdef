// Package rpctest serves the real API handler on a real Unix socket over a
// scripted backend, for tests of what speaks to it.
//
// A Backend holds VMs, snapshots and operations in memory; Script replaces what
// a method does. All methods are safe for concurrent use.
package rpctest
