package packaging

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// The versions that are built: the second upgrades the first.
const (
	version1 = "0.0.1"
	version2 = "0.0.2"
)

var (
	dist  string // where the packages are, in a directory for each version
	built = sync.OnceValue(func() error {
		for _, version := range []string{version1, version2} {
			cmd := exec.Command("../hack/packages.sh", filepath.Join(dist, version), version)
			if out, err := cmd.CombinedOutput(); err != nil {
				return fmt.Errorf("packages.sh %s: %w\n%s", version, err, out)
			}
		}
		return nil
	})
)

func TestMain(m *testing.M) {
	os.Exit(func() int {
		var err error
		if dist, err = os.MkdirTemp("", "vmsnap-dist-"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer func() { _ = os.RemoveAll(dist) }()
		return m.Run()
	}())
}

// packages builds the packages, once.
func packages(t *testing.T) string {
	t.Helper()
	if err := built(); err != nil {
		t.Fatal(err)
	}
	return dist
}

func rpmFile(t *testing.T, version string) string {
	t.Helper()
	return filepath.Join(packages(t), version, "vmsnap-"+version+"-1.x86_64.rpm")
}
