package blockdev

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestCheckAloneOpensNothingElse(t *testing.T) {
	dir := t.TempDir()
	fifo, path := filepath.Join(dir, "fifo"), filepath.Join(dir, "a,b.qcow2")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	img(t, "create", "-q", "-f", "qcow2", "-u", "-b", fifo, "-F", "raw", path, "1M")
	if r, err := CheckAlone(context.Background(), path); err != nil || !r.Clean() {
		t.Errorf("an image on a FIFO: %+v, %v", r, err)
	}
	if err := os.WriteFile(path, []byte("nothing of the kind"), 0o600); err != nil {
		t.Fatal(err)
	}
	var failed *ImgError
	if r, err := CheckAlone(context.Background(), path); !errors.As(err, &failed) {
		t.Errorf("no image: %+v, %v", r, err)
	}
}

func TestQuarantineReplacesNothing(t *testing.T) {
	path := t.TempDir()
	dir, err := OpenDir(path, "")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = dir.Close() }()
	var names []string
	for _, text := range []string{"one", "two"} {
		if err := os.WriteFile(filepath.Join(path, "file"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		to, err := dir.Quarantine("file", "a/b")
		if err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(filepath.Join(path, to)); err != nil || string(got) != text {
			t.Errorf("%s holds %q, %v", to, got, err)
		}
		names = append(names, to)
	}
	if diff := cmp.Diff([]string{"a/b/file", "a/b/file.1"}, names); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if _, err := os.Stat(filepath.Join(path, "file")); !os.IsNotExist(err) {
		t.Errorf("it is still there: %v", err)
	}
	if fi, err := os.Stat(filepath.Join(path, "a")); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", fi, err)
	}
	if _, err := dir.Quarantine("gone", "a/b"); err == nil {
		t.Error("a file that is not there was moved")
	}
}
