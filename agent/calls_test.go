package agent

import (
	"strings"
	"testing"

	"github.com/vmsnap/vmsnap/agent/event"
)

// TestCallMade records calls, and bounds what of a caller's own words is kept.
func TestCallMade(t *testing.T) {
	a := openAgent(t)
	a.CallMade(Call{UID: 1000, PID: 7, Procedure: "SnapshotService/CreateSnapshot", VM: "no-such-vm", Subject: "x\x1b[31m", RequestID: "r1", Operation: "c0ffee01"})
	a.CallMade(Call{UID: 1001, PID: 8, Procedure: "VMService/ForgetVM", Failed: "not-found", Reason: strings.Repeat("é", 10_000)})
	var got []event.Event
	for n, err := range a.WatchEvents(t.Context(), EventFilter{Since: number(0)}) {
		if err != nil {
			t.Fatal(err)
		}
		if n.Stands {
			continue
		}
		if got = append(got, n.Event); len(got) == 2 {
			break
		}
	}
	if want := `SnapshotService/CreateSnapshot by uid 1000 (pid 7), "x\x1b[31m", request id "r1"`; got[0].Message != want || got[0].Operation != "c0ffee01" || *got[0].UID != 1000 || got[0].Result != "accepted" {
		t.Errorf("the first is %+v, want %s", got[0], want)
	}
	if e := got[1]; e.Code != "not-found" || e.Result != "refused" || e.Severity != event.Warning || *e.UID != 1001 || len(e.Message) > 400 || !strings.HasSuffix(e.Message, "é…") {
		t.Errorf("the second is %+v", e)
	}
}
