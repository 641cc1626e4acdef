package op

import (
	"encoding/json"
	"slices"
	"strings"
	"time"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// Kind names what an operation does.
type Kind string

// The kinds of operation.
const (
	KindSnapshot      Kind = "snapshot"       // cut a snapshot
	KindFreeze        Kind = "freeze"         // hold a guest frozen until it is thawed or its lease ends
	KindGroup         Kind = "group"          // cut snapshots of several VMs at one time
	KindGroupRestore  Kind = "group-restore"  // take several VMs back to a group of snapshots
	KindVerify        Kind = "verify"         // compare a snapshot's files with what was recorded
	KindRestore       Kind = "restore"        // go back to what snapshots hold
	KindPreview       Kind = "preview"        // run a VM on a trial state
	KindPreviewCommit Kind = "preview-commit" // keep it
	KindPreviewUndo   Kind = "preview-undo"   // go back
	KindRepair        Kind = "repair"         // put right what the doctor has found
	KindDelete        Kind = "delete"         // delete snapshots, and merge what nothing needs any more
	KindUpkeep        Kind = "upkeep"         // merge layers that nothing needs any more
	KindExport        Kind = "export"         // make a standalone image of a snapshot's disk
	KindClone         Kind = "clone"          // make a disk or a VM from a snapshot
	KindAttach        Kind = "attach"         // plug a disk into a running VM
	KindDetach        Kind = "detach"         // take one out
	KindSettle        Kind = "settle"         // point launch paths at the active layers of a stopped VM
)

// Kinds are all of them.
var Kinds = []Kind{
	KindSnapshot, KindFreeze, KindGroup, KindGroupRestore, KindVerify, KindRestore, KindPreview, KindPreviewCommit, KindPreviewUndo,
	KindRepair, KindDelete, KindExport, KindClone, KindSettle, KindUpkeep, KindAttach, KindDetach,
}

// State is where an operation is in its life.
type State string

// The states of an operation. See transitions for the ways between them.
const (
	Queued     State = "queued"
	Running    State = "running"
	Cancelling State = "cancelling" // a cancel was acknowledged; the recipe has not returned yet
	Reverting  State = "reverting"
	Succeeded  State = "succeeded"
	Failed     State = "failed"
	Cancelled  State = "cancelled"
)

// Final reports whether the state is an end.
func (s State) Final() bool { return s == Succeeded || s == Failed || s == Cancelled }

// Record is everything known of an operation. It is what the catalog keeps
// and what watchers receive.
type Record struct {
	ID        string // eight hexadecimal digits; part of the names of everything the operation makes
	Kind      Kind
	VMID      string // empty for an operation on several VMs
	VMName    string // of several: their names, separated by commas
	State     State
	Request   json.RawMessage // the request as the recipe understands it
	RequestID string          // the caller's idempotency key; empty when none was given
	UID       uint32          // who asked
	Steps     []Step
	Progress  Progress
	Warnings  []Warning
	Failure   *Failure // set when State is Failed or Cancelled
	Partial   bool     // succeeded, but not for everything that was asked for
	Paused    bool     // it rests until somebody lets it go on
	Snapshot  string   // id of the snapshot that the operation made; empty when none
	Created   time.Time
	Started   time.Time // zero until it runs
	Ended     time.Time // zero until it ends
	Revision  uint64    // grows with every change that a watcher can see
	Queue     Place     // where it waits for its turn; not stored
}

// VMs returns the names of the VMs that the operation is about.
func (r Record) VMs() []string {
	if r.VMID != "" || r.VMName == "" {
		return []string{r.VMName}
	}
	return strings.Split(r.VMName, ",") // of a group
}

// clone returns a copy that shares nothing that changes.
func (r Record) clone() Record {
	r.Steps = slices.Clone(r.Steps)
	r.Warnings = slices.Clone(r.Warnings)
	r.Request = slices.Clone(r.Request)
	if r.Failure != nil {
		f := *r.Failure
		r.Failure = &f
	}
	return r
}

// Step is one named part of an operation with its own times.
type Step struct {
	Name    string // for example "freeze"
	Started time.Time
	Ended   time.Time // zero while it runs
	Error   string    // empty when it went well
	Output  string    // of a program that it ran; bounded by whoever ran it
}

// Progress tells how far an operation is. Total is 0 while it is unknown.
type Progress struct {
	Done, Total uint64
	Unit        string  // "steps" or "bytes"
	Rate        float64 // units a second over the last seconds; 0 when unknown
	ETA         time.Duration
	Pass        int // of work that goes over the same again, from 1; 0 of other work
}

// Warning is something that the caller should know and that did not stop the
// operation. Codes are listed in the operator documents.
type Warning struct {
	Code    string `json:"code"`
	Disk    string `json:"disk,omitempty"`
	Message string `json:"message"`
}

// Failure is how an operation failed.
type Failure struct {
	Kind    fault.Kind
	Message string
	Hint    string
}

// Entry is a journal entry: an intent, durable before the effect that it
// announces, or the mark that an effect is done.
type Entry struct {
	Seq       int64 // grows within an operation; assigned by the store
	Operation string
	Kind      string
	Data      json.RawMessage
	Time      time.Time
}
