// Command demo shows a snapshot of a real guest from end to end, with the real
// vmsnapd and vmsnap: `make demo` runs it. Each claim that it makes on the way
// is checked, and it exits with 1 if one does not hold.
//
// Everything it makes, it makes in one temporary directory, and it takes all of
// it away again, also when it is interrupted.
package main
