package testvm_test

import (
	"context"
	"errors"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// TestQEMUAdopt has a shell start the QEMU and end, so that it is nobody's child
// who could tell how it ends.
func TestQEMUAdopt(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g, err := testvm.Adopt(t.Context(), testvm.Config{QEMU: q, Dir: t.TempDir()}, startByShell)
		if err != nil {
			t.Fatal(err)
		}
		if out, err := g.Exec(soon(t), "echo here"); err != nil || out != "here\n" {
			t.Errorf("%q, %v", out, err)
		}
		if !g.Running() {
			t.Error("it does not run")
		}
		g.Kill()
		if g.Running() {
			t.Error("it runs after it was killed")
		}
		g.Kill() // which is harmless
	})
}

// TestQEMUAdoptNothing adopts what was not started.
func TestQEMUAdoptNothing(t *testing.T) {
	versions, err := testvm.Versions()
	if err != nil {
		t.Fatal(err)
	}
	failed := errors.New("no")
	c := testvm.Config{QEMU: versions[0], Dir: t.TempDir()}
	_, err = testvm.Adopt(t.Context(), c, func(context.Context, []string) (int, error) { return 0, failed })
	if !errors.Is(err, failed) {
		t.Errorf("%v, want %v", err, failed)
	}
}

func startByShell(ctx context.Context, args []string) (int, error) {
	script := `"$@" >/dev/null 2>&1 </dev/null & echo $!`
	out, err := exec.CommandContext(ctx, "sh", append([]string{"-c", script, "sh"}, args...)...).Output()
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(out)))
}
