package rpc_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/agent/rpc"
	"github.com/vmsnap/vmsnap/agent/rpc/rpctest"
	"github.com/vmsnap/vmsnap/api/vmsnap/v1/vmsnapv1connect"
)

// record keeps the calls that were told of.
type record struct {
	mu    sync.Mutex
	calls []agent.Call
}

func (r *record) add(c agent.Call) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, c)
}

// take returns what was told of since the last time.
func (r *record) take() []agent.Call {
	r.mu.Lock()
	defer r.mu.Unlock()
	calls := r.calls
	r.calls = nil
	return calls
}

// TestEveryChangeIsOnRecord calls each method of the API. Whatever is not known to
// only look is told of, with who called, and nothing else is.
func TestEveryChangeIsOnRecord(t *testing.T) {
	looks := func(name string) bool {
		for _, verb := range []string{"List", "Get", "Plan", "Diagnose", "Check", "Watch"} {
			if strings.HasPrefix(name, verb) {
				return true
			}
		}
		return false
	}
	var told record
	b := rpctest.Sample()
	b.Script(rpctest.Script{Create: func(context.Context, agent.SnapshotRequest) (op.Record, error) {
		return op.Record{ID: "0000beef", Kind: op.KindSnapshot, State: op.Queued}, nil
	}})
	socket := rpctest.Serve(t, b, rpc.Options{Roles: ownRoles(t), Made: told.add})
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	defer client.CloseIdleConnections()
	post := func(procedure, body string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://vmsnapd"+procedure, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		res, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = res.Body.Close() }()
		if _, err := io.Copy(io.Discard, res.Body); err != nil {
			t.Fatal(err)
		}
	}
	protoregistry.GlobalFiles.RangeFilesByPackage("vmsnap.v1", func(file protoreflect.FileDescriptor) bool {
		for i := range file.Services().Len() {
			methods := file.Services().Get(i).Methods()
			for j := range methods.Len() {
				m := methods.Get(j)
				post(fmt.Sprintf("/%s/%s", m.Parent().FullName(), m.Name()), "{}")
				calls := told.take()
				if want := !looks(string(m.Name())); want != (len(calls) == 1) {
					t.Errorf("%s is on record %d times", m.Name(), len(calls))
				} else if want && (calls[0].UID != uint32(os.Getuid()) || int(calls[0].PID) != os.Getpid() || !strings.HasSuffix(calls[0].Procedure, "/"+string(m.Name()))) {
					t.Errorf("%s is on record as %+v", m.Name(), calls[0])
				}
			}
		}
		return true
	})

	post(vmsnapv1connect.SnapshotServiceRenameSnapshotProcedure, `{"snapshot":"web/nope","newName":"x"}`)
	post(vmsnapv1connect.SnapshotServiceCreateSnapshotProcedure, `{"vm":"web","name":"x","requestId":"r1"}`)
	want := []agent.Call{
		{Procedure: "SnapshotService/RenameSnapshot", VM: "web", Subject: "web/nope", Failed: "not-found"},
		{Procedure: "SnapshotService/CreateSnapshot", VM: "web", Subject: "x", RequestID: "r1"},
	}
	got := told.take()
	for i := range got {
		if (got[i].Reason == "") != (got[i].Failed == "") || (got[i].Operation == "") == (got[i].Failed == "") {
			t.Errorf("call %+v", got[i])
		}
		got[i].UID, got[i].PID, got[i].Reason, got[i].Operation = 0, 0, "", ""
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("calls (-want +got):\n%s", d)
	}
}
