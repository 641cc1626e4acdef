// Command vmsnap drives vmsnapd, the agent that takes snapshots of the virtual
// machines of this host, from the command line.
//
// # Output
//
// The result goes to the standard output and nothing else does; progress,
// warnings and errors go to the standard error. With -o json and yaml the
// result has the shape of the API's messages: snake_case names, every field
// present, RFC 3339 times in UTC, durations in seconds ("0.084s"), sizes in
// bytes as numbers, words in lower case ("running", "not-quiesced") for
// enumerations, "" for one that is not known, and null for a message, time or
// duration that is absent. Lists are objects of one list ("vms", "snapshots",
// "operations"), so that fields can be added beside it. Fields are added and
// never renamed. Tables are for people and may change.
//
// # Exit codes
//
//	0 done                5 not quiesced       12 has dependants
//	1 failed              6 no space           13 exists
//	2 usage               7 denied             14 unsupported
//	3 partial             8 VM or guest        15 daemon unreachable
//	4 not found             unresponsive       130 cancelled
//	                      9 too late
//	                     11 busy
package main
