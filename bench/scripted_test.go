package main

import (
	"bufio"
	"debug/elf"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
	"github.com/vmsnap/vmsnap/qga"
)

// TestIdleProgram runs it as QEMU: it must be found, and must last until it is
// killed.
func TestIdleProgram(t *testing.T) {
	path := filepath.Join(t.TempDir(), "qemu-system-x86_64")
	if err := os.WriteFile(path, idleProgram(), 0o700); err != nil {
		t.Fatal(err)
	}
	file, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
	parent := newParent()
	defer parent.end()
	cmd := exec.Command(path, "-name", "web", "-uuid", "00000000-0000-4000-8000-000000000001", "-qmp", "unix:/web.qmp,server=on,wait=off")
	if err := parent.start(cmd); err != nil {
		t.Fatal(err)
	}
	p, err := discover.Inspect(cmd.Process.Pid)
	if err != nil || p.Name != "web" || len(p.QMP) != 1 || p.QMP[0].Path != "/web.qmp" {
		t.Errorf("it is found as %+v, %v", p, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	var ended *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &ended) || ended.String() != "signal: killed" {
		t.Errorf("it has ended by %v", err)
	}
}

func TestWithoutID(t *testing.T) {
	id, rest, err := withoutID([]byte(`{"id": "a1", "execute": "x", "arguments": {"b": 1}}`))
	if err != nil || string(id) != `"a1"` {
		t.Errorf("the id is %s, %v", id, err)
	}
	_, same, err := withoutID([]byte(`{"execute":"x","arguments":{"b": 1},"id":7}` + "\r\n"))
	if err != nil || string(rest) != string(same) || string(rest) != `{"arguments":{"b":1},"execute":"x"}`+"\n" {
		t.Errorf("one command is %q and %q, %v", rest, same, err)
	}
	if _, _, err := withoutID([]byte("none")); err == nil {
		t.Error("what is no command has no id, and no error")
	}
}

// TestScriptedQEMU compares what a scripted VM says with what its model does.
func TestScriptedQEMU(t *testing.T) {
	testvm.OnOneQEMU(t, func(t *testing.T, q testvm.QEMU) {
		s, err := newScripted(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := s.end(); err != nil {
				t.Error(err)
			}
		}()
		if err := s.grow(t.Context(), 2); err != nil {
			t.Fatal(err)
		}
		second := s.members[1]
		for range 2 { // one client after the other
			session, err := monitor.Dial(t.Context(), s.file(second, "qmp"))
			if err != nil {
				t.Fatal(err)
			}
			if id, err := session.QueryUUID(t.Context()); err != nil || id != second.uuid {
				t.Errorf("its UUID is %s, %v", id, err)
			}
			if name, err := session.QueryName(t.Context()); err != nil || name != second.name {
				t.Errorf("its name is %s, %v", name, err)
			}
			if status, err := session.QueryStatus(t.Context()); err != nil || !status.Running || status.Status != monitor.RunStateRunning {
				t.Errorf("its guest is %+v, %v", status, err)
			}
			blocks := json.RawMessage{}
			if err := session.Execute(t.Context(), "query-block", nil, &blocks); err != nil {
				t.Error(err)
			}
			if text := string(blocks); !strings.Contains(text, s.file(second, "qcow2")) || strings.Contains(text, s.model.member.name) {
				t.Errorf("its disks are %s", text)
			}
			var refused *monitor.CommandError
			if err := session.Execute(t.Context(), "no-such", nil, nil); !errors.As(err, &refused) || refused.Class != "CommandNotFound" {
				t.Errorf("a command that is not there: %v", err)
			}
			devs, err := session.QueryChardev(t.Context())
			if err != nil || len(devs) == 0 {
				t.Errorf("its character devices are %v, %v", devs, err)
			}
			for _, d := range devs {
				if d.Label == "agent" && !d.FrontendOpen {
					t.Error("its guest has no guest agent")
				}
			}
			if err := session.Close(); err != nil {
				t.Error(err)
			}
		}
		agent, err := qga.Dial(t.Context(), s.file(second, "agent"), qga.DefaultLimits)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(agent.Ping(t.Context()), agent.Close()); err != nil {
			t.Error(err)
		}
	})
}

func TestAgentReply(t *testing.T) {
	for line, want := range map[string]string{
		"\xff" + `{"execute": "guest-sync-delimited", "arguments": {"id": 7}}`: "\xff" + `{"return": 7}` + "\n",
		`{"execute": "guest-fsfreeze-status"}`:                                 `{"return": "thawed"}` + "\n",
		`{"execute": "guest-exec"}`:                                            `{"error": {"class": "CommandNotFound", "desc": "The command guest-exec has not been found"}}` + "\n",
		`{`:                                                                    `{"error": {"class": "GenericError", "desc": "JSON parse error"}}` + "\n",
	} {
		if diff := cmp.Diff(want, string(agentReply([]byte(line)))); diff != "" {
			t.Errorf("%q (-want +got):\n%s", line, diff)
		}
	}
}

// TestServerEnds closes a server whose client stays.
func TestServerEnds(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	s, err := listen(path, speakAgent)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := conn.Write([]byte(`{"execute": "guest-ping"}` + "\n")); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(conn)
	if line, err := lines.ReadString('\n'); err != nil || line != `{"return": {}}`+"\n" {
		t.Errorf("it says %q, %v", line, err)
	}
	s.close()
	if _, err := lines.ReadByte(); !errors.Is(err, io.EOF) {
		t.Errorf("the connection is still there: %v", err)
	}
}
