// Package catalog is the agent's durable memory: the VMs that were seen, their
// disks and layers, the snapshots, and the operations with their journals.
//
// It is one SQLite database, catalog.db, in the state directory. What a method
// has written is on the disk when it returns without an error (write-ahead log,
// synchronous=FULL), and after an error nothing of it is there.
//
// # Concurrency
//
// All methods may be called from any goroutine. There is one writer at a time;
// the others wait for their turn, or for the end of their context. Once a
// write has begun to commit, the end of its context does not abort it. Readers
// wait for nobody and see the last committed state. One process at a time has
// the catalog open: a lock on the state directory sees to it.
//
// # Format
//
// The format has a number, kept in the database, and each step from one number
// to the next is a file in migrations. Before a step the database is copied to
// catalog.vN.db. A database of a newer format is refused and left alone.
//
// The catalog knows what refers to what, and keeps it so: a layer cannot go
// while a layer, a snapshot or a disk needs it. It does not know files, and it
// does not judge names; that is up to the agent.
package catalog
