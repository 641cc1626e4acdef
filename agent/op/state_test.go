package op

import "testing"

func TestEveryTransition(t *testing.T) {
	events := []event{eventRun, eventCancel, eventRevert, eventSucceed, eventFail, eventStop, eventResume}
	const no = State("")
	want := map[State][7]State{
		//            run      cancel      revert     succeed    fail    stop       resume
		Queued:     {Running, Cancelling, no, no, Failed, no, Running},
		Running:    {no, Cancelling, Reverting, Succeeded, Failed, Cancelled, Running},
		Cancelling: {no, Cancelling, Reverting, Succeeded, Failed, Cancelled, Running},
		Reverting:  {no, no, no, no, Failed, Cancelled, Running},
		Succeeded:  {},
		Failed:     {},
		Cancelled:  {},
		"unknown":  {},
	}
	for s, row := range want {
		for i, e := range events {
			got, err := next(s, e)
			switch {
			case row[i] == no && err == nil:
				t.Errorf("%s, %s: %s, want a refusal", s, e, got)
			case row[i] == no && got != s:
				t.Errorf("%s, %s: refused, and yet %s", s, e, got)
			case row[i] != no && (err != nil || got != row[i]):
				t.Errorf("%s, %s: %s (%v), want %s", s, e, got, err, row[i])
			}
		}
	}
	for s, ways := range transitions {
		if s.Final() != (len(ways) == 0) {
			t.Errorf("%s: final %v, with %d ways out", s, s.Final(), len(ways))
		}
		if _, listed := want[s]; !listed {
			t.Errorf("%s is not tested", s)
		}
		for e, to := range ways {
			if _, known := transitions[to]; !known {
				t.Errorf("%s, %s: leads to the unknown state %q", s, e, to)
			}
		}
	}
}
