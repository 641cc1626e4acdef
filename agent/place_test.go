package agent

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmsnap/vmsnap/agent/fault"
)

func TestMayInDirectory(t *testing.T) {
	me := Caller{UID: 1000, GID: 100, Groups: []uint32{27, 28}}
	for name, c := range map[string]struct {
		caller         Caller
		uid, gid, mode uint32
		want           bool
	}{
		"the owner":                               {me, 1000, 0, 0o700, true},
		"an owner without leave":                  {me, 1000, 100, 0o077, false},
		"the group":                               {me, 0, 100, 0o730, true},
		"a supplementary group":                   {me, 0, 28, 0o730, true},
		"a group without leave, others have it":   {me, 0, 27, 0o707, false},
		"others":                                  {me, 0, 0, 0o703, true},
		"others without leave":                    {me, 0, 0, 0o775, false},
		"others who may write and not search":     {me, 0, 0, 0o772, false},
		"a uid is no gid":                         {Caller{UID: 7, GID: 8}, 8, 7, 0o770, false},
		"root":                                    {Caller{}, 1000, 100, 0, true},
		"the sticky bit changes nothing for this": {me, 0, 0, 0o1777, true},
	} {
		if got := c.caller.may(c.uid, c.gid, c.mode, maySearch|mayWrite); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestPlaces(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Mkdir(dir+"/real", 0o700), os.Symlink("real", dir+"/link"), os.WriteFile(dir+"/file", nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]fault.Kind{
		dir + "/real": "", "/": "", dir + "/link": fault.Denied, dir + "/link/..": fault.Denied,
		dir + "/file": fault.Usage, dir + "/none": fault.NotFound, dir + "/file/x": fault.Usage,
	} {
		root, err := Caller{}.openPlace(path)
		if err == nil {
			err = root.Close()
		}
		if got := fault.Of(err); err != nil && got != want || err == nil && want != "" {
			t.Errorf("%s: %v", path, err)
		}
	}
	// The way down to a test's directory is nobody else's.
	if _, err := (Caller{UID: 65532, GID: 65532}).openPlace(dir + "/real"); fault.Of(err) != fault.Denied {
		t.Errorf("somebody else: %v", err)
	}
	for _, path := range []string{"", "a", "./a", "/a/", "/a//b", "/a/../b", "/", "/a\x00b"} {
		if err := checkPlace(path); fault.Of(err) != fault.Usage {
			t.Errorf("%q: %v", path, err)
		}
	}
}

func TestOutFile(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	make := func(name string) *outFile {
		t.Helper()
		f, err := planOut(dir+"/"+name, "c0ffee01", Caller{UID: uint32(os.Getuid()), GID: uint32(os.Getgid())})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.close() })
		if err := f.create(); err != nil {
			t.Fatal(err)
		}
		return f
	}
	a := make("a")
	for range 2 { // as after a crash in between
		if err := a.publish(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := planOut(dir+"/a", "c0ffee02", Caller{}); fault.Of(err) != fault.Exists {
		t.Errorf("a is there: %v", err)
	}
	if _, err := planOut(dir+"/"+strings.Repeat("n", 240), "c0ffee02", Caller{}); fault.Of(err) != fault.Usage {
		t.Errorf("a long name: %v", err)
	}
	b := make("b")
	if err := os.WriteFile(dir+"/b", []byte("faster"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := b.publish(); fault.Of(err) != fault.Exists {
		t.Errorf("somebody was faster: %v", err)
	}
	if err := errors.Join(b.close(), b.discard(), b.discard()); err != nil {
		t.Error(err)
	}
	if got, err := os.ReadFile(dir + "/b"); err != nil || string(got) != "faster" {
		t.Errorf("b holds %q, %v", got, err)
	}
	c := make("c")
	if err := errors.Join(os.Rename(dir+"/"+c.Partial, dir+"/moved"), os.WriteFile(dir+"/"+c.Partial, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := c.publish(); err == nil {
		t.Error("another file was given the name")
	}
	if err := c.discard(); err == nil {
		t.Error("another file was removed")
	}
	if _, err := os.Lstat(dir + "/c"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if err := a.discard(); err != nil { // what failed after its file had its name
		t.Error(err)
	}
	if _, err := os.Lstat(dir + "/a"); !errors.Is(err, fs.ErrNotExist) {
		t.Error("a is left")
	}
}
