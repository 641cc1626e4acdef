package hook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// put makes a hook of the phase pre-freeze.
func put(t *testing.T, dir, name, script string) {
	t.Helper()
	path := filepath.Join(dir, string(PreFreeze), name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
}

// one returns the only hook.
func one(t *testing.T, script string) Hook {
	t.Helper()
	dir := t.TempDir()
	put(t, dir, "10-x", script)
	hooks, err := List(dir, PreFreeze)
	if err != nil || len(hooks) != 1 {
		t.Fatalf("%v, %v", hooks, err)
	}
	return hooks[0]
}

func TestListIsInOrderAndOnlyOfHooks(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"20-b", "10-a", "10-a.dpkg-old", "x", "30-c~", "README", "40-d"} {
		put(t, dir, name, "")
	}
	if err := os.Chmod(filepath.Join(dir, "pre-freeze/40-d"), 0o644); err != nil {
		t.Fatal(err)
	}
	hooks, err := List(dir, PreFreeze)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, h := range hooks {
		got = append(got, h.String())
	}
	if d := cmp.Diff([]string{"pre-freeze/10-a", "pre-freeze/20-b"}, got); d != "" {
		t.Error(d)
	}
	if hooks, err := List(dir, PostThaw); err != nil || len(hooks) > 0 {
		t.Errorf("a phase without a directory: %v, %v", hooks, err)
	}
}

func TestListRefusesWhatOthersMayChange(t *testing.T) {
	for name, spoil := range map[string]func(dir, file string) error{
		"writable hook":      func(_, f string) error { return os.Chmod(f, 0o775) },
		"world-writable":     func(_, f string) error { return os.Chmod(f, 0o757) },
		"another's hook":     func(_, f string) error { return os.Chown(f, 12345, 0) },
		"writable phase":     func(_, f string) error { return os.Chmod(filepath.Dir(f), 0o775) },
		"another's phase":    func(_, f string) error { return os.Chown(filepath.Dir(f), 12345, 0) },
		"writable directory": func(d, _ string) error { return os.Chmod(d, 0o777) },
		"above it":           func(d, _ string) error { return os.Chown(filepath.Dir(d), 12345, 0) },
		"link": func(_, f string) error {
			return errors.Join(os.Rename(f, f+".sh"), os.Symlink(f+".sh", f))
		},
		"directory": func(_, f string) error { return errors.Join(os.Remove(f), os.Mkdir(f, 0o755)) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "hooks.d")
			put(t, dir, "10-x", "")
			if hooks, err := List(dir, PreFreeze); err != nil || len(hooks) != 1 {
				t.Fatalf("before: %v, %v", hooks, err)
			}
			if err := spoil(dir, filepath.Join(dir, "pre-freeze/10-x")); err != nil {
				t.Fatal(err)
			}
			hooks, err := List(dir, PreFreeze)
			if _, untrusted := errors.AsType[*UntrustedError](err); !untrusted || len(hooks) > 0 {
				t.Errorf("%v, %v", hooks, err)
			}
		})
	}
}

func TestRunTellsTheHookAndKeepsItsOutput(t *testing.T) {
	t.Setenv("SECRET", "of the daemon")
	h := one(t, `cat; env | sort >&2; pwd; exit 3`)
	in := Input{
		Phase: PreFreeze, Operation: Operation{ID: "c0ffee01", Kind: "snapshot", UID: 7},
		VM: &VM{ID: "1", Name: "a\nb", UUID: "u"}, Snapshot: &Snapshot{Name: "n", Quiesce: "prefer"},
		Failure: &Failure{Kind: "failed", Message: "words of\nthe guest"},
	}
	stdin, err := in.JSON()
	if err != nil {
		t.Fatal(err)
	}
	r := h.Run(t.Context(), time.Minute, in.Env("/run/x.sock"), stdin)
	if r.Err == nil || r.Err.Error() != "exit status 3" {
		t.Errorf("error %v", r.Err)
	}
	line, rest, _ := strings.Cut(r.Output, "\n")
	var got Input
	if err := json.Unmarshal([]byte(line), &got); err != nil {
		t.Fatalf("%v in %q", err, r.Output)
	}
	in.Version = InputVersion
	if d := cmp.Diff(in, got); d != "" {
		t.Error(d)
	}
	for _, want := range []string{`VMSNAP_VM=a\x0ab`, "VMSNAP_PHASE=pre-freeze", "VMSNAP_OPERATION=c0ffee01", "VMSNAP_FAILURE=failed",
		"VMSNAP_SOCKET=/run/x.sock", "VMSNAP_SNAPSHOT=n", "VMSNAP_UID=7", "\n/"} {
		if !strings.Contains("\n"+rest, want) {
			t.Errorf("no %q in\n%s", want, rest)
		}
	}
	if strings.Contains(rest, "SECRET") || strings.Contains(rest, "the guest") {
		t.Errorf("the environment has what it must not:\n%s", rest)
	}
}

func TestRunBoundsTheOutput(t *testing.T) {
	r := one(t, `i=0; while [ $i -lt 20000 ]; do echo "line $i"; i=$((i+1)); done; printf '\033[2J\377end'`).Run(t.Context(), time.Minute, nil, nil)
	if r.Err != nil || len(r.Output) > MaxOutput+16 || !strings.HasPrefix(r.Output, "…") || !strings.HasSuffix(r.Output, "line 19999\n\uFFFD[2J\uFFFDend") {
		t.Errorf("%v, %d bytes, %.20q … %q", r.Err, len(r.Output), r.Output, r.Output[max(0, len(r.Output)-30):])
	}
}

// pidIn returns the process id that a hook has written to a file.
func pidIn(t *testing.T, file string) int {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// alive reports whether a process runs.
func alive(t *testing.T, file string) bool {
	t.Helper()
	pid := pidIn(t, file)
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(stat), ") Z ") && syscall.Kill(pid, 0) == nil
}

func TestRunEndsTheGroupAtItsLimit(t *testing.T) {
	pid := filepath.Join(t.TempDir(), "pid")
	h := one(t, `sleep 1000 & echo $! >`+pid+`; echo waits; wait`)
	r := h.Run(t.Context(), 200*time.Millisecond, []string{"PATH=" + path}, nil)
	if !errors.Is(r.Err, ErrTimeout) || r.Output != "waits" || r.Took > grace {
		t.Errorf("%+v", r)
	}
	gone(t, pid)
}

// gone waits for the end of a process that was killed.
func gone(t *testing.T, file string) {
	t.Helper()
	fd, err := unix.PidfdOpen(pidIn(t, file), 0)
	if errors.Is(err, unix.ESRCH) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fd) }()
	limit := int((10 * time.Second).Milliseconds())
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, limit); err != nil || n == 0 {
		t.Fatalf("what the hook left goes on: %v", err)
	}
}

func TestRunEndsWhatAHookLeaves(t *testing.T) {
	pid := filepath.Join(t.TempDir(), "pid")
	r := one(t, `sleep 1000 & echo $! >`+pid).Run(t.Context(), time.Minute, []string{"PATH=" + path}, nil)
	if r.Err != nil || r.Took > 10*time.Second {
		t.Errorf("%+v", r)
	}
	gone(t, pid)
}

func TestRunDoesNotWaitForWhoLeftTheGroup(t *testing.T) {
	pid := filepath.Join(t.TempDir(), "pid")
	r := one(t, `setsid sh -c 'echo $$ >`+pid+`; exec sleep 20' & while [ ! -s `+pid+` ]; do :; done; echo done`).Run(t.Context(), time.Minute, []string{"PATH=" + path}, nil)
	if r.Err != nil || r.Output != "done" || r.Took > 10*time.Second {
		t.Errorf("%+v", r)
	}
	if !alive(t, pid) {
		t.Error("a program that left the group was ended")
	}
	b, _ := os.ReadFile(pid)
	if n, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil {
		_ = syscall.Kill(n, syscall.SIGKILL)
	}
}

func TestRunEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("cancelled")
	time.AfterFunc(100*time.Millisecond, func() { cancel(why) })
	if r := one(t, `exec sleep 1000`).Run(ctx, time.Minute, []string{"PATH=" + path}, nil); !errors.Is(r.Err, why) || r.Took > grace {
		t.Errorf("%+v", r)
	}
}

func TestRunOfWhatCannotBeStarted(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, "10-x", "")
	if err := os.WriteFile(filepath.Join(dir, "pre-freeze/10-x"), []byte("#!/no/such/shell\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	hooks, err := List(dir, PreFreeze)
	if err != nil {
		t.Fatal(err)
	}
	if r := hooks[0].Run(t.Context(), time.Minute, nil, make([]byte, 1<<20)); r.Err == nil {
		t.Error("it ran")
	}
	if r := one(t, "exit 0").Run(t.Context(), time.Minute, nil, make([]byte, 1<<20)); r.Err != nil {
		t.Errorf("a hook that does not read its input: %v", r.Err)
	}
}
