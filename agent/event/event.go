package event

import "time"

// Kind says what happened.
type Kind string

// The kinds of event.
const (
	AgentStarted     Kind = "agent-started"      // vmsnapd serves requests
	AgentStopped     Kind = "agent-stopped"      // vmsnapd stops in order
	CallMade         Kind = "call-made"          // a call that was to change something
	CallRefused      Kind = "call-refused"       // a caller's role did not permit a call
	DiskSpaceLow     Kind = "disk-space-low"     // little is free where a disk grows
	DiskSpaceBack    Kind = "disk-space-back"    // … and enough again
	EventsLost       Kind = "events-lost"        // events could not be recorded
	GuestFrozen      Kind = "guest-frozen"       // a guest's file systems were frozen
	GuestOutOfSpace  Kind = "guest-out-of-space" // QEMU stopped a guest, since a disk could not grow
	GuestResumed     Kind = "guest-resumed"      // … and it runs again
	GuestThawed      Kind = "guest-thawed"       // … and thawed
	OperationBegan   Kind = "operation-began"    // an operation was accepted
	OperationEnded   Kind = "operation-ended"    // it succeeded, failed or was cancelled
	OperationWarning Kind = "operation-warning"  // it has a warning
	ScheduleChanged  Kind = "schedule-changed"   // made, edited, paused, resumed or deleted
	ScheduleMissed   Kind = "schedule-missed"    // runs were let go, or a run is late
	ScheduleSkipped  Kind = "schedule-skipped"   // a run did not take place
	SnapshotDeleted  Kind = "snapshot-deleted"   // a snapshot was deleted
	SnapshotRenamed  Kind = "snapshot-renamed"   // a snapshot has another name
	ThawUnresolved   Kind = "thaw-unresolved"    // a guest may be frozen, and does not answer
	VMForgotten      Kind = "vm-forgotten"       // the records of a VM were removed
	VMFound          Kind = "vm-found"           // a VM was seen for the first time
	VMStarted        Kind = "vm-started"         // a QEMU process was found
	VMStopped        Kind = "vm-stopped"         // … and has exited
)

// Kinds are all kinds, sorted.
var Kinds = []Kind{
	AgentStarted, AgentStopped, CallMade, CallRefused, DiskSpaceBack, DiskSpaceLow, EventsLost, GuestFrozen, GuestOutOfSpace, GuestResumed,
	GuestThawed, OperationBegan, OperationEnded, OperationWarning, ScheduleChanged, ScheduleMissed, ScheduleSkipped, SnapshotDeleted, SnapshotRenamed, ThawUnresolved,
	VMForgotten, VMFound, VMStarted, VMStopped,
}

// Severity says whether somebody should look.
type Severity string

// The severities, from the least one on.
const (
	Info    Severity = "info"
	Warning Severity = "warning"
	Error   Severity = "error"
)

// Severities are all severities, from the least one on.
var Severities = []Severity{Info, Warning, Error}

// Event is one thing that happened.
type Event struct {
	Seq       uint64 // its number; assigned when it is recorded
	Time      time.Time
	Kind      Kind
	Severity  Severity
	VMID      string // of the VM that it is about; empty when of none
	VMName    string
	Operation string  // id; empty when none
	Snapshot  string  // id; empty when none
	Schedule  string  // name; empty when none
	UID       *uint32 // who asked for it; nil: vmsnapd itself
	Disk      string  // the disk that a warning is about
	Code      string  // of a warning, or the kind of a failure
	Result    string  // what it came to: the state that an operation ended in, how a VM stopped
	Message   string
}

// Filter chooses events. Its zero value lets all through.
type Filter struct {
	VMID      string
	VMName    string
	Kinds     []Kind // any of these; all when empty
	Severity  Severity
	Operation string
	Schedule  string
	Since     uint64           // only those with a greater number
	After     time.Time        // only those at or after it
	Visible   func(Event) bool // only these; all when nil
	Limit     int              // no more than these; all when 0
	Newest    bool             // the newest ones, the newest first; else the oldest first
}

// Bounds are the numbers of the first and the last event that are kept. Without
// any First is one more than Last.
type Bounds struct{ First, Last uint64 }
