package memdump

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

// savedStill saves the memory of a QEMU whose guest never ran.
func savedStill(ctx context.Context, t *testing.T, q testvm.QEMU, dir string) *os.Root {
	t.Helper()
	root := openRoot(t, t.TempDir())
	image := filepath.Join(dir, "image")
	if err := os.WriteFile(image, pattern(loadedSize), 0o600); err != nil {
		t.Fatal(err)
	}
	saveWithQEMU(ctx, t, root, bareQEMU(ctx, t, q, dir, "-device", "virtio-rng-pci",
		"-device", "loader,addr=16777216,force-raw=on,file="+image))
	return root
}

// A memory file is loaded, plain, compressed and encrypted, with progress to its
// end. What fails says why, and QEMU has ended then.
func TestQEMULoad(t *testing.T) {
	eachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		ctx := followContext(t)
		dir, err := os.MkdirTemp("", "ml")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
		root := savedStill(ctx, t, q, dir)
		waiting := func(args ...string) *monitor.Session {
			return bareQEMU(ctx, t, q, dir, append(args, "-incoming", "defer")...)
		}
		loads := func(name, what string) {
			t.Helper()
			to := waiting("-device", "virtio-rng-pci")
			var seen []uint64
			progress := func(done, total uint64) { seen = append(seen, done, total) }
			if err := Load(ctx, LoadConfig{Session: to, Dir: root, Name: name, Key: someKey(), ID: "1", Progress: progress}); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			n := len(seen)
			if n < 2 || seen[n-2] != seen[n-1] || seen[n-1] < loadedSize/2 {
				t.Errorf("%s: the progress is %v", what, seen)
			}
			if st, err := to.QueryStatus(ctx); err != nil || st.Status == monitor.RunStateInMigrate || st.Status == monitor.RunStateRunning {
				t.Errorf("%s: the VM is %+v, %v", what, st, err)
			}
			if err := Load(ctx, LoadConfig{Session: to, Dir: root, Name: "m", ID: "1"}); !errors.Is(err, ErrNotWaiting) {
				t.Errorf("%s: loaded again: %v", what, err)
			}
		}
		loads("m", "plain")

		other := waiting() // which has one device less
		err = Load(ctx, LoadConfig{Session: other, Dir: root, Name: "m", ID: "1"})
		var failed *LoadError
		if !errors.As(err, &failed) || !errors.Is(err, ErrLoad) || q.Name != "7.2" && failed.Desc == "" {
			t.Errorf("into another machine: %v", err)
		}
		<-other.Done()

		encrypted(t, root)
		loads("e", "encrypted")
		for key, want := range map[*Key]string{nil: "there is no key", otherKey: "the key is that of"} {
			to := waiting("-device", "virtio-rng-pci")
			err := Load(ctx, LoadConfig{Session: to, Dir: root, Name: "e", Key: key, ID: "1"})
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("with another key: %v", err)
			}
			if st, err := to.QueryStatus(ctx); err != nil || st.Status != monitor.RunStateInMigrate {
				t.Errorf("a QEMU that was sent nothing is %+v, %v", st, err)
			}
		}

		packed, err := Compress(ctx, root, "m", nil)
		if err != nil {
			t.Fatal(err)
		}
		loads("m", "compressed")

		altered(t, root, HeaderSize+int64(packed.Stored)-1, 1, func() {
			to := waiting("-device", "virtio-rng-pci")
			if err := Load(ctx, LoadConfig{Session: to, Dir: root, Name: "m", ID: "1"}); !errors.Is(err, ErrLoad) || !errors.Is(err, ErrAltered) {
				t.Errorf("altered: %v", err)
			}
			<-to.Done()
		})
	})
}

// encrypted makes the file e, compressed and encrypted, of the plain m.
func encrypted(t *testing.T, root *os.Root) {
	t.Helper()
	plain, err := root.ReadFile("m")
	if err != nil {
		t.Fatal(err)
	}
	secretCalled(t, root, "e", plain[HeaderSize:])
	if _, err := Encrypt(t.Context(), root, "e", true, nil); err != nil {
		t.Fatal(err)
	}
}

// A load that does not go on is given up, and one that is cancelled ends.
func TestQEMULoadStalls(t *testing.T) {
	versions, err := testvm.Versions()
	if err != nil {
		t.Fatal(err)
	}
	ctx := followContext(t)
	q := versions[len(versions)-1]
	dir, err := os.MkdirTemp("", "ml")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	for _, cancelled := range []bool{false, true} {
		to := bareQEMU(ctx, t, q, dir, "-incoming", "defer")
		r, w, err := os.Pipe() // nobody writes to it
		if err != nil {
			t.Fatal(err)
		}
		loading, cancel := context.WithCancel(ctx)
		s := &Stream{File: r, Sum: Sum{Length: 1 << 20}, stop: func() {}, done: make(chan struct{})}
		close(s.done)
		l := loader{LoadConfig: LoadConfig{Session: to, Stall: 300 * time.Millisecond}, stream: s, fd: "m"}
		want := ErrLoadStalled
		if cancelled {
			l.Stall, want = time.Minute, context.Canceled
			time.AfterFunc(300*time.Millisecond, cancel)
		}
		if err := to.ExecuteWithFile(ctx, "getfd", map[string]string{"fdname": l.fd}, nil, r); err != nil {
			t.Fatal(err)
		}
		if err := l.run(loading); !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
		<-to.Done()
		cancel()
		_, _ = r.Close(), w.Close()
	}
}
