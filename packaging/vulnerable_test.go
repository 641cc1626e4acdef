package packaging

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// vulnerable is the entry of a database of vulnerabilities in which functions of
// a package have one, in all versions.
func vulnerable(id, module, pkg string, functions ...string) map[string]any {
	return map[string]any{
		"schema_version": "1.3.1", "id": id, "modified": "2026-01-01T00:00:00Z", "published": "2026-01-01T00:00:00Z",
		"summary": "made up for a test", "details": "made up for a test",
		"affected": []any{map[string]any{
			"package":            map[string]any{"name": module, "ecosystem": "Go"},
			"ranges":             []any{map[string]any{"type": "SEMVER", "events": []any{map[string]any{"introduced": "0"}}}},
			"ecosystem_specific": map[string]any{"imports": []any{map[string]any{"path": pkg, "symbols": functions}}},
		}},
	}
}

// vulnerabilities writes a database, in the layout that govulncheck reads.
func vulnerabilities(t *testing.T, module string, entries ...map[string]any) (dir string) {
	t.Helper()
	dir = t.TempDir()
	write := func(name string, v any) {
		t.Helper()
		text, err := json.Marshal(v)
		path := filepath.Join(dir, name)
		if err := errors.Join(err, os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, text, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	var of []any
	for _, e := range entries {
		of = append(of, map[string]any{"id": e["id"], "modified": e["modified"]})
		write("ID/"+e["id"].(string)+".json", e)
	}
	write("index/db.json", map[string]any{"modified": "2026-01-01T00:00:00Z"})
	write("index/modules.json", []any{map[string]any{"path": module, "vulns": of}})
	return dir
}

// TestVulnerabilitiesAreTold has the check for known vulnerabilities read a database
// of a function that the programs have and of one that the linker has left out: it tells the one from
// the other.
func TestVulnerabilitiesAreTold(t *testing.T) {
	const module, pkg, linked, left = "google.golang.org/protobuf", "google.golang.org/protobuf/proto", "GO-2026-0001", "GO-2026-0002"
	db := vulnerabilities(t, module, vulnerable(linked, module, pkg, "Marshal"), vulnerable(left, module, pkg, "RangeExtensions"))
	cmd := exec.CommandContext(t.Context(), "make", "--no-print-directory", "vuln", "VULNDB=file://"+db)
	cmd.Dir = ".."
	out, err := cmd.CombinedOutput()
	if text := string(out); err == nil || !strings.Contains(text, "#1: "+linked) || strings.Contains(text, "#2: ") {
		t.Errorf("%v\n%s", err, text)
	}
}
