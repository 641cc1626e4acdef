package rpc

import (
	"encoding/json"
	"reflect"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/event"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/agent/schedule"
)

// words are valid values of the types that are words.
var words = map[reflect.Type]string{
	reflect.TypeFor[agent.State]():          string(agent.Paused),
	reflect.TypeFor[agent.Presence]():       string(agent.Connected),
	reflect.TypeFor[agent.Settle]():         string(agent.SettleLive),
	reflect.TypeFor[catalog.Consistency]():  string(catalog.Memory),
	reflect.TypeFor[op.State]():             string(op.Reverting),
	reflect.TypeFor[agent.MemoryStrategy](): string(agent.MemoryStopped),
	reflect.TypeFor[fault.Kind]():           string(fault.Busy),
	reflect.TypeFor[event.Severity]():       string(event.Error),
	reflect.TypeFor[schedule.Kind]():        string(schedule.Weekly),
	reflect.TypeFor[schedule.Missed]():      string(schedule.Skip),
	reflect.TypeFor[catalog.Overlap]():      string(catalog.OverlapSkip),
	reflect.TypeFor[catalog.RunState]():     string(catalog.RunSkipped),
	reflect.TypeFor[agent.Quiesce]():        string(agent.QuiesceNone),
}

// filled returns a value in which nothing is zero.
func filled[T any]() T {
	var v T
	fill(reflect.ValueOf(&v).Elem())
	return v
}

func fill(v reflect.Value) {
	switch v.Interface().(type) {
	case time.Time:
		v.Set(reflect.ValueOf(time.Unix(1700000000, 5).UTC()))
		return
	case json.RawMessage:
		return
	}
	switch v.Kind() {
	case reflect.String:
		word, ok := words[v.Type()]
		if !ok {
			word = "not UTF-8: \xff"
		}
		v.SetString(word)
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int32, reflect.Int64:
		v.SetInt(7)
	case reflect.Uint32, reflect.Uint64:
		v.SetUint(7)
	case reflect.Float64:
		v.SetFloat(7.5)
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem())
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0))
	case reflect.Map:
		key, value := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
		fill(key)
		fill(value)
		v.Set(reflect.MakeMap(v.Type()))
		v.SetMapIndex(key, value)
	case reflect.Struct:
		for i := range v.NumField() {
			fill(v.Field(i))
		}
	case reflect.Interface: // an error's cause
	default:
		panic("no value for a " + v.Type().String())
	}
}

// TestEveryFieldIsConverted fails when a field of the API stays empty though
// the agent knows everything, and when a message cannot be encoded since the
// host's texts are not UTF-8.
func TestEveryFieldIsConverted(t *testing.T) {
	snapshot := filled[agent.SnapshotView]()
	snapshot.Quiesce.Requested = string(agent.QuiesceRequire)
	snapshot.Memory.Strategy = string(agent.MemoryPrecopy)
	snapshot.State = catalog.PointInvalid
	deletes := filled[agent.DeletePlan]()
	deletes.Merges[0].Way = agent.MergeFlatten
	for name, m := range map[string]proto.Message{
		"VM":        vmProto(filled[agent.VMView]()),
		"Operation": operationProto(filled[op.Record]()),
		"Snapshot":  snapshotProto(snapshot),
		"Plan":      planProto(filled[agent.Plan]()),
		"Deletes":   deletePlanProto(deletes),
		"Finding":   findingProto(filled[agent.Finding]()),
		"Event":     eventProto(filled[event.Event]()),
		"Schedule":  scheduleProto(filled[agent.ScheduleView]()),
	} {
		empty(t, name, m.ProtoReflect())
		if _, err := proto.Marshal(m); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func empty(t *testing.T, path string, m protoreflect.Message) {
	t.Helper()
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		here := path + "." + string(fd.Name())
		switch {
		case here == "Plan.blockers.operation_id", here == "Deletes.blockers.operation_id": // only busy errors have one
		case here == "Schedule.spec.snapshot.vm" || here == "Schedule.spec.snapshot.name" || here == "Schedule.spec.snapshot.request_id": // the schedule's own
		case !m.Has(fd):
			t.Errorf("%s is empty", here)
		case fd.Message() == nil || fd.IsMap() || fd.Message().FullName().Parent() == "google.protobuf":
		case fd.IsList():
			empty(t, here, m.Get(fd).List().Get(0).Message())
		default:
			empty(t, here, m.Get(fd).Message())
		}
	}
}
