package main

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/vmsnap/vmsnap/agent/rpc"
	"github.com/vmsnap/vmsnap/agent/rpc/rpctest"
)

var update = flag.Bool("update", false, "write the golden files instead of comparing with them")

// output is what a command did.
type output struct {
	stdout, stderr string
	code           int
}

// command runs the command in this process against a socket.
func command(t *testing.T, socket string, args ...string) output {
	t.Helper()
	t.Setenv(socketVariable, socket)
	var stdout, stderr bytes.Buffer
	code := run(args, strings.NewReader(""), &stdout, &stderr, func() time.Time { return rpctest.Now })
	return output{stdout.String(), stderr.String(), code}
}

// serve serves a backend to root, which tests run as, or to this user.
func serve(t *testing.T, b *rpctest.Backend) string {
	t.Helper()
	roles, err := rpc.ResolveRoles(uint32(os.Getuid()), nil, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return rpctest.Serve(t, b, rpc.Options{Roles: roles, Version: "1.2.3"})
}

// golden compares a command's whole output with its file.
func golden(t *testing.T, name, socket string, args []string, got output) {
	t.Helper()
	text := fmt.Sprintf("$ vmsnap %s\n", strings.Join(args, " ")) + section("stdout", got.stdout) +
		section("stderr", got.stderr) + fmt.Sprintf("--- exit %d\n", got.code)
	if socket != "" {
		text = strings.ReplaceAll(text, socket, "$SOCKET")
	}
	file := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), text); diff != "" {
		t.Errorf("%s (-want +got):\n%s", file, diff)
	}
}

func section(name, text string) string {
	if text == "" {
		return ""
	}
	return "--- " + name + "\n" + text
}
