package monitor

import (
	"strings"
	"time"
)

// Deadlines that belong to no command.
const (
	// DefaultGreetingDeadline bounds connecting, the greeting and the
	// negotiation together. QEMU's main loop greets within a millisecond; five
	// seconds outlast the stalls of its image I/O on a loaded host, and beyond
	// them a busy monitor would only be waited for in vain.
	DefaultGreetingDeadline = 5 * time.Second

	// backlogPause is between attempts to connect to a socket whose backlog is
	// full: QEMU takes a client that gave up off it within a millisecond.
	backlogPause = 10 * time.Millisecond

	// writeDeadline bounds the writing of one command. It only counts once the
	// socket's buffer is full, so QEMU has stopped reading: while it executes a
	// command it reads no other, and the longest that does so by design is a
	// drain of all disks.
	writeDeadline = 30 * time.Second
)

// limit is one row of the table of commands.
type limit struct {
	after  time.Duration // from sending to the reply
	query  bool          // asks only: a missing reply has changed nothing
	reason string
}

// The classes of commands. The deadlines are those of a host in trouble, not
// of a healthy one: a caller that must know sooner sets its own.
var (
	question = limit{10 * time.Second, true,
		"answered from the main loop's memory, which slow image I/O can hold up for seconds"}
	imageQuestion = limit{30 * time.Second, true,
		"asks the storage for allocated sizes, which a network file system answers at its leisure"}
	negotiation = limit{5 * time.Second, true,
		"the first command of a monitor that has just greeted; repeating it changes nothing"}
	descriptor = limit{10 * time.Second, false,
		"moves a file descriptor into a table; touches no storage"}
	runControl = limit{60 * time.Second, false,
		"stop drains and flushes every disk before it answers, cont activates every image"}
	graph = limit{60 * time.Second, false,
		"opens, locks, drains or closes images; in-flight guest I/O of every disk must end first"}
	migration = limit{30 * time.Second, false,
		"starts or steers the migration thread and opens its target; the migration itself is polled"}
	other = limit{30 * time.Second, false,
		"unknown here, so taken to have effects"}
)

var limits = map[string]limit{
	"qmp_capabilities": negotiation,

	"query-block":             imageQuestion,
	"query-named-block-nodes": imageQuestion,
	"query-blockstats":        imageQuestion,

	"x-debug-query-block-graph": question,

	"qom-get":                question,
	"qom-list":               question,
	"qom-list-types":         question,
	"qom-list-properties":    question,
	"device-list-properties": question,
	"trace-event-get-state":  question,

	"getfd":        descriptor,
	"closefd":      descriptor,
	"add-fd":       descriptor,
	"remove-fd":    descriptor,
	"stop":         runControl,
	"cont":         runControl,
	"system_reset": runControl,
	"set-action":   runControl,

	"blockdev-add":              graph,
	"blockdev-del":              graph,
	"blockdev-reopen":           graph,
	"blockdev-snapshot":         graph,
	"blockdev-backup":           graph,
	"blockdev-mirror":           graph,
	"transaction":               graph,
	"block-commit":              graph,
	"block-stream":              graph,
	"block-export-add":          graph,
	"block-export-del":          graph,
	"block-dirty-bitmap-add":    graph,
	"block-dirty-bitmap-remove": graph,
	"job-cancel":                graph,
	"job-complete":              graph,
	"job-dismiss":               graph,
	"job-finalize":              graph,
	"job-pause":                 graph,
	"job-resume":                graph,
	"block-job-cancel":          graph,
	"nbd-server-start":          graph,
	"nbd-server-stop":           graph,
	"qom-set":                   graph, // drive=NODE swaps a disk
	"migrate":                   migration,
	"migrate-incoming":          migration,
	"migrate-continue":          migration,
	"migrate_cancel":            migration,
	"migrate-set-capabilities":  migration,
	"migrate-set-parameters":    migration,
}

// limitOf returns the row of a command. Whatever QEMU calls query-… asks only.
func limitOf(command string) limit {
	if l, ok := limits[command]; ok {
		return l
	}
	if strings.HasPrefix(command, "query-") || strings.HasPrefix(command, "x-query-") {
		return question
	}
	return other
}
