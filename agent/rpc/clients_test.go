package rpc_test

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/agent/rpc"
	"github.com/vmsnap/vmsnap/agent/rpc/rpctest"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/api/vmsnap/v1/vmsnapv1connect"
)

func diff(want, got any) string {
	return cmp.Diff(want, got, cmpopts.IgnoreUnexported(agent.SnapshotRequest{}))
}

// curl runs curl, as another user if told to, and returns what it printed.
func curl(t *testing.T, as *syscall.Credential, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "curl", append([]string{"-sS", "--max-time", "20"}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: as}
	cmd.Dir = "/"
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("curl: %v: %s", err, out)
	}
	return string(out)
}

// call calls a procedure with JSON.
func call(t *testing.T, as *syscall.Credential, socket, procedure, body string) string {
	t.Helper()
	return curl(t, as, "--unix-socket", socket, "-H", "Content-Type: application/json", "-d", body, "http://vmsnapd"+procedure)
}

func TestCurl(t *testing.T) {
	socket := rpctest.Serve(t, rpctest.Sample(), rpc.Options{Roles: ownRoles(t), Version: "1.2.3"})
	var list struct {
		Vms []struct{ Name, State string }
	}
	out := call(t, nil, socket, vmsnapv1connect.VMServiceListVMsProcedure, "{}")
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	if len(list.Vms) != 3 || list.Vms[0].Name != "web" || list.Vms[0].State != "VM_STATE_RUNNING" {
		t.Errorf("got %+v", list)
	}
	// What changes nothing may be fetched by GET.
	out = curl(t, nil, "--unix-socket", socket, "-G", "-i", "http://vmsnapd"+vmsnapv1connect.VMServiceGetVMProcedure,
		"--data-urlencode", "connect=v1", "--data-urlencode", "encoding=json", "--data-urlencode", `message={"vm":"web"}`)
	if !strings.Contains(out, `"uuid":"0b7c1f6e`) || !strings.Contains(out, "Server: vmsnapd/1.2.3\r\n") {
		t.Errorf("got %s", out)
	}
	out = call(t, nil, socket, vmsnapv1connect.VMServiceGetVMProcedure, `{"vm":"nope"}`)
	for _, want := range []string{`"code":"not_found"`, `"type":"vmsnap.v1.Error"`, `"code":"ERROR_CODE_NOT_FOUND"`, `"hint":"vmsnap vm list`} {
		if !strings.Contains(out, want) {
			t.Errorf("%s lacks %s", out, want)
		}
	}
	out = call(t, nil, socket, vmsnapv1connect.VMServiceGetVMProcedure, `{"vm":`)
	if !strings.Contains(out, `"code":"invalid_argument"`) {
		t.Errorf("broken JSON gives %s", out)
	}
}

// envelope frames a message of a Connect stream: flags and length before it.
func envelope(message string) string {
	head := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message)))
	return string(head) + message
}

func TestCurlWatches(t *testing.T) {
	socket := rpctest.Serve(t, rpctest.Sample(), rpc.Options{Roles: ownRoles(t)})
	body := filepath.Join(t.TempDir(), "body")
	if err := os.WriteFile(body, []byte(envelope(`{"id":"c0ffee01"}`)), 0o600); err != nil {
		t.Fatal(err)
	}
	out := curl(t, nil, "--unix-socket", socket, "-H", "Content-Type: application/connect+json", "--data-binary", "@"+body,
		"http://vmsnapd"+vmsnapv1connect.OperationServiceWatchOperationProcedure)
	if !strings.Contains(out, `"state":"OPERATION_STATE_SUCCEEDED"`) || !strings.HasSuffix(out, "{}") {
		t.Errorf("got %q", out)
	}
}

func dial(t *testing.T, socket string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func TestGRPC(t *testing.T) {
	b := rpctest.Sample()
	conn := dial(t, rpctest.Serve(t, b, rpc.Options{Roles: ownRoles(t)}))
	var list vmsnapv1.ListVMsResponse
	if err := conn.Invoke(t.Context(), vmsnapv1connect.VMServiceListVMsProcedure, &vmsnapv1.ListVMsRequest{}, &list); err != nil {
		t.Fatal(err)
	}
	if len(list.GetVms()) != 3 || list.GetVms()[0].GetName() != "web" {
		t.Errorf("got %v", &list)
	}
	err := conn.Invoke(t.Context(), vmsnapv1connect.VMServiceGetVMProcedure, &vmsnapv1.GetVMRequest{Vm: "nope"}, &vmsnapv1.GetVMResponse{})
	failed := status.Convert(err)
	if failed.Code() != codes.NotFound || len(failed.Details()) != 1 {
		t.Fatalf("got %v with %v", err, failed.Details())
	}
	if detail := failed.Details()[0].(*vmsnapv1.Error); detail.GetCode() != vmsnapv1.ErrorCode_ERROR_CODE_NOT_FOUND {
		t.Errorf("got %v", detail)
	}
}

func TestGRPCWatches(t *testing.T) {
	b := rpctest.NewBackend()
	record := op.Record{ID: "0000beef", Kind: op.KindSnapshot, State: op.Queued}
	b.PutOperation(record)
	conn := dial(t, rpctest.Serve(t, b, rpc.Options{Roles: ownRoles(t)}))
	stream, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true}, vmsnapv1connect.OperationServiceWatchOperationProcedure)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.SendMsg(&vmsnapv1.WatchOperationRequest{Id: "0000beef"}); err != nil {
		t.Fatal(err)
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	for i, state := range []op.State{op.Queued, op.Running, op.Succeeded} {
		if i > 0 {
			record.State = state
			b.PutOperation(record)
		}
		var got vmsnapv1.WatchOperationResponse
		if err := stream.RecvMsg(&got); err != nil {
			t.Fatal(err)
		}
		if word := strings.ToLower(strings.TrimPrefix(got.GetOperation().GetState().String(), "OPERATION_STATE_")); word != string(state) {
			t.Errorf("got %s; want %s", word, state)
		}
	}
	if err := stream.RecvMsg(&vmsnapv1.WatchOperationResponse{}); err == nil || err.Error() != "EOF" {
		t.Errorf("after the end came %v", err)
	}
}

func TestHealthAndReflection(t *testing.T) {
	conn := dial(t, rpctest.Serve(t, rpctest.Sample(), rpc.Options{Roles: ownRoles(t)}))
	for _, service := range []string{"", vmsnapv1connect.VMServiceName} {
		res, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{Service: service})
		if err != nil || res.GetStatus() != healthpb.HealthCheckResponse_SERVING {
			t.Errorf("health of %q: %v, %v", service, res, err)
		}
	}
	stream, err := reflectpb.NewServerReflectionClient(conn).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&reflectpb.ServerReflectionRequest{MessageRequest: &reflectpb.ServerReflectionRequest_ListServices{}}); err != nil {
		t.Fatal(err)
	}
	res, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range res.GetListServicesResponse().GetService() {
		names = append(names, s.GetName())
	}
	slices.Sort(names)
	want := []string{"vmsnap.v1.EventService", "vmsnap.v1.OperationService", "vmsnap.v1.ScheduleService", "vmsnap.v1.SnapshotService", "vmsnap.v1.VMService"}
	if d := cmp.Diff(want, names); d != "" {
		t.Errorf("services (-want +got):\n%s", d)
	}
	if err := stream.CloseSend(); err != nil {
		t.Error(err)
	}
}

// openServe serves at a socket that every user can open.
func openServe(t *testing.T, opts rpc.Options) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "vmsnap-rpc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket := filepath.Join(dir, "d.sock")
	rpctest.ServeAt(t, socket, rpctest.Sample(), opts)
	for path, mode := range map[string]os.FileMode{dir: 0o755, socket: 0o666} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	return socket
}

// TestRoles calls as users of other uids and groups, which takes root.
func TestRoles(t *testing.T) {
	roles, err := rpc.ResolveRoles(uint32(os.Getuid()), []string{"61001"}, []string{"61002"}, []string{"61003"})
	if err != nil {
		t.Fatal(err)
	}
	log := new(journal)
	socket := openServe(t, rpc.Options{Roles: roles, Logger: log.logger()})
	user := func(uid, gid uint32, groups ...uint32) *syscall.Credential {
		return &syscall.Credential{Uid: uid, Gid: gid, Groups: groups}
	}
	// More groups than the first buffer of SO_PEERGROUPS has room for.
	many := []uint32{61002}
	for gid := range uint32(200) {
		many = append(many, 62000+gid)
	}
	list, create, forget := vmsnapv1connect.VMServiceListVMsProcedure, vmsnapv1connect.SnapshotServiceCreateSnapshotProcedure, vmsnapv1connect.VMServiceForgetVMProcedure
	for name, c := range map[string]struct {
		as        *syscall.Credential
		procedure string
		refused   string // part of the answer; empty when the call is permitted
	}{
		"no role, list":              {user(65534, 65534), list, "uid 65534 has no role here"},
		"no role, create":            {user(65533, 65534), create, "uid 65533 has no role here"},
		"viewer, list":               {user(60001, 61001), list, ""},
		"viewer, create":             {user(60002, 65534, 61001), create, "uid 60002 has the role viewer; this needs operator"},
		"operator, create":           {user(60003, 65534, 61002), create, ""},
		"operator, forget":           {user(60004, 61002), forget, "uid 60004 has the role operator; this needs admin"},
		"admin, forget":              {user(60005, 65534, 61003), forget, ""},
		"operator of many groups":    {user(60006, 65534, many...), create, ""},
		"root":                       {nil, forget, ""},
		"no role, unknown procedure": {user(60007, 65534), "/vmsnap.v1.VMService/Destroy", "uid 60007 has no role here"},
		"viewer, unknown procedure":  {user(60008, 61001), "/vmsnap.v1.VMService/Destroy", "this vmsnapd has no procedure /vmsnap.v1.VMService/Destroy"},
		"no role, no procedure":      {user(60009, 65534), "/", "uid 60009 has no role here"},
	} {
		t.Run(name, func(t *testing.T) {
			out := call(t, c.as, socket, c.procedure, `{"vm":"web"}`)
			refused := strings.Contains(out, `"permission_denied"`) || strings.Contains(out, "has no procedure")
			if refused != (c.refused != "") || !strings.Contains(out, c.refused) {
				t.Errorf("got %s; want %q", out, c.refused)
			}
			if c.as == nil {
				return
			}
			if logged := loggedRefusal(log.String(), c.as.Uid, c.procedure); logged != refused {
				t.Errorf("refused is %t, logged is %t:\n%s", refused, logged, log)
			}
		})
	}
}

func loggedRefusal(log string, uid uint32, procedure string) bool {
	for line := range strings.Lines(log) {
		if strings.Contains(line, "[WARN]  call refused") && strings.Contains(line, "procedure="+procedure+" ") &&
			strings.Contains(line, fmt.Sprintf("uid=%d ", uid)) {
			return true
		}
	}
	return false
}

// TestRefusedStream has a stream refused in the form of its protocol.
func TestRefusedStream(t *testing.T) {
	socket := openServe(t, rpc.Options{})
	body := filepath.Join(filepath.Dir(socket), "body")
	if err := os.WriteFile(body, []byte(envelope(`{"id":"c0ffee01"}`)), 0o644); err != nil {
		t.Fatal(err)
	}
	out := curl(t, &syscall.Credential{Uid: 65534, Gid: 65534}, "--unix-socket", socket, "-H", "Content-Type: application/connect+json",
		"--data-binary", "@"+body, "http://vmsnapd"+vmsnapv1connect.OperationServiceWatchOperationProcedure)
	if !strings.Contains(out, `"permission_denied"`) || strings.Contains(out, "SUCCEEDED") {
		t.Errorf("got %q", out)
	}
}
