package blockdev

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestPointAt(t *testing.T) {
	d, path := openDir(t)
	at := func(n string) string { return filepath.Join(path, n) }
	write(t, at("launch"), "old")
	if err := d.Name("launch", "old"); err != nil {
		t.Fatal(err)
	}
	write(t, at("new"), "new")
	write(t, at("launch"+LinkSuffix), "left behind by a crash")
	for range 2 { // the second time there is nothing to do
		if err := d.PointAt("launch", d, "new"); err != nil {
			t.Fatal(err)
		}
	}
	if got := read(t, at("launch")); got != "new" {
		t.Errorf("launch leads to %q", got)
	}
	if got := read(t, at("old")); got != "old" {
		t.Errorf("the covered layer holds %q", got)
	}
	if a, b := stat(t, d, "launch"), stat(t, d, "new"); a.FileID != b.FileID || a.Links != 2 {
		t.Errorf("launch is %+v, and the layer %+v", a, b)
	}
	if _, err := d.Stat("launch" + LinkSuffix); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the temporary link is left: %v", err)
	}
	if err := d.PointAt("launch", d, "missing"); err == nil {
		t.Error("a missing layer was pointed at")
	}
	if got := read(t, at("launch")); got != "new" {
		t.Errorf("after a failure launch leads to %q", got)
	}
}

func stat(t *testing.T, d *Dir, name string) Info {
	t.Helper()
	info, err := d.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	return info
}

// leads verifies which file a launch path leads to, and how.
func leads(t *testing.T, d *Dir, launch, path string, link bool) {
	t.Helper()
	got, err := d.Lead(launch)
	if err != nil {
		t.Fatal(err)
	}
	want, err := StatPath(path)
	if err != nil {
		t.Fatal(err)
	}
	if got.FileID != want.FileID {
		t.Errorf("%s does not lead to %s", launch, path)
	}
	if own := stat(t, d, launch); (own.FileID != got.FileID) != link {
		t.Errorf("%s is a symbolic link: %v", launch, !link)
	}
}

func TestPointAtAnotherDirectory(t *testing.T) {
	d, path := openDir(t)
	other, elsewhere := openDir(t)
	write(t, filepath.Join(path, "launch"), "old")
	write(t, filepath.Join(elsewhere, "one"), "one")
	write(t, filepath.Join(elsewhere, "two"), "two")
	write(t, filepath.Join(path, "here"), "here")
	for _, layer := range []string{"one", "two"} {
		for range 2 {
			if err := d.PointAt("launch", other, layer); err != nil {
				t.Fatal(err)
			}
			leads(t, d, "launch", filepath.Join(elsewhere, layer), true)
		}
	}
	if err := d.PointAt("launch", d, "here"); err != nil {
		t.Fatal(err)
	}
	leads(t, d, "launch", filepath.Join(path, "here"), false)
	if got := read(t, filepath.Join(elsewhere, "two")); got != "two" {
		t.Errorf("the layer that was led to holds %q", got)
	}
}

func TestLeadOfSomebodysLink(t *testing.T) {
	d, path := openDir(t)
	write(t, filepath.Join(path, "file"), "file")
	for name, to := range map[string]string{"relative": "file", "loop": "loop", "nowhere": "/nowhere"} {
		if err := os.Symlink(to, filepath.Join(path, name)); err != nil {
			t.Fatal(err)
		}
	}
	leads(t, d, "relative", filepath.Join(path, "file"), true)
	for _, name := range []string{"loop", "nowhere", "missing"} {
		if info, err := d.Lead(name); err == nil {
			t.Errorf("%s leads to %+v", name, info)
		}
	}
}

// fill gives a file all the hard links that ext4 allows.
func fill(t *testing.T, file string) {
	t.Helper()
	dir := t.TempDir()
	for i := 0; ; i++ {
		err := os.Link(file, filepath.Join(dir, fmt.Sprint(i)))
		if errors.Is(err, unix.EMLINK) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestNameWithoutHardLinks changes places where a file has as many hard links
// as it can have.
func TestNameWithoutHardLinks(t *testing.T) {
	d, path := openDir(t)
	at := func(n string) string { return filepath.Join(path, n) }
	write(t, at("launch"), "content")
	fill(t, at("launch"))
	file := stat(t, d, "launch").FileID
	if err := d.Name("launch", "name"); err != nil {
		t.Fatal(err)
	}
	leads(t, d, "launch", at("name"), true)
	if stat(t, d, "name").FileID != file {
		t.Error("the permanent name is another file")
	}
	write(t, at("other"), "other")
	if err := d.PointAt("launch", d, "other"); err != nil {
		t.Fatal(err)
	}
	leads(t, d, "launch", at("other"), false)
	if err := d.PointAt("launch", d, "name"); err != nil {
		t.Fatal(err)
	}
	leads(t, d, "launch", at("name"), true)
	for range 2 {
		if err := d.Unname("launch", "name"); err != nil {
			t.Fatal(err)
		}
		leads(t, d, "launch", at("launch"), false)
		if stat(t, d, "launch").FileID != file {
			t.Error("the launch path is another file")
		}
	}
	write(t, at("taken"), "precious")
	if err := d.Name("launch", "taken"); !errors.Is(err, fs.ErrExist) || read(t, at("taken")) != "precious" {
		t.Errorf("over a name that is taken: %v", err)
	}
}

func TestUnname(t *testing.T) {
	d, path := openDir(t)
	at := func(n string) string { return filepath.Join(path, n) }
	write(t, at("launch"), "content")
	if err := d.Name("launch", "name"); err != nil {
		t.Fatal(err)
	}
	if err := d.Unname("launch", "name"); err != nil {
		t.Fatal(err)
	}
	if err := d.Unname("launch", "name"); err != nil {
		t.Errorf("the second time: %v", err)
	}
	if err := os.Symlink(at("name"), at("name")); err != nil { // killed before they changed places
		t.Fatal(err)
	}
	if named, err := d.Named("name"); err != nil || named {
		t.Errorf("a link that leads nowhere is a name: %v, %v", named, err)
	}
	if err := d.PointAt("launch", d, "name"); err == nil || read(t, at("launch")) != "content" {
		t.Errorf("pointed at a link that leads nowhere: %v", err)
	}
	if err := d.Unname("launch", "name"); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(path); err != nil || len(entries) != 1 || read(t, at("launch")) != "content" {
		t.Errorf("left: %v, %v", entries, err)
	}
	write(t, at("name"), "the only name of another")
	if err := d.Unname("launch", "name"); err == nil || read(t, at("name")) != "the only name of another" {
		t.Errorf("a name that the launch path does not lead to: %v", err)
	}
}
