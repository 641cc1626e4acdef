package rpc

import (
	"bytes"
	"context"
	"encoding/binary"
	"net/http/httptest"
	"os"
	"regexp"
	"strings"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

// promisedRoles reads the role of each method from the operators' document.
func promisedRoles(t *testing.T) map[string]Role {
	t.Helper()
	text, err := os.ReadFile("../../docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	roles := map[string]Role{"viewer": Viewer, "operator": Operator, "admin": Admin}
	promised := map[string]Role{}
	for _, row := range regexp.MustCompile("(?m)^\\| (`.*`) \\| (viewer|operator|admin) \\| .* \\|$").FindAllStringSubmatch(string(text), -1) {
		for _, name := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(row[1], -1) {
			promised["/vmsnap.v1."+name[1]] = roles[row[2]]
		}
	}
	return promised
}

// TestEveryRoleAtEveryProcedure calls each method of the API as each role, and
// as a peer that the kernel has not told: who may call is what the document says.
func TestEveryRoleAtEveryProcedure(t *testing.T) {
	peers := map[Role]Peer{NoRole: {UID: 1000, GID: 100}, Viewer: {UID: 1001, GID: 101}, Operator: {UID: 1002, GID: 102}, Admin: {UID: 1003, GID: 103}}
	roles, err := ResolveRoles(990, []string{"101"}, []string{"102"}, []string{"103"})
	if err != nil {
		t.Fatal(err)
	}
	var refusals []string
	handler := NewHandler(nil, Options{Roles: roles, Refused: func(_ uint32, _ int32, procedure, _ string) {
		refusals = append(refusals, procedure)
	}})
	// A call that is permitted finds no backend, which is another error.
	permitted := func(ctx context.Context, m protoreflect.MethodDescriptor) bool {
		body, kind := []byte("{}"), "application/json"
		if m.IsStreamingServer() {
			kind = "application/connect+json"
			body = append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(body))), body...)
		}
		req := httptest.NewRequestWithContext(ctx, "POST", procedure(m), bytes.NewReader(body))
		req.Header.Set("Content-Type", kind)
		res := httptest.NewRecorder()
		handler.ServeHTTP(res, req)
		return !strings.Contains(res.Body.String(), `"permission_denied"`)
	}
	promised := promisedRoles(t)
	eachMethod(func(m protoreflect.MethodDescriptor) {
		need, known := promised[procedure(m)]
		if !known {
			t.Errorf("%s is not in docs/security.md", procedure(m))
		}
		if permitted(t.Context(), m) {
			t.Errorf("%s is permitted to a peer that nobody knows", procedure(m))
		}
		for role, peer := range peers {
			before := len(refusals)
			ctx := context.WithValue(t.Context(), peerKey{}, peer)
			if got, want := permitted(ctx, m), role >= need && known; got != want {
				t.Errorf("%s as %s: permitted is %t, and should be %t", procedure(m), role, got, want)
			} else if told := len(refusals) > before; told == got {
				t.Errorf("%s as %s: permitted is %t, and told is %t", procedure(m), role, got, told)
			}
		}
	})
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
