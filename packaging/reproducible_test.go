package packaging

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestBuildsAreEqual builds a program twice from the same source, in directories,
// time zones and languages of their own: the two are the same, byte by byte.
func TestBuildsAreEqual(t *testing.T) {
	build := func(dir string, env ...string) []byte {
		t.Helper()
		if err := copySource("..", dir); err != nil {
			t.Fatal(err)
		}
		program := filepath.Join(t.TempDir(), "vmsnap")
		cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -X main.version=1.2.3", "-o", program, "./cmd/vmsnap")
		cmd.Dir, cmd.Env = dir, append(append(os.Environ(), "CGO_ENABLED=0"), env...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build: %v\n%s", err, out)
		}
		b, err := os.ReadFile(program)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	here := filepath.Join(t.TempDir(), "one")
	one, two := build(here, "TZ=Asia/Tokyo", "LC_ALL=C"), build(filepath.Join(t.TempDir(), "another", "place"), "TZ=UTC", "LC_ALL=C.UTF-8", "GOMAXPROCS=1", "USER=nobody")
	if !bytes.Equal(one, two) {
		t.Errorf("two builds of the same source have %d and %d bytes, and differ", len(one), len(two))
	}
	if bytes.Contains(one, []byte(here)) {
		t.Errorf("the program names the directory that it was built in, %s", here)
	}
}

// copySource copies what a build reads.
func copySource(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rest, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		switch {
		case rest != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "bin" || d.Name() == "dist"):
			if d.IsDir() {
				return filepath.SkipDir
			}
			return nil
		case d.IsDir():
			return os.MkdirAll(filepath.Join(to, rest), 0o755)
		case !d.Type().IsRegular():
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, rest), data, 0o644)
	})
}
