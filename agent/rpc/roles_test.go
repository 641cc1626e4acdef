package rpc

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

// TestEveryProcedureNeedsARole goes through the services as they are declared.
func TestEveryProcedureNeedsARole(t *testing.T) {
	listed := 0
	protoregistry.GlobalFiles.RangeFilesByPackage("vmsnap.v1", func(file protoreflect.FileDescriptor) bool {
		for i := range file.Services().Len() {
			methods := file.Services().Get(i).Methods()
			for j := range methods.Len() {
				name := procedure(methods.Get(j))
				if need := needed[name]; need.role < Viewer || need.role > Admin || need.vms == nil {
					t.Errorf("%s needs no role", name)
				}
				listed++
			}
		}
		return true
	})
	for name := range needed {
		if strings.HasPrefix(name, "/vmsnap.") {
			listed--
		}
	}
	if listed != 0 {
		t.Errorf("the table has %d procedures that no service declares", -listed)
	}
}

func procedure(m protoreflect.MethodDescriptor) string {
	return "/" + string(m.Parent().FullName()) + "/" + string(m.Name())
}

func TestRoleOf(t *testing.T) {
	roles, err := ResolveRoles(990, []string{"100", "users"}, []string{"200"}, []string{"300", "100"})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		peer Peer
		want Role
	}{
		"root":                            {Peer{UID: 0, GID: 5}, Admin},
		"the daemon's own user":           {Peer{UID: 990, GID: 5}, Admin},
		"nobody":                          {Peer{UID: 1000, GID: 5, Groups: []uint32{6, 7}}, NoRole},
		"by primary group":                {Peer{UID: 1000, GID: 200}, Operator},
		"by supplementary group":          {Peer{UID: 1000, GID: 5, Groups: []uint32{6, 200}}, Operator},
		"the highest of several":          {Peer{UID: 1000, GID: 200, Groups: []uint32{300}}, Admin},
		"a group with two roles":          {Peer{UID: 1000, GID: 100}, Admin},
		"a group's number is not a uid's": {Peer{UID: 300, GID: 5}, NoRole},
	} {
		if got := roles.Of(c.peer); got != c.want {
			t.Errorf("%s: got %s; want %s", name, got, c.want)
		}
	}
	if got := (Roles{}).Of(Peer{UID: 1000}); got != NoRole {
		t.Errorf("without configuration a user has the role %s", got)
	}
}

func TestResolveRolesNamesTheGroup(t *testing.T) {
	_, err := ResolveRoles(0, nil, []string{"no-such-group"}, nil)
	if err == nil || !strings.Contains(err.Error(), `"no-such-group" of role operator`) {
		t.Errorf("got %v", err)
	}
}
