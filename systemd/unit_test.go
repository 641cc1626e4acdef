package systemd

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// install puts a unit and its drop-ins into a tree.
func install(t *testing.T, unit string, dropIns ...string) (root string) {
	t.Helper()
	root = t.TempDir()
	dir := filepath.Join(root, "etc/systemd/system")
	put := func(from, to string) {
		t.Helper()
		data, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(to, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	put(unit, filepath.Join(dir, unit))
	for _, d := range dropIns {
		put(d, filepath.Join(dir, unit+".d", d))
	}
	return root
}

var overall = regexp.MustCompile(`Overall exposure level for .*: ([0-9.]+) `)

// exposure is how much a service could do, from 0 to 10, as systemd judges it.
func exposure(t *testing.T, root, unit string) (float64, string) {
	t.Helper()
	out, err := exec.Command("systemd-analyze", "security", "--no-pager", "--offline=true", "--root="+root, unit).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	m := overall.FindSubmatch(out)
	if m == nil {
		t.Fatalf("no exposure in\n%s", out)
	}
	level, err := strconv.ParseFloat(string(m[1]), 64)
	if err != nil {
		t.Fatal(err)
	}
	return level, string(out)
}

func TestExposure(t *testing.T) {
	for name, test := range map[string]struct {
		dropIns []string
		most    float64
	}{
		"default":              {nil, 2.6},
		"without capabilities": {[]string{"unprivileged.conf"}, 1.8},
	} {
		t.Run(name, func(t *testing.T) {
			if level, report := exposure(t, install(t, "vmsnapd.service", test.dropIns...), "vmsnapd.service"); level > test.most {
				t.Errorf("exposed by %.1f, allowed are %.1f:\n%s", level, test.most, report)
			}
		})
	}
}

// TestExposureIsMeasured proves that the measure moves: a unit that protects
// nothing is far above.
func TestExposureIsMeasured(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "etc/systemd/system")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "bare.service"), []byte("[Service]\nExecStart=/bin/true\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if level, _ := exposure(t, root, "bare.service"); level < 9 {
		t.Errorf("a unit that protects nothing is exposed by %.1f only", level)
	}
}

// TestCapabilitiesAreExplained has each capability said why, and no other one
// held.
func TestCapabilitiesAreExplained(t *testing.T) {
	data, err := os.ReadFile("vmsnapd.service")
	if err != nil {
		t.Fatal(err)
	}
	held := map[string]string{}
	explained := map[string]bool{}
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSpace(line)
		if f := strings.Fields(line); len(f) > 2 && f[0] == "#" && strings.HasPrefix(f[1], "CAP_") {
			explained[f[1]] = true
		}
		if name, value, ok := strings.Cut(line, "="); ok && strings.HasSuffix(name, "Capabilities") || name == "CapabilityBoundingSet" {
			held[name] = value
		}
	}
	if held["AmbientCapabilities"] != held["CapabilityBoundingSet"] || held["AmbientCapabilities"] == "" {
		t.Errorf("held %q, bounded by %q", held["AmbientCapabilities"], held["CapabilityBoundingSet"])
	}
	for _, c := range strings.Fields(held["AmbientCapabilities"]) {
		if !explained[c] {
			t.Errorf("nothing says what %s is for", c)
		}
		delete(explained, c)
	}
	for c := range explained {
		t.Errorf("%s is explained, and not held", c)
	}
}

// TestUnitsParse has systemd read the units. The programs are not installed
// here, so that is all it may complain about.
func TestUnitsParse(t *testing.T) {
	dir := t.TempDir()
	for _, unit := range []string{"vmsnapd.service", "vmsnapd.socket"} {
		data, err := os.ReadFile(unit)
		if err != nil {
			t.Fatal(err)
		}
		text := strings.ReplaceAll(string(data), "/usr/bin/vmsnapd", "/bin/true")
		if err := os.WriteFile(filepath.Join(dir, unit), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", "vmsnapd.service", "vmsnapd.socket")
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("%v\n%s", err, out)
	}
}
