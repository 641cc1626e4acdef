package memdump

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

// still is a QEMU with nothing to boot, for what depends on how it is built or
// was started.
type still struct {
	*monitor.Session
	t   *testing.T
	dir string
	cmd *exec.Cmd
}

// eachStill runs a test with each version of QEMU, started with these arguments
// and not running yet. %DIR in them is a directory of its own.
func eachStill(t *testing.T, test func(t *testing.T, q *still), args ...string) {
	t.Helper()
	versions, err := testvm.Versions()
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range versions {
		t.Run("qemu-"+v.Name, func(t *testing.T) { test(t, startStill(t, v, 0, args...)) })
	}
}

// startStill starts QEMU as a user.
func startStill(t *testing.T, v testvm.QEMU, uid uint32, args ...string) *still {
	t.Helper()
	dir, err := os.MkdirTemp("", "still-")
	if err != nil {
		t.Fatal(err)
	}
	q := &still{t: t, dir: dir}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chown(dir, int(uid), -1); err != nil {
		t.Fatal(err)
	}
	line := append(append([]string{}, v.Args...), "-S", "-display", "none", "-nodefaults", "-m", "64",
		"-machine", "pc,accel=tcg", "-qmp", "unix:"+dir+"/q,server=on,wait=off")
	for _, a := range args {
		line = append(line, strings.ReplaceAll(a, "%DIR", dir))
	}
	q.cmd = exec.Command(v.Binary, line...)
	if uid != 0 {
		q.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
	var stderr strings.Builder
	q.cmd.Stderr = &stderr
	if err := q.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = q.cmd.Wait(); close(ended) }()
	t.Cleanup(func() {
		_ = q.cmd.Process.Kill() // fails only if it has ended
		<-ended
		if q.Session != nil {
			_ = q.Close()
		}
	})
	q.Session, err = testvm.Connect(q.ctx(), ended, func(ctx context.Context) (*monitor.Session, error) {
		return monitor.Dial(ctx, filepath.Join(dir, "q"))
	})
	if err != nil {
		t.Fatalf("QEMU: %v\n%s", err, &stderr)
	}
	return q
}

func (q *still) ctx() context.Context {
	q.t.Helper()
	ctx, cancel := context.WithTimeout(q.t.Context(), 30*time.Second)
	q.t.Cleanup(cancel)
	return ctx
}

func (q *still) probe() Facts {
	q.t.Helper()
	f, err := Probe(q.ctx(), q.Session, q.cmd.Process.Pid)
	if err != nil {
		q.t.Fatal(err)
	}
	return f
}

// file makes a file for a stream, with space reserved.
func (q *still) file(name string, reserve uint64) *os.File {
	q.t.Helper()
	f, err := os.OpenFile(filepath.Join(q.dir, name), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		q.t.Fatal(err)
	}
	q.t.Cleanup(func() { _ = f.Close() })
	if err := syscall.Fallocate(int(f.Fd()), 1, 0, int64(reserve)); err != nil { // FALLOC_FL_KEEP_SIZE
		q.t.Fatal(err)
	}
	return f
}
