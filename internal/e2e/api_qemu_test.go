package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/api/vmsnap/v1/vmsnapv1connect"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// TestQEMUOneDaemonForAllItsClients has each kind of client meet a daemon with a
// guest whose agent answers.
func TestQEMUOneDaemonForAllItsClients(t *testing.T) {
	t.Parallel() // it waits most of its time
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q, Disks: testvm.TwoDisks()})
		h := prepareHost(t, "--log-format", "json", "--socket-group", "nogroup", "--viewers", "nogroup",
			"--operators", "65529:"+g.Name+"*,65528:not-"+g.Name)
		h.list(g.Name, g.UUID)
		h.start()
		t.Cleanup(h.end)
		h.await(g.Name, "running")
		h.agentComesAndGoes(g)
		h.curlTakesASnapshot(g.Name, "by-curl")
		h.grpcTakesASnapshot(g.Name, "a-by-grpc")
		h.freezeIsShown(g)
		h.passesPromtool()
		h.windows(3) // two snapshots and a freeze
		h.strangerIsAViewer(g.Name)
		h.allFormats(g.Name)
		h.completes(g.Name)
		thawed(t, g)
		h.signal(syscall.SIGTERM)
		h.logIsJSON(g)
		named := prepareHost(t)
		text := fmt.Sprintf("match:\n  uuid: %s\nguest-agent: %s\n", g.UUID, g.AgentSocket())
		if err := os.WriteFile(named.path("vms.d/vm.yaml"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		named.start()
		t.Cleanup(named.end)
		named.agentComesAndGoes(g)
	})
}

// agentComesAndGoes ends the guest's agent and starts it again.
func (h *host) agentComesAndGoes(g *testvm.Guest) {
	h.t.Helper()
	presence := func(want vmsnapv1.GuestAgent_Presence) {
		h.t.Helper()
		h.sees(eventLimit, g.Name, func(vm *vmsnapv1.VM) error {
			if got := vm.GetGuestAgent(); got.GetPresence() != want || got.GetSocket() != g.AgentSocket() {
				return fmt.Errorf("agent %v", got)
			}
			return nil
		})
	}
	presence(vmsnapv1.GuestAgent_PRESENCE_CONNECTED)
	if err := g.SignalAgent(h.t.Context(), "KILL"); err != nil {
		h.t.Fatal(err)
	}
	presence(vmsnapv1.GuestAgent_PRESENCE_DISCONNECTED)
	if err := g.RestartAgent(h.t.Context()); err != nil {
		h.t.Fatal(err)
	}
	presence(vmsnapv1.GuestAgent_PRESENCE_CONNECTED)
}

// curl calls a procedure with JSON, as a script would.
func (h *host) curl(procedure, body string, into any) {
	h.t.Helper()
	out, err := exec.CommandContext(h.ctx(), "curl", "-sS", "--fail-with-body", "--unix-socket", h.socket, "-H", "Content-Type: application/json",
		"-d", body, "http://vmsnapd"+procedure).CombinedOutput()
	if err != nil {
		h.t.Fatalf("curl %s: %v: %s", procedure, err, out)
	}
	if err := json.Unmarshal(out, into); err != nil {
		h.t.Fatalf("%s: %v in %s", procedure, err, out)
	}
}

func (h *host) curlTakesASnapshot(vm, name string) {
	h.t.Helper()
	var list struct {
		Vms []struct{ Name, State string }
	}
	h.curl(vmsnapv1connect.VMServiceListVMsProcedure, "{}", &list)
	if len(list.Vms) != 1 || list.Vms[0].Name != vm || list.Vms[0].State != "VM_STATE_RUNNING" {
		h.t.Errorf("listed are %+v", list)
	}
	var created struct{ Operation struct{ ID string } }
	h.curl(vmsnapv1connect.SnapshotServiceCreateSnapshotProcedure, `{"vm":"`+vm+`","name":"`+name+`","quiesce":"QUIESCE_REQUIRE","requestId":"r1"}`, &created)
	id := created.Operation.ID
	h.eventually(eventLimit, "curl sees the operation's end", func() error {
		var got struct {
			Operation struct {
				State, SnapshotID string
				Steps             []struct{ Name string }
			}
		}
		h.curl(vmsnapv1connect.OperationServiceGetOperationProcedure, `{"id":"`+id+`"}`, &got)
		if got.Operation.State != "OPERATION_STATE_SUCCEEDED" {
			return errors.New(got.Operation.State)
		}
		if got.Operation.SnapshotID == "" || len(got.Operation.Steps) != 8 {
			h.t.Errorf("operation %+v", got)
		}
		return nil
	})
	h.curl(vmsnapv1connect.SnapshotServiceCreateSnapshotProcedure, `{"vm":"`+vm+`","name":"`+name+`","quiesce":"QUIESCE_REQUIRE","requestId":"r1"}`, &created)
	if created.Operation.ID != id {
		h.t.Errorf("the repeated request made the operation %s beside %s", created.Operation.ID, id)
	}
}

// grpcTakesASnapshot uses nothing of ours but the messages.
func (h *host) grpcTakesASnapshot(vm, name string) {
	h.t.Helper()
	ctx := h.ctx()
	conn, err := grpc.NewClient("unix:"+h.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		h.t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	var list vmsnapv1.ListVMsResponse
	if err := conn.Invoke(ctx, vmsnapv1connect.VMServiceListVMsProcedure, &vmsnapv1.ListVMsRequest{}, &list); err != nil || len(list.GetVms()) != 1 || list.GetVms()[0].GetName() != vm {
		h.t.Errorf("listed are %v, %v", &list, err)
	}
	err = conn.Invoke(ctx, vmsnapv1connect.VMServiceGetVMProcedure, &vmsnapv1.GetVMRequest{Vm: "nope"}, &vmsnapv1.GetVMResponse{})
	if status.Code(err) != codes.NotFound {
		h.t.Errorf("a VM that is not there: %v", err)
	}
	var created vmsnapv1.CreateSnapshotResponse
	if err := conn.Invoke(ctx, vmsnapv1connect.SnapshotServiceCreateSnapshotProcedure, &vmsnapv1.CreateSnapshotRequest{Vm: vm, Name: name}, &created); err != nil {
		h.t.Fatal(err)
	}
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, vmsnapv1connect.OperationServiceWatchOperationProcedure)
	if err != nil {
		h.t.Fatal(err)
	}
	if err := errors.Join(stream.SendMsg(&vmsnapv1.WatchOperationRequest{Id: created.GetOperation().GetId()}), stream.CloseSend()); err != nil {
		h.t.Fatal(err)
	}
	var last *vmsnapv1.Operation
	updates := 0
	for {
		var got vmsnapv1.WatchOperationResponse
		err := stream.RecvMsg(&got)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			h.t.Fatal(err)
		}
		last = got.GetOperation()
		updates++
	}
	if last.GetState() != vmsnapv1.OperationState_OPERATION_STATE_SUCCEEDED || updates < 2 {
		h.t.Errorf("after %d updates the operation is %v", updates, last)
	}
	h.healthAndReflection(conn)
}

func (h *host) healthAndReflection(conn *grpc.ClientConn) {
	h.t.Helper()
	res, err := healthpb.NewHealthClient(conn).Check(h.ctx(), &healthpb.HealthCheckRequest{Service: vmsnapv1connect.VMServiceName})
	if err != nil || res.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		h.t.Errorf("health: %v, %v", res, err)
	}
	stream, err := reflectpb.NewServerReflectionClient(conn).ServerReflectionInfo(h.ctx())
	if err != nil {
		h.t.Fatal(err)
	}
	err = stream.Send(&reflectpb.ServerReflectionRequest{MessageRequest: &reflectpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: vmsnapv1connect.VMServiceName}})
	if err != nil {
		h.t.Fatal(err)
	}
	described, err := stream.Recv()
	if err != nil || len(described.GetFileDescriptorResponse().GetFileDescriptorProto()) == 0 {
		h.t.Errorf("reflection: %v, %v", described, err)
	}
	if err := stream.CloseSend(); err != nil {
		h.t.Error(err)
	}
}

// freezeIsShown holds a freeze and looks at what tells of it.
func (h *host) freezeIsShown(g *testvm.Guest) {
	h.t.Helper()
	if m := h.scrape(); !strings.Contains(m, "\nvmsnap_guests_frozen 0\n") || strings.Contains(m, "vmsnap_guest_frozen{") {
		h.t.Errorf("before the freeze:\n%s", m)
	}
	h.must("freeze", g.Name)
	m := h.scrape()
	for _, want := range []string{"vmsnap_guests_frozen 1", `vmsnap_guest_frozen{vm="` + g.Name + `"} 1`, `vmsnap_operations_running{kind="freeze"} 1`} {
		if !strings.Contains(m, "\n"+want+"\n") {
			h.t.Errorf("%s is not in:\n%s", want, m)
		}
	}
	h.passesPromtool()
	id := h.operation(g.Name)
	vm := h.object("vm", "show", g.Name)
	if f, _ := vm["freeze"].(map[string]any); vm["operation_id"] != id || f == nil || f["frozen"] != 2.0 || f["operation_id"] != id {
		h.t.Errorf("shown with the operation %v (want %s) and the freeze %v", vm["operation_id"], id, vm["freeze"])
	}
	if list := h.must("vm", "list", "-o", "wide"); !strings.Contains(list, "running,frozen") || !strings.Contains(list, id) {
		h.t.Errorf("vm list:\n%s", list)
	}
	h.fails(11, id, "snapshot", "create", g.Name, "x")
	h.must("thaw", g.Name)
	vm = h.object("vm", "show", g.Name)
	if vm["operation_id"] != "" || vm["freeze"] != nil {
		h.t.Errorf("after the thaw: operation %v, freeze %v", vm["operation_id"], vm["freeze"])
	}
	if m := h.scrape(); !strings.Contains(m, "\nvmsnap_guests_frozen 0\n") {
		h.t.Errorf("after the thaw:\n%s", m)
	}
}

// passesPromtool has Prometheus' own linter read the metrics.
func (h *host) passesPromtool() {
	h.t.Helper()
	check := exec.CommandContext(h.ctx(), "promtool", "check", "metrics")
	check.Stdin = strings.NewReader(h.scrape())
	if out, err := check.CombinedOutput(); err != nil {
		h.t.Errorf("promtool: %v\n%s", err, out)
	}
}

// windows waits for the freeze windows to be counted.
func (h *host) windows(n int) {
	h.t.Helper()
	h.eventually(eventLimit, "the freeze windows are counted", func() error {
		if m := h.scrape(); !strings.Contains(m, fmt.Sprintf("\nvmsnap_freeze_window_seconds_count %d\n", n)) ||
			!strings.Contains(m, `vmsnap_operations_total{kind="snapshot",result="succeeded"} 2`) ||
			!strings.Contains(m, `vmsnap_operations_total{kind="freeze",result="succeeded"} 1`) {
			return errors.New(m)
		}
		return nil
	})
}

// strangers lets other users run vmsnap, and returns how.
func (h *host) strangers() (as func(uid, gid uint32, args ...string) result) {
	h.t.Helper()
	program := filepath.Join(filepath.Dir(h.socket), "vmsnap")
	binary, err := os.ReadFile(filepath.Join(binaries, "vmsnap"))
	if err != nil {
		h.t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(program, binary, 0o755), os.Chmod(program, 0o755), os.Chmod(filepath.Dir(h.socket), 0o755)); err != nil {
		h.t.Fatal(err)
	}
	return func(uid, gid uint32, args ...string) result {
		cmd := exec.CommandContext(h.ctx(), program, args...)
		cmd.Env, cmd.Dir = []string{"VMSNAP_SOCKET=" + h.socket}, "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid}}
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Run(); cmd.ProcessState == nil {
			h.t.Fatal(err)
		}
		return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
	}
}

// strangerIsAViewer runs vmsnap as a user whose group may look and no more.
func (h *host) strangerIsAViewer(vm string) {
	h.t.Helper()
	as := h.strangers()
	const viewer, nobody = 65531, 65532
	if r := as(viewer, 65534, "vm", "list"); r.code != 0 || !strings.Contains(r.stdout, vm) {
		h.t.Errorf("a viewer lists: %+v", r)
	}
	for _, args := range [][]string{{"snapshot", "create", vm, "x"}, {"freeze", vm}, {"vm", "forget", vm}} {
		if r := as(viewer, 65534, args...); r.code != 7 || !strings.Contains(r.stderr, "uid 65531") {
			h.t.Errorf("a viewer may %v: %+v", args, r)
		}
	}
	if r := as(nobody, 65530, "vm", "list"); r.code != 7 && r.code != 15 {
		h.t.Errorf("one of no group lists: %+v", r)
	}
	const ours, others = 65529, 65528                 // groups with a role for this VM, and for another
	if err := os.Chmod(h.socket, 0o666); err != nil { // its group is the viewers'
		h.t.Fatal(err)
	}
	id := h.object("vm", "show", vm)["id"].(string)
	for _, ref := range []string{vm, id} {
		if r := as(viewer, ours, "thaw", ref); r.code != 5 || !strings.Contains(r.stderr, "was not frozen") {
			h.t.Errorf("an operator of this VM thaws %s: %+v", ref, r)
		}
		if r := as(viewer, others, "thaw", ref); r.code != 7 || !strings.Contains(r.stderr, "does not have the role operator for VM") {
			h.t.Errorf("an operator of other VMs thaws %s: %+v", ref, r)
		}
	}
	for _, list := range [][]string{{"vm", "list"}, {"snapshot", "list"}, {"operation", "list"}, {"event", "list"}} {
		if r := as(viewer, ours, list...); r.code != 0 || !strings.Contains(r.stdout, vm) {
			h.t.Errorf("an operator of this VM: %v: %+v", list, r)
		}
		if r := as(viewer, others, list...); r.code != 0 || strings.Contains(r.stdout, vm) {
			h.t.Errorf("an operator of other VMs: %v: %+v", list, r)
		}
	}
	if names := h.must("snapshot", "list", vm, "-o", "name"); len(strings.Fields(names)) != 2 {
		h.t.Errorf("snapshots: %s", names)
	}
}

// allFormats prints what there is in every format.
func (h *host) allFormats(vm string) {
	h.t.Helper()
	id := strings.Fields(h.must("operation", "list", vm, "-o", "name"))[0]
	for _, c := range []struct {
		args []string
		want string // a word in each format
	}{
		{[]string{"vm", "list"}, vm}, {[]string{"vm", "show", vm}, vm},
		{[]string{"snapshot", "list", vm}, "by-curl"}, {[]string{"snapshot", "show", vm + "/by-curl"}, "by-curl"},
		{[]string{"operation", "list", vm}, id}, {[]string{"operation", "show", id}, id},
	} {
		for _, format := range []string{"table", "wide", "json", "yaml", "name"} {
			out := h.must(append(slices.Clone(c.args), "-o", format)...)
			if !strings.Contains(out, c.want) {
				h.t.Errorf("%v -o %s lacks %s:\n%s", c.args, format, c.want, out)
			}
			var v map[string]any
			var err error
			switch format {
			case "json":
				err = json.Unmarshal([]byte(out), &v)
			case "yaml":
				err = yaml.Unmarshal([]byte(out), &v)
			}
			if err != nil || v == nil && (format == "json" || format == "yaml") {
				h.t.Errorf("%v -o %s: %v\n%s", c.args, format, err, out)
			}
		}
	}
	for order, want := range map[string]string{"time": "a-by-grpc by-curl", "name": "a-by-grpc by-curl"} {
		got := strings.Join(strings.Fields(h.must("snapshot", "list", vm, "--sort", order, "-o", "name")), " ")
		if got = strings.ReplaceAll(got, vm+"/", ""); got != want {
			h.t.Errorf("sorted by %s: %s", order, got)
		}
	}
	h.must("snapshot", "rename", vm+"/a-by-grpc", "z-by-grpc")
	for order, want := range map[string]string{"time": "z-by-grpc by-curl", "name": "by-curl z-by-grpc"} {
		got := strings.Join(strings.Fields(h.must("snapshot", "list", vm, "--sort", order, "-o", "name")), " ")
		if got = strings.ReplaceAll(got, vm+"/", ""); got != want {
			h.t.Errorf("sorted by %s: %s", order, got)
		}
	}
}

// completes asks what a shell would.
func (h *host) completes(vm string) {
	h.t.Helper()
	for _, c := range []struct{ line, want string }{
		{"vm show ", vm + "\t"}, {"snapshot create ", vm + "\t"}, {"snapshot show ", vm + "/by-curl\t"}, {"snapshot create " + vm + " --disk ", "root\t"},
	} {
		if out := h.must(append([]string{"__complete"}, strings.Split(c.line, " ")...)...); !strings.Contains("\n"+out, "\n"+c.want) {
			h.t.Errorf("%q completes to %s", c.line, out)
		}
	}
}

// logIsJSON reads the log of the daemon that has ended.
func (h *host) logIsJSON(g *testvm.Guest) {
	h.t.Helper()
	steps := map[string][]string{} // of an operation
	disks := map[string][]string{}
	refused := 0
	for line := range strings.Lines(h.log.String()) {
		var entry map[string]any
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			h.t.Errorf("no JSON: %v: %s", err, line)
			continue
		}
		for _, key := range []string{"@level", "@message", "@timestamp"} {
			if entry[key] == nil {
				h.t.Errorf("%s is missing: %s", key, line)
			}
		}
		id, _ := entry["operation"].(string)
		if entry["vm"] == g.Name && id != "" {
			if step, ok := entry["step"].(string); ok {
				steps[id] = append(steps[id], step)
			}
			if disk, ok := entry["disk"].(string); ok {
				disks[id] = append(disks[id], disk)
			}
		}
		if entry["@message"] == "call refused" && entry["uid"] == 65531.0 {
			refused++
		}
	}
	var snapshots int
	for id, got := range steps {
		switch strings.Join(got, " ") {
		case "preflight guard overlays freeze cut thaw settle commit":
			snapshots++
			if d := strings.Join(disks[id], " "); d != "root data" {
				h.t.Errorf("snapshot %s: the log tells of the disks %q", id, d)
			}
		case "freeze frozen thaw":
		default:
			h.t.Errorf("operation %s: steps %v", id, got)
		}
	}
	if snapshots != 2 || len(steps) != 3 || refused != 5 {
		h.t.Errorf("%d snapshots of %d operations, %d refused calls", snapshots, len(steps), refused)
	}
	if h.t.Failed() {
		h.t.Logf("log:\n%s", h.log)
	}
}

// TestQEMUHungVMDelaysNobody stops a QEMU for good while a snapshot asks it.
func TestQEMUHungVMDelaysNobody(t *testing.T) {
	t.Parallel() // it waits most of its time
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		hung := newStill(t, q, "hung-"+q.Name, "root.qcow2")
		other := newStill(t, q, "other-"+q.Name, "root.qcow2")
		h := newHostOf(t, map[string]string{hung.name: hung.uuid, other.name: other.uuid})
		h.await(hung.name, "paused")
		h.await(other.name, "paused")
		h.must("snapshot", "create", other.name, "first", "--quiesce", "none")
		h.Close()
		base := h.size()
		if err := hung.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if hung.cmd != nil {
				_ = hung.cmd.Process.Signal(syscall.SIGCONT)
			}
		})
		waiting := h.create(hung.name, "s", "--quiesce", "none")
		h.operation(hung.name)
		began := time.Now()
		m := h.scrape()
		list := h.must("vm", "list")
		if took := time.Since(began); took > promptly(time.Second) {
			t.Errorf("a scrape and a list took %s", took)
		}
		if !strings.Contains(m, `vmsnap_collector_success{collector="vms"} 1`) || !strings.Contains(m, `vmsnap_operations_running{kind="snapshot"} 1`) || !strings.Contains(list, hung.name) {
			t.Errorf("list:\n%s\nmetrics:\n%s", list, m)
		}
		h.must("snapshot", "create", other.name, "s", "--quiesce", "none")
		select {
		case <-waiting.ended:
			t.Errorf("the snapshot of a stopped QEMU has ended: %+v", waiting.result)
		default:
		}
		if err := hung.cmd.Process.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		if r := waiting.end(); r.code != 0 {
			t.Errorf("after QEMU went on: %+v", r)
		}
		h.Close()
		h.returnsTo(base)
	})
}
