package rpc

import (
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"testing"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/op"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// declaredKinds reads the fault kinds from their source, so that a new one
// cannot be forgotten here.
func declaredKinds(t *testing.T) []string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "../fault/fault.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	ast.Inspect(file, func(n ast.Node) bool {
		if spec, ok := n.(*ast.ValueSpec); ok {
			if typ, ok := spec.Type.(*ast.Ident); ok && typ.Name == "Kind" {
				names = append(names, spec.Names[0].Name)
			}
		}
		return true
	})
	return names
}

func TestEveryKindHasAForm(t *testing.T) {
	if got, want := len(wire), len(declaredKinds(t)); got != want {
		t.Errorf("the table has %d kinds; %d are declared", got, want)
	}
	codes := map[vmsnapv1.ErrorCode]fault.Kind{}
	for kind, f := range wire {
		if other, taken := codes[f.code]; taken {
			t.Errorf("%s and %s have the code %s", kind, other, f.code)
		}
		codes[f.code] = kind
		if f.code == vmsnapv1.ErrorCode_ERROR_CODE_UNSPECIFIED || f.connect == 0 {
			t.Errorf("%s has no code", kind)
		}
	}
	// Each code of the API comes from a kind, but for the one that tells of
	// having no daemon at all.
	for number, name := range vmsnapv1.ErrorCode_name {
		code := vmsnapv1.ErrorCode(number)
		if _, ok := codes[code]; !ok && code != 0 && code != vmsnapv1.ErrorCode_ERROR_CODE_UNREACHABLE {
			t.Errorf("no kind has the code %s", name)
		}
	}
}

func TestWireError(t *testing.T) {
	busy := fault.New(fault.Busy, "%w", &op.BusyError{VM: "web", Operation: "0badcafe"}).WithHint("wait")
	for name, c := range map[string]struct {
		err  error
		code connect.Code
		want *vmsnapv1.Error
	}{
		"kind": {
			fault.New(fault.NoSpace, "disk root: no space in /srv").WithHint("free some"), connect.CodeResourceExhausted,
			&vmsnapv1.Error{Code: vmsnapv1.ErrorCode_ERROR_CODE_NO_SPACE, Message: "disk root: no space in /srv", Hint: "free some"},
		},
		"busy, with context": {
			fmt.Errorf("freeze web: %w", busy), connect.CodeAborted,
			&vmsnapv1.Error{
				Code:    vmsnapv1.ErrorCode_ERROR_CODE_BUSY,
				Message: `freeze web: VM "web" is busy with operation 0badcafe`, Hint: "wait", OperationId: "0badcafe",
			},
		},
		"no kind": {
			errors.New("disk I/O error"), connect.CodeInternal,
			&vmsnapv1.Error{Code: vmsnapv1.ErrorCode_ERROR_CODE_FAILED, Message: "disk I/O error"},
		},
		"unknown kind": {
			fault.New("novel", "x"), connect.CodeInternal,
			&vmsnapv1.Error{Code: vmsnapv1.ErrorCode_ERROR_CODE_FAILED, Message: "x"},
		},
		"cancelled context": {
			fmt.Errorf("ask QEMU: %w", context.Canceled), connect.CodeCanceled,
			&vmsnapv1.Error{Code: vmsnapv1.ErrorCode_ERROR_CODE_CANCELLED, Message: "ask QEMU: context canceled"},
		},
		"deadline": {
			fmt.Errorf("ask QEMU: %w", context.DeadlineExceeded), connect.CodeDeadlineExceeded,
			&vmsnapv1.Error{Code: vmsnapv1.ErrorCode_ERROR_CODE_UNRESPONSIVE, Message: "ask QEMU: context deadline exceeded"},
		},
		"bytes that are not UTF-8": {
			fault.New(fault.NotFound, "no file \xff"), connect.CodeNotFound,
			&vmsnapv1.Error{Code: vmsnapv1.ErrorCode_ERROR_CODE_NOT_FOUND, Message: "no file \uFFFD"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			err := wireError(c.err)
			if got := connect.CodeOf(err); got != c.code {
				t.Errorf("the code is %s; want %s", got, c.code)
			}
			if diff := cmp.Diff(c.want, onlyDetail(t, err), protocmp.Transform()); diff != "" {
				t.Errorf("detail (-want +got):\n%s", diff)
			}
			if again := wireError(err); again != err {
				t.Errorf("its form changed: %v", again)
			}
		})
	}
}

func onlyDetail(t *testing.T, err error) *vmsnapv1.Error {
	t.Helper()
	call, ok := errors.AsType[*connect.Error](err)
	if !ok || len(call.Details()) != 1 {
		t.Fatalf("%v has not one detail", err)
	}
	value, err := call.Details()[0].Value()
	if err != nil {
		t.Fatal(err)
	}
	return value.(*vmsnapv1.Error)
}
