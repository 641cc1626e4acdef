package blockdev

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func openDir(t *testing.T) (*Dir, string) {
	t.Helper()
	path := t.TempDir()
	d, err := OpenDir(path, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d, path
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestCreateFileNeverTouchesAnExistingOne(t *testing.T) {
	d, path := openDir(t)
	write(t, filepath.Join(path, "base"), "base")
	write(t, filepath.Join(path, "taken"), "precious")
	if err := d.CreateFile("taken", filepath.Join(path, "base")); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over an existing file: %v", err)
	}
	if got := read(t, filepath.Join(path, "taken")); got != "precious" {
		t.Errorf("the existing file holds %q", got)
	}
}

func TestCreateFileTakesOwnerAndMode(t *testing.T) {
	d, path := openDir(t)
	base := filepath.Join(path, "base")
	write(t, base, "")
	if err := errors.Join(os.Chown(base, 1234, 4321), os.Chmod(base, 0o640)); err != nil {
		t.Fatal(err)
	}
	if err := d.CreateFile("overlay", base); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(path, "overlay"), &st); err != nil {
		t.Fatal(err)
	}
	if st.Uid != 1234 || st.Gid != 4321 || st.Mode&0o777 != 0o640 {
		t.Errorf("uid %d, gid %d, mode %o", st.Uid, st.Gid, st.Mode)
	}
}

func TestNamesCannotLeadOut(t *testing.T) {
	d, path := openDir(t)
	outside := filepath.Join(t.TempDir(), "outside")
	write(t, outside, "outside")
	if err := os.Symlink(outside, filepath.Join(path, "link")); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(path, "layer"), "layer")
	for name, err := range map[string]error{
		"create":    d.CreateFile("../x", outside),
		"immutable": d.SetImmutable("link", true),
		"sync":      d.SyncFile("link"),
		"name":      d.Name("layer", "../x"),
	} {
		if err == nil {
			t.Errorf("%s led out of the directory", name)
		}
	}
	if read(t, outside) != "outside" {
		t.Error("a file outside was changed")
	}
}

func TestImmutable(t *testing.T) {
	d, path := openDir(t)
	file := filepath.Join(path, "layer")
	write(t, file, "x")
	t.Cleanup(func() {
		if err := d.SetImmutable("layer", false); err != nil {
			t.Error(err)
		}
	})
	for range 2 {
		if err := d.SetImmutable("layer", true); err != nil {
			t.Fatal(err)
		}
	}
	if on, err := d.Immutable("layer"); err != nil || !on {
		t.Fatalf("immutable %v, %v", on, err)
	}
	if _, err := os.OpenFile(file, os.O_RDWR, 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("open for writing: %v", err)
	}
	if err := os.Remove(file); !errors.Is(err, unix.EPERM) {
		t.Errorf("remove: %v", err)
	}
}

func TestImmutableIsMissed(t *testing.T) {
	p, err := OpenDir("/proc/self", "") // procfs has no flags
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = p.Close() }()
	if err := p.SetImmutable("status", true); !errors.Is(err, ErrNoImmutable) {
		t.Errorf("a file system without the flag: %v", err)
	}
}

func TestWriteFileIsPrivateAndReplaces(t *testing.T) {
	d, path := openDir(t)
	for _, content := range []string{"one", "two"} {
		if err := d.WriteFile(".vmsnap", "m.json", []byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	if got := read(t, filepath.Join(path, ".vmsnap/m.json")); got != "two" {
		t.Errorf("holds %q", got)
	}
	for name, want := range map[string]fs.FileMode{".vmsnap": 0o700, ".vmsnap/m.json": 0o600} {
		fi, err := os.Stat(filepath.Join(path, name))
		if err != nil || fi.Mode().Perm() != want {
			t.Errorf("%s: mode %v, %v", name, fi.Mode().Perm(), err)
		}
	}
	entries, err := os.ReadDir(filepath.Join(path, ".vmsnap"))
	if err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func TestLayerName(t *testing.T) {
	for launch, want := range map[string]string{
		"root.qcow2": "root.7f3a91c2-0.qcow2", "disk": "disk.7f3a91c2-0.qcow2", "vm.disk.raw": "vm.disk.7f3a91c2-0.qcow2",
	} {
		if got := LayerName(launch, "7f3a91c2-0", "qcow2"); got != want {
			t.Errorf("%s: %s", launch, got)
		}
	}
}

// TestReadFileOfOthers finds something else where a file of ours should be.
func TestReadFileOfOthers(t *testing.T) {
	d, path := openDir(t)
	const limit = 16
	if err := d.WriteFile(".vmsnap", "ours", []byte("short")); err != nil {
		t.Fatal(err)
	}
	if got, err := d.ReadFile(".vmsnap", "ours", limit); err != nil || string(got) != "short" {
		t.Errorf("ours holds %q, %v", got, err)
	}
	if _, err := d.ReadFile(".vmsnap", "none", limit); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("none: %v", err)
	}
	outside := filepath.Join(t.TempDir(), "secret")
	write(t, outside, "secret")
	sub := filepath.Join(path, ".vmsnap")
	for name, put := range map[string]func(string) error{
		"link out":   func(p string) error { return os.Symlink(outside, p) },
		"link":       func(p string) error { return os.Symlink("ours", p) },
		"FIFO":       func(p string) error { return unix.Mkfifo(p, 0o600) },
		"directory":  func(p string) error { return os.Mkdir(p, 0o700) },
		"large":      func(p string) error { return os.WriteFile(p, make([]byte, limit+1), 0o600) },
		"huge, hole": func(p string) error { return errors.Join(os.WriteFile(p, nil, 0o600), os.Truncate(p, 1<<40)) },
	} {
		for _, in := range []string{name, name + ".tmp"} {
			if err := put(filepath.Join(sub, in)); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := d.ReadFile(".vmsnap", name, limit); len(got) > 0 || err != nil {
			t.Errorf("%s: read %q, %v", name, got, err)
		}
		if name == "directory" {
			continue // it is not ours to remove
		}
		if err := d.WriteFile(".vmsnap", name, []byte("again")); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got, err := d.ReadFile(".vmsnap", name, limit); err != nil || string(got) != "again" {
			t.Errorf("%s: holds %q, %v, once it is written", name, got, err)
		}
	}
	if got := read(t, outside); got != "secret" {
		t.Errorf("the file outside holds %q", got)
	}
}
