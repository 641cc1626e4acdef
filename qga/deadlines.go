package qga

import (
	"context"
	"time"
)

// The commands of the guest agent that are used (QEMU, qga/qapi-schema.json).
const (
	cmdSync       = "guest-sync-delimited"
	cmdPing       = "guest-ping"
	cmdInfo       = "guest-info"
	cmdOSInfo     = "guest-get-osinfo"
	cmdFSInfo     = "guest-get-fsinfo"
	cmdStatus     = "guest-fsfreeze-status"
	cmdFreeze     = "guest-fsfreeze-freeze"
	cmdFreezeList = "guest-fsfreeze-freeze-list"
	cmdThaw       = "guest-fsfreeze-thaw"
	cmdSetTime    = "guest-set-time"
)

// deadline is how long one command may take.
type deadline struct {
	limit time.Duration
	// callers may allow more than limit, which then holds only for a context
	// without a deadline.
	callers bool
}

// deadlines has an entry for each command. A context with an earlier deadline
// always wins.
var deadlines = map[string]deadline{
	dial:       {limit: 2 * time.Second},                 // a local socket accepts at once, or never
	cmdSync:    {limit: 5 * time.Second, callers: true},  // an idle agent answers in milliseconds; one that waits for a hook to end allows more
	cmdPing:    {limit: 5 * time.Second},                 // no work in the guest
	cmdInfo:    {limit: 5 * time.Second},                 // no work in the guest
	cmdStatus:  {limit: 2 * time.Second},                 // no work in the guest, and asked while it is frozen
	cmdOSInfo:  {limit: 10 * time.Second},                // reads files in the guest
	cmdFSInfo:  {limit: 10 * time.Second},                // stats every mount in the guest
	cmdFreeze:  {limit: 60 * time.Second, callers: true}, // flushes the guest's caches and runs its hooks
	cmdSetTime: {limit: 10 * time.Second},                // runs hwclock in the guest
	cmdThaw:    {limit: 10 * time.Second, callers: true}, // milliseconds, but its hooks run before it answers
}

// dial names the connection itself in deadlines and errors.
const dial = "connect"

func bounded(ctx context.Context, command string) (context.Context, context.CancelFunc) {
	if command == cmdFreezeList {
		command = cmdFreeze
	}
	d := deadlines[command]
	if _, has := ctx.Deadline(); has && d.callers {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, d.limit)
}
