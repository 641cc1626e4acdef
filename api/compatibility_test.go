// Package api_test holds the API against the one that clients know.
package api_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// rules are buf's: what generated code, JSON and the wire take for granted.
const rules = `{"version":"v1","breaking":{"use":["PACKAGE","WIRE_JSON"]}}`

// breaking returns what a change of the API breaks for those who know the
// baseline; baseline is renewed with each release.
func breaking(t *testing.T, dir string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "tool", "-modfile=../tools/buf/go.mod", "buf", "breaking", dir, "--against", "baseline", "--config", rules)
	var said strings.Builder // the go command's downloads among it
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil && cmd.ProcessState.ExitCode() != 100 { // 100: something is broken
		t.Fatalf("buf: %v\n%s%s", err, &said, out)
	}
	return string(out)
}

// copyAPI copies the API into a directory of its own, without the baseline.
func copyAPI(t *testing.T, change func(file, text string) string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	files, err := filepath.Glob("vmsnap/v1/*.proto")
	if err != nil || len(files) == 0 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		to := filepath.Join(dir, file)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(to, []byte(change(file, string(text))), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestNothingIsBroken(t *testing.T) {
	if out := breaking(t, copyAPI(t, func(_, text string) string { return text })); out != "" {
		t.Errorf("clients that know the API of before are broken:\n%s", out)
	}
}

// TestWhatIsBrokenIsFound takes a field away.
func TestWhatIsBrokenIsFound(t *testing.T) {
	out := breaking(t, copyAPI(t, func(_, text string) string { return strings.ReplaceAll(text, "  bool deep = 2;\n", "") }))
	if !strings.Contains(out, `field "2" with name "deep" on message "DiagnoseVMRequest" was deleted`) {
		t.Errorf("it is not found: %s", out)
	}
}
