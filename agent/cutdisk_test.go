package agent

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/blockdev"
)

// laidOut is a disk whose launch path leads to old, since it was cut before and
// could not be settled; now base is covered by overlay.
func laidOut(t *testing.T, settle Settle) (c *cutDisk, content func(name string) string) {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"old", "base", "overlay"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(filepath.Join(dir, "old"), filepath.Join(dir, "launch")); err != nil {
		t.Fatal(err)
	}
	c = &cutDisk{Dir: dir, Launch: "launch", Base: "base", Overlay: "overlay", Settle: settle}
	if err := c.open(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.close() })
	return c, func(name string) string {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
}

// TestALaunchPathThatCannotLead is left alone when a cut is taken back: one that
// is launched as raw must never find a qcow2.
func TestALaunchPathThatCannotLead(t *testing.T) {
	for settle, want := range map[Settle]string{SettleLive: "base", SettleConvert: "old", SettleDevice: "old"} {
		c, content := laidOut(t, settle)
		if err := c.uncover(); err != nil {
			t.Fatal(err)
		}
		if got := content("launch"); got != want {
			t.Errorf("%s: uncovered, the launch path leads to %s", settle, got)
		}
		c, content = laidOut(t, settle)
		if err := c.removeNames(); err != nil {
			t.Fatal(err)
		}
		if got := content("launch"); got != want {
			t.Errorf("%s: taken back, the launch path leads to %s", settle, got)
		}
		if _, err := c.overlayDir.Stat("overlay"); err == nil {
			t.Errorf("%s: the overlay is left", settle)
		}
	}
}

func TestOpenSharesDirectories(t *testing.T) {
	one, two, three := t.TempDir(), t.TempDir(), t.TempDir()
	for _, c := range []struct {
		disk cutDisk
		want int
	}{
		{cutDisk{Dir: one}, 1},
		{cutDisk{Dir: one, BaseDir: one, OverlayDir: one}, 1},
		{cutDisk{Dir: one, BaseDir: two, OverlayDir: one}, 2},
		{cutDisk{Dir: one, BaseDir: two, OverlayDir: two}, 2},
		{cutDisk{Dir: one, BaseDir: two, OverlayDir: three}, 3},
	} {
		d := c.disk
		if err := d.open(); err != nil {
			t.Fatal(err)
		}
		dirs := map[*blockdev.Dir]bool{d.dir: true, d.baseDir: true, d.overlayDir: true}
		if len(dirs) != c.want || d.BaseDir == "" || d.OverlayDir == "" {
			t.Errorf("%+v has %d directories", d, len(dirs))
		}
		for range 2 {
			if err := d.close(); err != nil {
				t.Error(err)
			}
		}
	}
	d := cutDisk{Dir: one, OverlayDir: filepath.Join(one, "missing")}
	if err := d.open(); err == nil || d.dir != nil {
		t.Errorf("a directory that is not there: %v, %+v", err, d)
	}
}

func TestFileIs(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := fileAt(image)
	if err != nil {
		t.Fatal(err)
	}
	var l catalog.Layer
	f.identify(&l)
	device := catalog.Layer{ID: "d", Device: "dm/uuid LVM-a"}
	if !f.is(l) || f.is(device) || f.is(catalog.Layer{}) {
		t.Errorf("%+v is %+v: %v; a device: %v", f, l, f.is(l), f.is(device))
	}
	lv := file{FileID: blockdev.FileID{Ino: 253 << 8}, device: "dm/uuid LVM-a"}
	lv.identify(&l)
	if !lv.is(device) || !lv.is(l) || l.Ino != 0 || lv.is(catalog.Layer{Device: "dm/uuid LVM-b"}) || lv.is(catalog.Layer{Ino: 253 << 8}) {
		t.Errorf("a device: %+v", l)
	}
	if got := lv.in([]catalog.Layer{{ID: "a", Ino: 1}, device}); got.ID != "d" {
		t.Errorf("of a chain: %+v", got)
	}
}
