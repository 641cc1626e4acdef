package discover

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func TestLoadOverrides(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		t.Helper()
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	b := write("b.yaml", "match: {command-line: disk=b}\nignore: true\n")
	a := write("a.yaml", `# two VMs
match:
  name: web
  uuid: 7F3A2B10-5C1D-4E8F-9A6B-112233445566
  pid-file: /run/web.pid
name: web-1
qmp: [/run/web/qmp.sock, "@web"]
guest-agent: /run/web/qga.sock
unit: qemu@web.service
overlay-dir: /srv/overlays
disks:
  data: {overlay-dir: /srv/big/}
---
match: {name: db}
qmp: /run/db.sock
---
`)
	write("notes.txt", "not: [yaml")
	got, err := LoadOverrides(dir)
	if err != nil {
		t.Fatal(err)
	}
	want := []Override{
		{File: a, Line: 2, Match: Match{Name: "web", UUID: "7f3a2b10-5c1d-4e8f-9a6b-112233445566", PIDFile: "/run/web.pid"},
			Name: "web-1", QMP: []string{"/run/web/qmp.sock", "@web"}, GuestAgent: "/run/web/qga.sock",
			Unit: "qemu@web.service", OverlayDir: "/srv/overlays", Disks: map[string]string{"data": "/srv/big"}},
		{File: a, Line: 14, Match: Match{Name: "db"}, QMP: []string{"/run/db.sock"}},
		{File: b, Line: 1, Match: Match{CommandLine: "disk=b"}, Ignore: true},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if got, err := LoadOverrides(filepath.Join(dir, "absent")); got != nil || err != nil {
		t.Errorf("absent directory: %v, %v", got, err)
	}
	if _, err := LoadOverrides(a); err == nil {
		t.Error("a file for a directory: no error")
	}
}

func TestOverrideMistakes(t *testing.T) {
	tests := []struct{ text, want string }{
		{"match: {name: a}\nqpm: /x\n", "f:2: qpm: unknown setting"},
		{"match:\n  nick: a\n", "f:2: match.nick: unknown setting"},
		{"match: {name: a}\nname: b\nname: c\n", "f:3: name: given twice"},
		{"match: {name: a}\nqmp: [rel]\n", "f:2: qmp: must be an absolute path"},
		{"match: {name: a}\nqmp: {a: b}\n", "f:2: qmp: must be a path or a list of paths"},
		{"match: {name: a}\nqmp: []\n", "f:2: qmp: must be a path or a list of paths"},
		{"match: {name: a}\nqmp:\n", "f:2: qmp: must be an absolute path"},
		{"match: {name: a}\nguest-agent: '@'\n", "f:2: guest-agent: must be an absolute path"},
		{"match: {name: a}\nignore: perhaps\n", "f:2: ignore: must be true or false"},
		{"match: {name: a}\nname:\n", "f:2: name: must be a text"},
		{"match: {name: a}\noverlay-dir: rel\n", "f:2: overlay-dir: must be an absolute path"},
		{"match: {name: a}\ndisks: [data]\n", "f:2: disks: must be disks with settings"},
		{"match: {name: a}\ndisks:\n  data: /srv\n", "f:3: disks.data: must be settings with values"},
		{"match: {name: a}\ndisks:\n  data: {overlay-dir: rel}\n", "f:3: disks.data.overlay-dir: must be an absolute path"},
		{"match: {name: a}\ndisks:\n  data: {x: y}\n", "f:3: disks.data.x: unknown setting"},
		{"match: {name: a}\ndisks:\n  data: {overlay-dir: /a}\n  data: {overlay-dir: /b}\n", "f:4: disks.data: given twice"},
		{"match: {uuid: 12}\n", "f:1: match.uuid: must be a UUID"},
		{"name: a\n", "f:1: match: missing: name the VM by name, uuid, pid-file or command-line"},
		{"match: {}\n", "f:1: match: missing: name the VM by name, uuid, pid-file or command-line"},
		{"match: a\n", "f:1: match: must be settings with values"},
		{"- a\n", "f:1: must be settings with values"},
		{"match: {name: a}\nbad: [\n", "f: yaml: "},
		{"match: {name: a}\nx: 1\ny: 2\n", "f:2: x: unknown setting\nf:3: y: unknown setting"},
	}
	for _, tt := range tests {
		_, err := parseOverrides("f", []byte(tt.text))
		if err == nil || !strings.HasPrefix(err.Error(), tt.want) {
			t.Errorf("%q: %v, want %s", tt.text, err, tt.want)
			continue
		}
		var setting *SettingError
		if !errors.As(err, &setting) {
			t.Errorf("%q: %T is no SettingError", tt.text, err)
		}
	}
}

func TestApply(t *testing.T) {
	pidFile := filepath.Join(t.TempDir(), "pid")
	if err := os.WriteFile(pidFile, []byte(strconv.Itoa(42)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	found := Process{
		PID: 42, Name: "web", UUID: "7f3a2b10-5c1d-4e8f-9a6b-112233445566", PIDFile: "/run/web.pid",
		Args: []string{"qemu", "-drive", "file=/web.img"}, QMP: []Socket{{Path: "/found"}},
	}
	matches := map[Match]bool{
		{}:            false,
		{Name: "web"}: true, {Name: "we"}: false,
		{UUID: "7F3A2B10-5C1D-4E8F-9A6B-112233445566"}: true,
		{PIDFile: pidFile}:                       true,
		{PIDFile: "/run/web.pid"}:                true,
		{PIDFile: "/absent"}:                     false,
		{CommandLine: "-drive file=/web"}:        true,
		{Name: "web", CommandLine: "other"}:      false,
		{Name: "web", PIDFile: pidFile + "gone"}: false,
	}
	for m, want := range matches {
		if got := m.Fits(found); got != want {
			t.Errorf("%+v: %v, want %v", m, got, want)
		}
	}
	overrides := []Override{
		{File: "a", Match: Match{Name: "web"}, Name: "web-1", QMP: []string{"/a", "@b"}, Unit: "u.service",
			OverlayDir: "/first", Disks: map[string]string{"data": "/big", "root": "/fast"}},
		{File: "b", Match: Match{Name: "web-1"}, Name: "never"},
		{File: "c", Match: Match{Name: "web"}, GuestAgent: "/qga", Unit: "v.service",
			OverlayDir: "/second", Disks: map[string]string{"data": "/bigger"}},
	}
	got, manage := Apply(overrides, found)
	want := found
	want.Name, want.QMP = "web-1", []Socket{{Path: "/a"}, {Path: "b", Abstract: true}}
	want.GuestAgent = Socket{Path: "/qga"}
	want.OverlayDir, want.OverlayDirs = "/second", map[string]string{"data": "/bigger", "root": "/fast"}
	want.Cgroup.Unit, want.Overrides = "v.service", []string{"a", "c"}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Process{})); diff != "" || !manage {
		t.Errorf("managed: %v, %s", manage, diff)
	}
	if found.QMP[0].Path != "/found" {
		t.Error("the process that was given has changed")
	}
	if first := overrides[0].Disks["data"]; first != "/big" {
		t.Errorf("an override has changed: %s", first)
	}
	if _, manage := Apply([]Override{{Match: Match{Name: "web"}, Ignore: true}, {Match: Match{Name: "web"}}}, found); manage {
		t.Error("an ignored VM is managed")
	}
}

func FuzzParseOverrides(f *testing.F) {
	f.Add([]byte("match: {name: a}\nqmp: [/x, '@y']\n---\nmatch: &a {uuid: x}\nname: *a\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		overrides, err := parseOverrides("f", data)
		for _, o := range overrides {
			if err == nil && o.Match == (Match{}) {
				t.Errorf("%+v matches nothing and was accepted", o)
			}
		}
	})
}
