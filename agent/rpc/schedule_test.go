package rpc_test

import (
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/rpc"
	"github.com/vmsnap/vmsnap/agent/rpc/rpctest"
	"github.com/vmsnap/vmsnap/agent/schedule"
	"github.com/vmsnap/vmsnap/api/client"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// spec returns a schedule in which everything is given but the retention.
func spec() *vmsnapv1.ScheduleSpec {
	return &vmsnapv1.ScheduleSpec{
		Name: "n", Vm: "web", Selector: "w*", NameTemplate: schedule.DefaultName, Jitter: durationpb.New(time.Minute),
		Missed: vmsnapv1.Missed_MISSED_SKIP, Overlap: vmsnapv1.Overlap_OVERLAP_SKIP,
		Timing: &vmsnapv1.Timing{
			Kind: vmsnapv1.ScheduleKind_SCHEDULE_KIND_WEEKLY, At: timestamppb.New(rpctest.Now), Cron: "c", Weekdays: []uint32{6, 0},
			Day: 31, Hour: 1, Minute: 2, Second: 3, Zone: "Europe/Berlin",
		},
		Snapshot: &vmsnapv1.CreateSnapshotRequest{
			Description: "d", Labels: map[string]string{"k": "v"}, Disks: []string{"root"}, Exclude: []string{"data"},
			Quiesce: vmsnapv1.Quiesce_QUIESCE_REQUIRE, Mountpoints: []string{"/"}, FreezeTimeout: durationpb.New(time.Second),
			Lease: durationpb.New(2 * time.Second), Strict: true, AllowPartial: true, Memory: true,
			MemoryStrategy: vmsnapv1.MemoryStrategy_MEMORY_STRATEGY_PRECOPY, MaxPause: durationpb.New(time.Second), Compress: true,
		},
	}
}

func TestSchedulesReachTheBackend(t *testing.T) {
	b := rpctest.NewBackend()
	c := client.New(rpctest.Serve(t, b, rpc.Options{Roles: ownRoles(t)}))
	defer c.Close()
	res, err := c.Schedules().CreateSchedule(t.Context(), connect.NewRequest(&vmsnapv1.CreateScheduleRequest{Spec: spec()}))
	if err != nil {
		t.Fatal(err)
	}
	if got := res.Msg.GetSchedule().GetSpec(); !proto.Equal(got, spec()) {
		t.Errorf("it came back as %v", got)
	}
	all, err := b.Schedules(t.Context())
	if err != nil || len(all) != 1 {
		t.Fatal(all, err)
	}
	want := agent.ScheduleSpec{
		Name: "n", VM: "web", Selector: "w*", NameTemplate: schedule.DefaultName, Jitter: time.Minute, Missed: schedule.Skip, Overlap: catalog.OverlapSkip,
		Timing: schedule.Timing{
			Kind: schedule.Weekly, At: rpctest.Now, Cron: "c", Weekdays: []time.Weekday{6, 0}, Day: 31, Hour: 1, Minute: 2, Second: 3, Zone: "Europe/Berlin",
		},
		Snapshot: agent.SnapshotRequest{
			Description: "d", Labels: map[string]string{"k": "v"}, Disks: []string{"root"}, Exclude: []string{"data"}, Quiesce: agent.QuiesceRequire,
			Mountpoints: []string{"/"}, FreezeTimeout: time.Second, Lease: 2 * time.Second, Strict: true, AllowPartial: true, Memory: true,
			Strategy: agent.MemoryPrecopy, MaxPause: time.Second, Compress: true,
		},
	}
	if diff := diff(want, all[0].Spec); diff != "" {
		t.Errorf("spec (-want +got):\n%s", diff)
	}
}

func TestSchedulesThatAreNone(t *testing.T) {
	c := client.New(rpctest.Serve(t, rpctest.Sample(), rpc.Options{Roles: ownRoles(t)}))
	defer c.Close()
	for message, change := range map[string]func(*vmsnapv1.ScheduleSpec){
		"name is not given":           func(s *vmsnapv1.ScheduleSpec) { s.Name = "" },
		"snapshot has a vm":           func(s *vmsnapv1.ScheduleSpec) { s.Snapshot.Vm = "web" },
		"quiesce has the unknown":     func(s *vmsnapv1.ScheduleSpec) { s.Snapshot.Quiesce = 99 },
		"missed has the unknown":      func(s *vmsnapv1.ScheduleSpec) { s.Missed = 99 },
		"overlap has the unknown":     func(s *vmsnapv1.ScheduleSpec) { s.Overlap = 99 },
		"timing.kind has the unknown": func(s *vmsnapv1.ScheduleSpec) { s.Timing = nil },
		"timing.at is not a time":     func(s *vmsnapv1.ScheduleSpec) { s.Timing.At = &timestamppb.Timestamp{Nanos: -1} },
		"timing has the number":       func(s *vmsnapv1.ScheduleSpec) { s.Timing.Minute = 1 << 31 },
		"timing.weekdays has 8":       func(s *vmsnapv1.ScheduleSpec) { s.Timing.Weekdays = make([]uint32, 8) },
		"retention has the number":    func(s *vmsnapv1.ScheduleSpec) { s.Retention = &vmsnapv1.Retention{Daily: 1 << 31} },
		"retention.max_age is not":    func(s *vmsnapv1.ScheduleSpec) { s.Retention = &vmsnapv1.Retention{MaxAge: durationpb.New(-1)} },
		"jitter is not a duration":    func(s *vmsnapv1.ScheduleSpec) { s.Jitter = durationpb.New(-1) },
		"not the name of a time zone": func(s *vmsnapv1.ScheduleSpec) { s.Timing.Zone = "Mars" },
	} {
		s := spec()
		change(s)
		_, err := c.Schedules().CreateSchedule(t.Context(), connect.NewRequest(&vmsnapv1.CreateScheduleRequest{Spec: s}))
		wantCode(t, err, vmsnapv1.ErrorCode_ERROR_CODE_USAGE, message)
	}
	_, err := c.Schedules().EditSchedule(t.Context(), connect.NewRequest(&vmsnapv1.EditScheduleRequest{Schedule: "nightly", Spec: spec(), Revision: 99}))
	wantCode(t, err, vmsnapv1.ErrorCode_ERROR_CODE_BUSY, "changed by somebody else")
	_, err = c.Schedules().DeleteSchedule(t.Context(), connect.NewRequest(&vmsnapv1.DeleteScheduleRequest{Schedule: "x"}))
	wantCode(t, err, vmsnapv1.ErrorCode_ERROR_CODE_NOT_FOUND, `there is no schedule "x"`)
}
