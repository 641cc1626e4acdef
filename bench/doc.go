// Command bench measures what vmsnap costs a guest and its host; `make bench`
// runs it. Each figure with a budget is a ratio to a rival that is measured in
// the same run, on the same guest, in turns with it, so that it means the same
// on every machine. It exits with 1 if a budget is missed.
//
// The rival of the freeze window is a bare script: over sockets that are open
// already it freezes, sends the one transaction, and thaws, and does nothing
// else (bare.go). vmsnap is used through its API, as a controller does.
//
// The table and the raw runs, which benchstat reads, are left in
// bench/results/DATE-HOST.
package main
