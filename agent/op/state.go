package op

import "fmt"

// event is what moves an operation from one state to the next.
type event string

const (
	eventRun     event = "run"     // the recipe is about to be called
	eventCancel  event = "cancel"  // a cancel is acknowledged
	eventRevert  event = "revert"  // the recipe failed and left something to revert
	eventSucceed event = "succeed" // the recipe did its work
	eventFail    event = "fail"    // the recipe failed, and its reverts ran
	eventStop    event = "stop"    // the recipe gave in to a cancel, and its reverts ran
	eventResume  event = "resume"  // recovery takes it over from a daemon that is gone
)

// transitions holds every way from one state to another. A pair that is not
// listed cannot happen; the final states have no way out.
//
// A cancelled operation may still succeed: a recipe that had only its return
// left to do has done its work, and saying otherwise would be a lie.
var transitions = map[State]map[event]State{
	Queued:     {eventRun: Running, eventCancel: Cancelling, eventFail: Failed, eventResume: Running},
	Running:    {eventCancel: Cancelling, eventRevert: Reverting, eventSucceed: Succeeded, eventFail: Failed, eventStop: Cancelled, eventResume: Running},
	Cancelling: {eventCancel: Cancelling, eventRevert: Reverting, eventSucceed: Succeeded, eventFail: Failed, eventStop: Cancelled, eventResume: Running},
	Reverting:  {eventFail: Failed, eventStop: Cancelled, eventResume: Running},
	Succeeded:  {},
	Failed:     {},
	Cancelled:  {},
}

// next returns the state that an event leads to.
func next(s State, e event) (State, error) {
	to, ok := transitions[s][e]
	if !ok {
		return s, fmt.Errorf("an operation that is %s cannot %s", s, e)
	}
	return to, nil
}
