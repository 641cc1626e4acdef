// Package metrics tells Prometheus about the VMs of this host and the work done
// on them.
//
// What happens is counted when it happens, by the Observe methods; what is, is
// read from a Source when it is scraped. A scrape never fails: each reading has
// a deadline, one that fails or hangs is left out, and
// vmsnap_collector_success says so.
//
// Label values come from this program and from the host's launch commands,
// never from a guest. The values of "result" are the fault kinds, in the words
// of the API's error codes.
//
// All methods of Metrics are safe for concurrent use.
package metrics
