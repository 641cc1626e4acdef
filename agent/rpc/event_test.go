package rpc_test

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/event"
	"github.com/vmsnap/vmsnap/agent/rpc"
	"github.com/vmsnap/vmsnap/agent/rpc/rpctest"
	"github.com/vmsnap/vmsnap/api/client"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/api/vmsnap/v1/vmsnapv1connect"
)

func TestListEvents(t *testing.T) {
	b := rpctest.Sample()
	c := client.New(rpctest.Serve(t, b, rpc.Options{Roles: ownRoles(t)}))
	defer c.Close()
	for name, x := range map[string]struct {
		req  *vmsnapv1.ListEventsRequest
		want []uint64
	}{
		"all":      {&vmsnapv1.ListEventsRequest{}, []uint64{6, 5, 4, 3, 2, 1}},
		"VM":       {&vmsnapv1.ListEventsRequest{Filter: &vmsnapv1.EventFilter{Vm: "web"}, Limit: 2}, []uint64{5, 4}},
		"severity": {&vmsnapv1.ListEventsRequest{Filter: &vmsnapv1.EventFilter{Severity: vmsnapv1.EventSeverity_EVENT_SEVERITY_WARNING}}, []uint64{6, 4}},
		"kinds":    {&vmsnapv1.ListEventsRequest{Filter: &vmsnapv1.EventFilter{Kinds: []string{"vm-started", "agent-started"}}}, []uint64{2, 1}},
		"since":    {&vmsnapv1.ListEventsRequest{Since: proto.Uint64(4)}, []uint64{6, 5}},
		"after":    {&vmsnapv1.ListEventsRequest{Filter: &vmsnapv1.EventFilter{After: timestamppb.New(rpctest.Now.Add(-2 * time.Hour))}}, []uint64{6}},
		"op":       {&vmsnapv1.ListEventsRequest{Filter: &vmsnapv1.EventFilter{OperationId: "c0ffee02"}}, []uint64{6}},
	} {
		t.Run(name, func(t *testing.T) {
			res, err := c.Events().ListEvents(t.Context(), connect.NewRequest(x.req))
			if err != nil {
				t.Fatal(err)
			}
			var got []uint64
			for _, e := range res.Msg.GetEvents() {
				got = append(got, e.GetSeq())
			}
			if !slices.Equal(got, x.want) || res.Msg.GetFirstSeq() != 1 || res.Msg.GetLastSeq() != 6 {
				t.Errorf("got %v of %d to %d", got, res.Msg.GetFirstSeq(), res.Msg.GetLastSeq())
			}
		})
	}
	for message, req := range map[string]*vmsnapv1.ListEventsRequest{
		"there is no kind of event":  {Filter: &vmsnapv1.EventFilter{Kinds: []string{"x"}}},
		"kinds has 40 entries":       {Filter: &vmsnapv1.EventFilter{Kinds: slices.Repeat([]string{"vm-started"}, 40)}},
		"severity has the unknown":   {Filter: &vmsnapv1.EventFilter{Severity: 9}},
		"after is not a time":        {Filter: &vmsnapv1.EventFilter{After: &timestamppb.Timestamp{Nanos: -1}}},
		"vm has 2000 characters":     {Filter: &vmsnapv1.EventFilter{Vm: strings.Repeat("x", 2000)}},
		"limit is 100000; at most 1": {Limit: 100000},
	} {
		_, err := c.Events().ListEvents(t.Context(), connect.NewRequest(req))
		wantCode(t, err, vmsnapv1.ErrorCode_ERROR_CODE_USAGE, message)
	}
}

// TestWatchEventsFromNow begins before anything happens: that the watch stands
// is known from its headers.
func TestWatchEventsFromNow(t *testing.T) {
	b := rpctest.Sample()
	c := client.New(rpctest.Serve(t, b, rpc.Options{Roles: ownRoles(t)}))
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	stream, err := c.Events().WatchEvents(ctx, connect.NewRequest(&vmsnapv1.WatchEventsRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stream.Close() }()
	if server := stream.ResponseHeader().Get("Server"); server != "vmsnapd" {
		t.Fatalf("the server is %q", server)
	}
	b.AddEvent(event.Event{Kind: event.VMStopped, Severity: event.Info, Time: rpctest.Now})
	if !stream.Receive() || stream.Msg().GetEvent().GetKind() != "vm-stopped" {
		t.Errorf("%v, %v", stream.Msg(), stream.Err())
	}
}

// TestRefusedCalls has a caller without a role, and one who calls what there is
// not.
func TestRefusedCalls(t *testing.T) {
	told := make(chan string, 10)
	socket := openServe(t, rpc.Options{Refused: func(uid uint32, pid int32, procedure, reason string) {
		told <- fmt.Sprintf("%d %t %s: %s", uid, pid > 0, procedure, reason)
	}})
	nobody := &syscall.Credential{Uid: 65534, Gid: 65534}
	call(t, nobody, socket, "/vmsnap.v1.VMService/Destroy", `{}`)
	call(t, nobody, socket, vmsnapv1connect.EventServiceListEventsProcedure, `{}`)
	if got, want := <-told, "65534 true EventService/ListEvents: uid 65534 has no role here"; got != want {
		t.Errorf("told %q; want %q", got, want)
	}
	if len(told) > 0 {
		t.Errorf("told as well: %q", <-told)
	}
}

// TestActor has the backend know who calls.
func TestActor(t *testing.T) {
	b := rpctest.Sample()
	b.Script(rpctest.Script{VM: func(ctx context.Context, _ string) (agent.VMView, error) {
		if uid := event.Actor(ctx); uid == nil || *uid != uint32(os.Getuid()) {
			t.Errorf("the actor is %v", uid)
		}
		return agent.VMView{}, nil
	}})
	c := client.New(rpctest.Serve(t, b, rpc.Options{Roles: ownRoles(t)}))
	defer c.Close()
	if _, err := c.VMs().GetVM(t.Context(), connect.NewRequest(&vmsnapv1.GetVMRequest{Vm: "web"})); err != nil {
		t.Error(err)
	}
}
