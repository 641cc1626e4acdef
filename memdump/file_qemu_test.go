package memdump

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

const (
	// loadedAt and loadedSize say where in a guest's memory a pattern lies.
	loadedAt   = 16 << 20
	loadedSize = 96 << 20
)

// eachQEMU runs the test with each version of QEMU, one after the other.
func eachQEMU(t *testing.T, test func(t *testing.T, q testvm.QEMU)) {
	t.Helper()
	versions, err := testvm.Versions()
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range versions {
		t.Run("qemu-"+q.Name, func(t *testing.T) { test(t, q) })
	}
}

// bareQEMU starts a QEMU of 128 MiB whose guest never runs.
func bareQEMU(ctx context.Context, t *testing.T, q testvm.QEMU, dir string, args ...string) *monitor.Session {
	t.Helper()
	socket := filepath.Join(dir, fmt.Sprintf("%d.sock", time.Now().UnixNano()))
	cmd := exec.Command(q.Binary, append(append([]string{}, q.Args...), append(args, "-S", "-display", "none", "-nodefaults", "-m", "128",
		"-machine", "pc,accel=tcg", "-qmp", "unix:"+socket+",server=on,wait=off")...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	t.Cleanup(func() { _ = cmd.Process.Kill(); <-ended })
	s, err := testvm.Connect(ctx, ended, func(ctx context.Context) (*monitor.Session, error) { return monitor.Dial(ctx, socket) })
	if err != nil {
		t.Fatalf("QEMU: %v\n%s", err, &stderr)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func must(ctx context.Context, t *testing.T, s *monitor.Session, command string, args map[string]any) {
	t.Helper()
	if err := s.Execute(ctx, command, args, nil); err != nil {
		t.Fatal(err)
	}
}

// awaitMigration waits for the end of a migration; the end of QEMU is one too.
func awaitMigration(ctx context.Context, t *testing.T, s *monitor.Session) monitor.MigrationStatus {
	t.Helper()
	var status monitor.MigrationStatus
	until(ctx, t, "the migration has ended", func() bool {
		m, err := s.QueryMigrate(ctx)
		if err != nil { // a load that fails ends QEMU
			status = monitor.MigrationFailed
			return s.Err() != nil
		}
		status = m.Status
		return status == monitor.MigrationCompleted || status == monitor.MigrationFailed
	})
	return status
}

// load has a new QEMU load the memory file, and returns how that ended and
// what lies where the pattern should be.
func load(ctx context.Context, t *testing.T, q testvm.QEMU, root *os.Root) (monitor.MigrationStatus, []byte, *Stream) {
	t.Helper()
	dir, err := os.MkdirTemp("", "mf") // a short path, for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	to := bareQEMU(ctx, t, q, dir, "-incoming", "defer")
	s := opened(ctx, t, root)
	if err := to.ExecuteWithFile(ctx, "getfd", map[string]any{"fdname": "mem"}, nil, s.File); err != nil {
		t.Fatal(err)
	}
	if err := s.Release(); err != nil {
		t.Error(err)
	}
	must(ctx, t, to, "migrate-incoming", map[string]any{"uri": "fd:mem"})
	status := awaitMigration(ctx, t, to)
	if status != monitor.MigrationCompleted {
		return status, nil, s
	}
	must(ctx, t, to, "pmemsave", map[string]any{"val": loadedAt, "size": loadedSize, "filename": filepath.Join(dir, "ram")})
	ram, err := os.ReadFile(filepath.Join(dir, "ram"))
	if err != nil {
		t.Fatal(err)
	}
	return status, ram, s
}

// QEMU writes the stream into the file by its descriptor while it is followed.
// A new QEMU loads the same memory from the plain file and from the compressed
// one; it cannot load it from a compressed one that was altered.
func TestQEMUFile(t *testing.T) {
	eachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		ctx := followContext(t)
		dir, err := os.MkdirTemp("", "mf")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
		ram := pattern(loadedSize)
		image := filepath.Join(dir, "image")
		if err := os.WriteFile(image, ram, 0o600); err != nil {
			t.Fatal(err)
		}
		root := openRoot(t, t.TempDir())
		saved := saveWithQEMU(ctx, t, root, bareQEMU(ctx, t, q, dir, "-device",
			fmt.Sprintf("loader,file=%s,addr=%d,force-raw=on", image, loadedAt)))
		if saved.Length < loadedSize/2 {
			t.Errorf("a stream of %d bytes for %d of noise", saved.Length, loadedSize/2)
		}
		for _, form := range []string{"plain", "zstd"} {
			if form == "zstd" {
				if saved, err = Compress(ctx, root, "m", nil); err != nil {
					t.Fatal(err)
				}
			}
			if _, _, err := Verify(ctx, root, "m", nil, nil); err != nil {
				t.Error(err)
			}
			status, got, s := load(ctx, t, q, root)
			if status != monitor.MigrationCompleted || !bytes.Equal(got, ram) {
				t.Errorf("%s: loading %s, the same memory: %v", form, status, bytes.Equal(got, ram))
			}
			if err := s.Wait(ctx); err != nil {
				t.Errorf("%s: %v", form, err)
			}
		}
		altered(t, root, HeaderSize+int64(saved.Stored)-1, 1, func() {
			if status, _, s := load(ctx, t, q, root); status != monitor.MigrationFailed || !errors.Is(s.Wait(ctx), ErrAltered) {
				t.Errorf("altered: loading %s, %v", status, s.Wait(ctx))
			}
		})
	})
}

// saveWithQEMU saves the memory of a VM that does not run.
func saveWithQEMU(ctx context.Context, t *testing.T, root *os.Root, s *monitor.Session) Sum {
	t.Helper()
	f := created(t, root, "m", 160<<20)
	stop := following(ctx, t, f)
	must(ctx, t, s, "migrate-set-parameters", map[string]any{"max-bandwidth": 1 << 40})
	if err := s.ExecuteWithFile(ctx, "getfd", map[string]any{"fdname": "mem"}, nil, f.Target()); err != nil {
		t.Fatal(err)
	}
	must(ctx, t, s, "migrate", map[string]any{"uri": "fd:mem"})
	if status := awaitMigration(ctx, t, s); status != monitor.MigrationCompleted {
		t.Fatalf("saving %s", status)
	}
	stop()
	at, err := f.Target().Seek(0, io.SeekCurrent)
	if n, werr := f.Written(); err != nil || werr != nil || uint64(at) != HeaderSize+n {
		t.Errorf("QEMU is at %d of %d, %v, %v", at, n, err, werr)
	}
	sum, err := f.Finish(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return sum
}
