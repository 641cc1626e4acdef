package rpc_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/agent/rpc"
	"github.com/vmsnap/vmsnap/agent/rpc/rpctest"
)

// webAdmin has every role for the VM web, and looks at nothing else.
var webAdmin = rpc.Peer{UID: 1000, GID: 100, Groups: []uint32{101}}

// scopedHandler serves the sample with a snapshot of a group of two VMs.
func scopedHandler(t *testing.T, told *[]string) http.Handler {
	t.Helper()
	roles, err := rpc.ResolveRoles(990, []string{"101:we?"}, []string{"102"}, []string{"101:w*b", "103"})
	if err != nil {
		t.Fatal(err)
	}
	b := rpctest.Sample()
	group := func(name, operation, vm string) {
		b.AddSnapshot(agent.SnapshotView{Snapshot: catalog.Snapshot{
			ID: operation + vm, VMID: vm, VMName: vm, Name: name, Group: &catalog.GroupCut{Name: name, Operation: operation, Members: 2},
		}})
	}
	group("both", "aaaa0001", "web")
	group("both", "aaaa0001", "legacy")
	group("alone", "aaaa0002", "web")
	b.PutOperation(op.Record{ID: "aaaa0001", Kind: op.KindGroup, VMName: "legacy,web", State: op.Succeeded})
	b.PutOperation(op.Record{ID: "aaaa0003", Kind: op.KindGroup, VMName: "web,web", State: op.Succeeded})
	return rpc.NewHandler(b, rpc.Options{Roles: roles, Refused: func(_ uint32, _ int32, procedure, _ string) {
		*told = append(*told, procedure)
	}})
}

// promisedScopes reads from the operators' document what each method does for
// those who have its role for some VMs.
func promisedScopes(t *testing.T) map[string]string {
	t.Helper()
	text, err := os.ReadFile("../../docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	promised := map[string]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| (`.*`) \\| \\w+ \\| (of those VMs|shows those VMs|refused) \\|$").FindAllStringSubmatch(string(text), -1) {
		for _, name := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(row[1], -1) {
			promised["/vmsnap.v1."+name[1]] = row[2]
		}
	}
	return promised
}

// postAs makes a call of a method and returns the answer's body.
func postAs(ctx context.Context, t *testing.T, handler http.Handler, m protoreflect.MethodDescriptor, fields map[string]any) string {
	t.Helper()
	body, err := json.Marshal(fields)
	if err != nil {
		t.Fatal(err)
	}
	kind := "application/json"
	if m.IsStreamingServer() {
		kind = "application/connect+json"
		body = append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(body))), body...)
	}
	req := httptest.NewRequestWithContext(ctx, http.MethodPost, "/"+string(m.Parent().FullName())+"/"+string(m.Name()), bytes.NewReader(body))
	req.Header.Set("Content-Type", kind)
	res := httptest.NewRecorder()
	handler.ServeHTTP(res, req)
	return res.Body.String()
}

// about returns the fields of a request that names things in all the ways that
// its method has, nil when it has none of them.
func about(m protoreflect.MethodDescriptor, words map[string]any) map[string]any {
	fields := map[string]any{}
	for name, value := range words {
		if f := m.Input().Fields().ByName(protoreflect.Name(name)); f != nil && f.Kind() == protoreflect.StringKind && (f.IsList() == (name == "vms" || name == "snapshots")) {
			fields[name] = value
		}
	}
	return fields
}

// TestEveryProcedureKeepsToItsScope calls each method of the API about a VM that
// the caller's role is for, and about others, in each way to name them.
func TestEveryProcedureKeepsToItsScope(t *testing.T) {
	var told []string
	handler := scopedHandler(t, &told)
	promised := promisedScopes(t)
	own := []map[string]any{
		{"vm": "web", "snapshot": "web/before-upgrade", "id": "c0ffee01", "group": "alone", "name": "web"},
		{"vm": "0b7c1f6e-3d55-4c8a-9a61-1f1d3f0e8a01", "snapshot": "a1b2c3d4", "id": "aaaa0003", "group": "aaaa0002", "name": "wb"},
		{"vm": "5f0c1a2b", "snapshot": "5f0c1a2b/none", "id": "C0FFEE01", "group": "alone", "name": "weeb"},
	}
	foreign := []map[string]any{
		{"vm": "legacy", "snapshot": "legacy/both", "id": "c0ffee02", "group": "both", "name": "web"},
		{"vm": "7e7f8081", "snapshot": "a1b2c3d7", "id": "aaaa0001", "group": "aaaa0001", "name": "web"},
		{"vm": "nowhere", "snapshot": "nowhere/x", "id": "c0ffee02", "group": "nowhere", "name": "web"},
		{"vm": "web ", "snapshot": "xweb/x", "id": "aaaa0001", "group": "both", "name": "web"},
	}
	for _, words := range slices.Concat(own, foreign) {
		words["vms"], words["snapshots"] = []any{words["vm"]}, []any{words["snapshot"]}
	}
	for _, words := range foreign[:2] { // one of several is enough
		words["vms"], words["snapshots"] = []any{"web", words["vm"]}, []any{"web/before-upgrade", words["snapshot"]}
	}
	ctx := rpc.WithPeer(t.Context(), webAdmin)
	permitted := func(m protoreflect.MethodDescriptor, fields map[string]any) bool {
		before := len(told)
		refused := strings.Contains(postAs(ctx, t, handler, m, fields), `"permission_denied"`)
		if refused != (len(told) > before) {
			t.Errorf("%s of %v: refused is %t, and told is %t", m.Name(), fields, refused, !refused)
		}
		return !refused
	}
	eachMethod(func(m protoreflect.MethodDescriptor) {
		procedure := "/" + string(m.Parent().FullName()) + "/" + string(m.Name())
		switch promised[procedure] {
		case "of those VMs":
			for _, words := range own {
				if fields := about(m, words); !permitted(m, fields) {
					t.Errorf("%s of %v is refused", m.Name(), fields)
				}
			}
			for _, words := range foreign {
				if fields := about(m, words); permitted(m, fields) {
					t.Errorf("%s of %v is permitted", m.Name(), fields)
				}
			}
			if m.Input().Fields().ByName("vm") != nil && permitted(m, map[string]any{}) {
				t.Errorf("%s of nothing is permitted", m.Name())
			}
		case "refused":
			for _, words := range own {
				if fields := about(m, words); permitted(m, fields) {
					t.Errorf("%s of %v is permitted", m.Name(), fields)
				}
			}
		case "shows those VMs":
			if m.IsStreamingServer() {
				return // see TestWatchKeepsToItsScope
			}
			res := postAs(ctx, t, handler, m, map[string]any{})
			if !strings.Contains(res, "web") || strings.Contains(res, "legacy") || strings.Contains(res, "daten") {
				t.Errorf("%s shows %s", m.Name(), res)
			}
			all := postAs(rpc.WithPeer(t.Context(), rpc.Peer{UID: 5, GID: 103}), t, handler, m, map[string]any{})
			if !strings.Contains(all, "legacy") {
				t.Errorf("%s shows to those who may see all %s", m.Name(), all)
			}
			for _, words := range foreign {
				if fields := about(m, words); len(fields) > 0 && permitted(m, fields) {
					t.Errorf("%s of %v is permitted", m.Name(), fields)
				}
			}
		default:
			t.Errorf("what %s does for those who have its role for some VMs is not in docs/security.md", procedure)
		}
	})
	if clone := method("CloneVM"); permitted(clone, map[string]any{"snapshot": "web/before-upgrade", "name": "legacy2"}) {
		t.Error("a VM is cloned under a name that is out of scope")
	}
}

// TestWatchKeepsToItsScope watches the events of a host.
func TestWatchKeepsToItsScope(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var told []string
		handler := scopedHandler(t, &told)
		watch := func(peer rpc.Peer) string {
			ctx, cancel := context.WithCancel(rpc.WithPeer(t.Context(), peer))
			res := make(chan string)
			go func() { res <- postAs(ctx, t, handler, method("WatchEvents"), map[string]any{"since": 0}) }()
			synctest.Wait()
			cancel()
			return <-res
		}
		if own := watch(webAdmin); !strings.Contains(own, `"web"`) || strings.Contains(own, "legacy") || strings.Contains(own, "serves requests") {
			t.Errorf("shown is %s", own)
		}
		if all := watch(rpc.Peer{UID: 5, GID: 102}); !strings.Contains(all, "legacy") || !strings.Contains(all, "serves requests") {
			t.Errorf("shown to those who may see all is %s", all)
		}
	})
}

// TestScopesAddUp gives one role for some VMs and another for others.
func TestScopesAddUp(t *testing.T) {
	roles, err := rpc.ResolveRoles(990, []string{"101"}, []string{"101:web", "102:legacy"}, []string{"102:web"})
	if err != nil {
		t.Fatal(err)
	}
	handler := rpc.NewHandler(rpctest.Sample(), rpc.Options{Roles: roles})
	for name, want := range map[string]map[string]bool{
		// by method and VM
		"101":     {"GetVM web": true, "GetVM legacy": true, "ThawVM web": true, "ThawVM legacy": false, "ForgetVM web": false, "CheckHost ": true},
		"102":     {"GetVM web": true, "GetVM legacy": true, "ThawVM web": true, "ThawVM legacy": true, "ForgetVM web": true, "ForgetVM legacy": false, "CheckHost ": false},
		"101 102": {"CheckHost ": true, "ForgetVM web": true, "ForgetVM legacy": false, "ThawVM legacy": true},
	} {
		peer := rpc.Peer{UID: 1000, GID: 5}
		for _, g := range strings.Fields(name) {
			peer.Groups = append(peer.Groups, map[string]uint32{"101": 101, "102": 102}[g])
		}
		for _, what := range slices.Sorted(maps.Keys(want)) {
			m, vm, _ := strings.Cut(what, " ")
			res := postAs(rpc.WithPeer(t.Context(), peer), t, handler, method(m), about(method(m), map[string]any{"vm": vm}))
			if got := !strings.Contains(res, `"permission_denied"`); got != want[what] {
				t.Errorf("groups %s: %s is permitted: %t, and should be: %t (%s)", name, what, got, want[what], res)
			}
		}
	}
}

// TestPatternsOfVMs refuses what could be taken for more than it is.
func TestPatternsOfVMs(t *testing.T) {
	for _, text := range []string{"101:", "101:web[12]", `101:web\d`, "101:{a}", "no-such-group:web"} {
		if _, err := rpc.ResolveRoles(0, nil, []string{text}, nil); err == nil || !strings.Contains(err.Error(), "role operator") {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func eachMethod(f func(protoreflect.MethodDescriptor)) {
	protoregistry.GlobalFiles.RangeFilesByPackage("vmsnap.v1", func(file protoreflect.FileDescriptor) bool {
		for i := range file.Services().Len() {
			methods := file.Services().Get(i).Methods()
			for j := range methods.Len() {
				f(methods.Get(j))
			}
		}
		return true
	})
}

func method(name string) (found protoreflect.MethodDescriptor) {
	eachMethod(func(m protoreflect.MethodDescriptor) {
		if string(m.Name()) == name {
			found = m
		}
	})
	return found
}
