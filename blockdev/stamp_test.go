package blockdev

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestStamps(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	before := time.Now()
	if err := os.WriteFile(path, []byte("one"), 0o600); err != nil {
		t.Fatal(err)
	}
	first, err := StampOf(path)
	if err != nil {
		t.Fatal(err)
	}
	if first.Size != 3 || first.Tells(before.Add(-time.Second)) || !first.Tells(time.Now().Add(time.Second)) {
		t.Errorf("%+v", first)
	}
	if err := os.Chtimes(path, before, before.Add(-time.Hour)); err != nil {
		t.Fatal(err)
	}
	second, err := StampOf(path)
	if err != nil {
		t.Fatal(err)
	}
	if second == first || second.Tells(before.Add(-time.Second)) {
		t.Errorf("a file whose time of modification was set back: %+v", second)
	}
	if (Stamp{Device: true}).Tells(time.Now()) {
		t.Error("a block device tells")
	}
	if _, err := StampOf(path + "-gone"); err == nil {
		t.Error("a file that is gone has a stamp")
	}
}
