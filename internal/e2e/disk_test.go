package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// snapshotDisk is a disk of a snapshot as the command line shows it.
type snapshotDisk struct {
	Device   string `json:"device"`
	Path     string `json:"path"`
	Format   string `json:"format"`
	Excluded bool   `json:"excluded"`
}

// shown is a snapshot as the command line shows it.
type shown struct {
	ID          string `json:"id"`
	Name        string `json:"name"`
	Consistency string `json:"consistency"`
	Partial     bool   `json:"partial"`
	Quiesce     struct {
		Reason       string `json:"reason"`
		Frozen       int    `json:"frozen"`
		Total        int    `json:"total"`
		FreezeWindow string `json:"freeze_window"`
	} `json:"quiesce"`
	Warnings []struct {
		Code string `json:"code"`
		Disk string `json:"disk"`
	} `json:"warnings"`
	Disks []snapshotDisk `json:"disks"`
}

// snapshot shows a snapshot.
func (h *host) snapshot(ref string) shown {
	h.t.Helper()
	var s shown
	if err := json.Unmarshal([]byte(h.must("snapshot", "show", ref, "-o", "json")), &s); err != nil {
		h.t.Fatal(err)
	}
	return s
}

// raw copies a layer, with all below it, into a raw image of the test's own.
func raw(t *testing.T, q testvm.QEMU, d snapshotDisk) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), d.Device+".raw")
	img(t, q, "convert", "-U", "-f", d.Format, "-O", "raw", d.Path, out)
	return out
}

// img runs the guest's own qemu-img.
func img(t *testing.T, q testvm.QEMU, args ...string) string {
	t.Helper()
	out, err := exec.Command(q.Img, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("qemu-img %v: %v\n%s", args, err, out)
	}
	return string(out)
}

// checkImage verifies a qcow2's own structures.
func checkImage(t *testing.T, q testvm.QEMU, path string) {
	t.Helper()
	if strings.HasSuffix(path, ".qcow2") {
		img(t, q, "check", "-q", "-U", "-f", "qcow2", path)
	}
}

// clean verifies that an ext4 needs no journal recovery and has no fault.
func clean(t *testing.T, image string) {
	t.Helper()
	head, err := exec.Command("dumpe2fs", "-h", image).CombinedOutput()
	if err != nil {
		t.Fatalf("dumpe2fs: %v\n%s", err, head)
	}
	if strings.Contains(string(head), "needs_recovery") {
		t.Errorf("%s needs journal recovery", filepath.Base(image))
	}
	if out, err := exec.Command("e2fsck", "-fn", image).CombinedOutput(); err != nil {
		t.Errorf("e2fsck -fn %s: %v\n%s", filepath.Base(image), err, out)
	}
}

// recovered replays the journal of a crash-consistent ext4 and verifies it.
func recovered(t *testing.T, image string) {
	t.Helper()
	if out, err := exec.Command("e2fsck", "-fy", image).CombinedOutput(); err != nil {
		if exit := new(exec.ExitError); !asExit(err, &exit) || exit.ExitCode() > 1 {
			t.Fatalf("e2fsck -fy %s: %v\n%s", filepath.Base(image), err, out)
		}
	}
}

func asExit(err error, target **exec.ExitError) bool {
	e, ok := err.(*exec.ExitError)
	if ok {
		*target = e
	}
	return ok
}

// inImage returns a file's content in an ext4 image, "" when it is not there.
func inImage(t *testing.T, image, file string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "out")
	if b, err := exec.Command("debugfs", "-R", fmt.Sprintf("dump /%s %s", file, out), image).CombinedOutput(); err != nil {
		t.Fatalf("debugfs: %v\n%s", err, b)
	}
	b, err := os.ReadFile(out)
	if os.IsNotExist(err) {
		return ""
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// files lists a directory, so that a test sees whether something was left.
func files(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".qcow2") || strings.HasSuffix(e.Name(), ".raw") || strings.HasPrefix(e.Name(), ".vmsnap") {
			names = append(names, e.Name())
		}
	}
	return names
}
