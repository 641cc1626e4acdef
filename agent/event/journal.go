package event

import (
	"context"
	"strconv"

	"github.com/coreos/go-systemd/v22/journal"
)

// Journal writes events to systemd's journal, each with the field VMSNAP_EVENT,
// its kind, and with VMSNAP_SEQ, VMSNAP_VM, VMSNAP_OPERATION and the others
// where the event has them.
type Journal struct{ send sendJournal }

type sendJournal func(message string, priority journal.Priority, fields map[string]string) error

// NewJournal returns a sink that writes to the journal of this host.
func NewJournal() *Journal { return &Journal{journal.Send} }

// Name implements Sink.
func (*Journal) Name() string { return "journal" }

// Send implements Sink.
func (j *Journal) Send(_ context.Context, e Event) error {
	priority := map[Severity]journal.Priority{Info: journal.PriInfo, Warning: journal.PriWarning, Error: journal.PriErr}[e.Severity]
	fields := map[string]string{
		"VMSNAP_EVENT": string(e.Kind), "VMSNAP_SEQ": strconv.FormatUint(e.Seq, 10),
		"VMSNAP_VM": e.VMName, "VMSNAP_VM_ID": e.VMID, "VMSNAP_OPERATION": e.Operation, "VMSNAP_SNAPSHOT": e.Snapshot,
		"VMSNAP_SCHEDULE": e.Schedule, "VMSNAP_DISK": e.Disk, "VMSNAP_CODE": e.Code, "VMSNAP_RESULT": e.Result,
		"SYSLOG_IDENTIFIER": "vmsnapd",
	}
	if e.UID != nil {
		fields["VMSNAP_UID"] = strconv.FormatUint(uint64(*e.UID), 10)
	}
	for name, value := range fields {
		if value == "" {
			delete(fields, name)
		}
	}
	message := e.Message
	if e.VMName != "" {
		message = "VM " + e.VMName + ": " + message
	}
	return j.send(message, priority, fields)
}
