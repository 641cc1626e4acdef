package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmsnap/vmsnap/agent/discover"
)

// TestLaunchPath tells the links that the agent makes from those of others.
func TestLaunchPath(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, file := range []string{"images/real.qcow2", "overlays/real.1.qcow2"} {
		if err := os.MkdirAll(filepath.Dir(at(file)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at(file), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for link, to := range map[string]string{
		"relative": "images/real.qcow2", "absolute": at("images/real.qcow2"), "directory": "images",
		"ours": at("overlays/real.1.qcow2"), "to-ours": "ours", "loop": "loop", "nowhere": "missing",
	} {
		if err := os.Symlink(to, at(link)); err != nil {
			t.Fatal(err)
		}
	}
	active := at("overlays/real.1.qcow2")
	for launch, want := range map[string]string{
		"images/real.qcow2":    "images/real.qcow2",
		"directory/real.qcow2": "directory/real.qcow2",
		"relative":             "images/real.qcow2",
		"absolute":             "images/real.qcow2",
		"ours":                 "ours",
		"to-ours":              "ours",
		"loop":                 "",
		"nowhere":              "",
	} {
		d := &liveDisk{launch: discover.Drive{File: at(launch)}}
		got, err := launchPath(discover.Process{}, d, active)
		if want == "" {
			if err == nil {
				t.Errorf("%s: %s", launch, got)
			}
			continue
		}
		if err != nil || got != at(want) {
			t.Errorf("%s: %s, %v", launch, got, err)
		}
	}
	d := &liveDisk{path: at("ours")} // the agent has forgotten what it made
	if got, err := launchPath(discover.Process{}, d, ""); err != nil || got != active {
		t.Errorf("a link that is not known: %s, %v", got, err)
	}
}

// TestLaunchPathElsewhere follows no link of a QEMU that has a file system tree
// of its own, but for the one that the agent makes.
func TestLaunchPathElsewhere(t *testing.T) {
	root := t.TempDir()
	for link, to := range map[string]string{"ours": "/overlays/a.qcow2", "other": "/etc/passwd"} {
		if err := os.Symlink(to, filepath.Join(root, link)); err != nil {
			t.Fatal(err)
		}
	}
	p := discover.Process{Root: root}
	if got, err := launchPath(p, &liveDisk{path: "/ours"}, "/overlays/a.qcow2"); err != nil || got != "/ours" {
		t.Errorf("the agent's link: %s, %v", got, err)
	}
	if got, err := launchPath(p, &liveDisk{path: "/other"}, "/overlays/a.qcow2"); err == nil || !strings.Contains(err.Error(), "another mount namespace") {
		t.Errorf("another's link: %s, %v", got, err)
	}
}
