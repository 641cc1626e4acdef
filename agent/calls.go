package agent

import (
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/vmsnap/vmsnap/agent/event"
)

// Call is a call of the API that was to change something, for the record.
type Call struct {
	UID       uint32
	PID       int32
	Procedure string
	VM        string // as the caller named it; may be empty
	Subject   string // what else it was about, as the caller named it; may be empty
	RequestID string // the caller's own; may be empty
	Operation string // that it has begun; may be empty
	Failed    string // the kind of failure; empty when it did not fail
	Reason    string // of the failure
}

// mostTold bounds, in bytes, what a caller's own words take in an event.
const mostTold = 256

// CallMade records a call that was to change something, with who made it and what
// it came to. What becomes of an operation is told by itself.
func (a *Agent) CallMade(c Call) {
	e := event.Event{
		Kind: event.CallMade, Severity: event.Info, UID: &c.UID, Operation: c.Operation, Result: "accepted",
		Message: fmt.Sprintf("%s by uid %d (pid %d)", c.Procedure, c.UID, c.PID),
	}
	if v, err := a.find(c.VM); err == nil {
		e.VMID, e.VMName = v.id, v.name()
	}
	if c.Subject != "" {
		e.Message += fmt.Sprintf(", %q", short(c.Subject))
	}
	if c.RequestID != "" {
		e.Message += fmt.Sprintf(", request id %q", short(c.RequestID))
	}
	if c.Failed != "" {
		e.Severity, e.Code, e.Result = event.Warning, c.Failed, "refused"
		e.Message += ": " + short(c.Reason)
	}
	a.news.tell(e)
}

// short cuts a caller's words.
func short(s string) string {
	if len(s) <= mostTold {
		return s
	}
	s = s[:mostTold]
	for !utf8.ValidString(s) && s != "" {
		s = s[:len(s)-1]
	}
	return strings.TrimSpace(s) + "…"
}
