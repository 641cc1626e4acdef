package discover

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestHostPath(t *testing.T) {
	root := t.TempDir()
	for _, dir := range []string{"run/vm", "var"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for link, target := range map[string]string{
		"var/run": "/run", "var/rel": "../run", "loop": "/loop", "escape": "../../../../etc", "var/last": "/run/vm/none",
	} {
		if err := os.Symlink(target, filepath.Join(root, link)); err != nil {
			t.Fatal(err)
		}
	}
	p := Process{PID: 1, Root: root}
	tests := map[string]string{
		"/run/vm/qmp":       "/run/vm/qmp",
		"/var/run/vm/qmp":   "/run/vm/qmp",
		"/var/rel/vm/../vm": "/run/vm",
		"/escape/passwd":    "/etc/passwd",
		"/../../etc":        "/etc",
		"/var/last":         "/run/vm/none",
		"/absent/x":         "/absent/x",
		"/":                 "/",
	}
	for path, want := range tests {
		got, err := p.HostPath(path)
		if err != nil || got != filepath.Join(root, want) {
			t.Errorf("%s: %q, %v, want %q below the root", path, got, err, want)
		}
	}
	if got, err := p.HostPath("/loop/x"); err == nil {
		t.Errorf("a loop of links: %q", got)
	}
	if _, err := p.HostPath("qmp"); !errors.Is(err, ErrRelativePath) {
		t.Errorf("a relative path: %v", err)
	}
	if got, err := (Process{}).HostPath("/var/run/x"); err != nil || got != "/var/run/x" {
		t.Errorf("without a root of its own: %q, %v", got, err)
	}
}

func TestAddress(t *testing.T) {
	tests := []struct {
		socket Socket
		want   string
	}{
		{Socket{Path: "/run/x"}, "/run/x"},
		{Socket{Path: "x", Abstract: true}, "@x"},
		{Socket{Path: "x", Abstract: true, Loose: true}, "@x" + strings.Repeat("\x00", 106)},
	}
	for _, tt := range tests {
		if got, err := (Process{}).Address(tt.socket); err != nil || got != tt.want {
			t.Errorf("%+v: %q, %v, want %q", tt.socket, got, err, tt.want)
		}
	}
}
