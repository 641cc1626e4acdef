package blockdev_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// TestQEMUBackedImages finds the images that lie on others, and passes over all
// that is none.
func TestQEMUBackedImages(t *testing.T) {
	forEachTools(t, func(t *testing.T, q testvm.QEMU) {
		p := newPile(t, q, "qcow2", 1)
		path := filepath.Dir(p.layers[0])
		p.tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", filepath.Base(p.layers[1]), "-F", "qcow2", filepath.Join(path, "relative.qcow2"))
		p.tool("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", filepath.Join(path, "gone.qcow2"), "-F", "qcow2", filepath.Join(path, "dangling.qcow2"), "1M")
		err := errors.Join(
			os.WriteFile(filepath.Join(path, "text"), []byte("no image"), 0o600), os.WriteFile(filepath.Join(path, "empty"), nil, 0o600),
			os.Symlink(p.layers[2], filepath.Join(path, "link.qcow2")), unix.Mkfifo(filepath.Join(path, "fifo.qcow2"), 0o600),
			os.Mkdir(filepath.Join(path, "directory.qcow2"), 0o700),
		)
		if err != nil {
			t.Fatal(err)
		}
		dir, err := blockdev.OpenDir(path, "")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = dir.Close() }()
		images, err := dir.BackedImages(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		want := map[string]string{p.layers[1]: p.layers[0], p.layers[2]: p.layers[1], filepath.Join(path, "relative.qcow2"): p.layers[1]}
		for _, image := range images {
			file, errFile := blockdev.StatPath(image.Path)
			backing, errBacking := blockdev.StatPath(want[image.Path])
			if err := errors.Join(errFile, errBacking); err != nil || file.FileID != image.File || backing.FileID != image.Backing {
				t.Errorf("found %+v: %v", image, err)
			}
			delete(want, image.Path)
		}
		for path := range want {
			t.Errorf("%s is not found", path)
		}
	})
}

// TestQEMUOfflineMergeRests holds qemu-img up, and limits what it writes.
func TestQEMUOfflineMergeRests(t *testing.T) {
	forEachTools(t, func(t *testing.T, q testvm.QEMU) {
		for _, way := range []string{"commit", "rebase"} {
			p := newPile(t, q, "qcow2", 8)
			release := make(chan struct{})
			o := blockdev.Offline{Locks: p.lock(0, 1, 2), Rate: 8 << 20, Rests: func() (bool, <-chan struct{}) {
				select {
				case <-release:
					return false, nil
				default:
					return true, release
				}
			}}
			ended := make(chan error, 1)
			go func() {
				if way == "commit" {
					ended <- o.Commit(context.Background(), p.layers[1], p.layers[0], "qcow2")
					return
				}
				ended <- o.Rebase(context.Background(), p.layers[2], p.layers[0], "qcow2")
			}()
			select {
			case err := <-ended:
				t.Fatalf("%s: it did not rest: %v", way, err)
			case <-time.After(300 * time.Millisecond): // many times what it would take to end
			}
			began := time.Now()
			close(release)
			if err := <-ended; err != nil {
				t.Fatal(err)
			}
			if took := time.Since(began); way == "commit" && took < 500*time.Millisecond {
				t.Errorf("%s: 8 MiB took %s", way, took)
			}
			p.holds(p.layers[2], "qcow2", 3, 8, way)
		}
	})
}
