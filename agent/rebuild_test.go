package agent

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/agent/catalog"
)

// written are the manifests of a VM with one snapshot, as they stand in a
// directory.
func written(t *testing.T, dir string, change func(*vmManifest, *manifest)) map[string][]byte {
	t.Helper()
	now := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	v := vmManifest{
		Version: manifestVersion, Written: now, VM: catalog.VM{ID: "11111111", Name: "web", Identity: "name:web"},
		Disks: []catalog.Disk{{ID: "d0000000", VMID: "11111111", Device: "root", LaunchPath: dir + "/root.qcow2", ActiveLayer: "0badcafe-0"}},
		Layers: []catalog.Layer{
			{ID: "aaaaaaaa", DiskID: "d0000000", Path: dir + "/root.0badcafe-0b.qcow2", Format: "qcow2", Covered: true},
			{ID: "0badcafe-0", DiskID: "d0000000", Path: dir + "/root.0badcafe-0.qcow2", Format: "qcow2", Parent: "aaaaaaaa"},
		},
		Snapshots: []string{"5a5a5a5a"},
	}
	s := manifest{Version: manifestVersion, VM: v.VM, Disks: v.Disks, Layers: v.Layers[:1:1], Snapshot: catalog.Snapshot{
		ID: "5a5a5a5a", VMID: "11111111", VMName: "web", Name: "one", Created: now.Add(-time.Minute),
		Disks: []catalog.SnapshotDisk{{DiskID: "d0000000", Device: "root", LayerID: "aaaaaaaa"}},
	}}
	if change != nil {
		change(&v, &s)
	}
	files := map[string][]byte{}
	for name, m := range map[string]any{"vm-11111111.json": v, "5a5a5a5a.json": s} {
		data, err := json.MarshalIndent(m, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		files[name] = data
	}
	return files
}

func newManifests() *manifests {
	return &manifests{vms: map[string]vmManifest{}, snapshots: map[string]manifest{}}
}

func TestManifestsAreChecked(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*vmManifest, *manifest)
		want   string // of what is refused; empty when nothing is
	}{
		"as they are":      {nil, ""},
		"a later version":  {func(v *vmManifest, _ *manifest) { v.Version = 2 }, "version 2"},
		"another VM":       {func(v *vmManifest, _ *manifest) { v.VM.ID = "22222222" }, "of the VM"},
		"no identity":      {func(v *vmManifest, _ *manifest) { v.VM.Identity = "" }, "no identity"},
		"a relative path":  {func(v *vmManifest, _ *manifest) { v.Layers[1].Path = "root.qcow2" }, "makes no sense"},
		"a path that goes": {func(v *vmManifest, _ *manifest) { v.Layers[1].Path = "/srv/../etc/shadow" }, "makes no sense"},
		"a strange disk":   {func(v *vmManifest, _ *manifest) { v.Layers[1].DiskID = "d1" }, "makes no sense"},
		"a circle":         {func(v *vmManifest, _ *manifest) { v.Layers[0].Parent = "0badcafe-0" }, "circle"},
		"an odd id":        {func(v *vmManifest, _ *manifest) { v.Layers[1].ID = "../x" }, "has the id"},
		"a strange preview": {func(v *vmManifest, _ *manifest) {
			v.Preview = &catalog.Preview{Disks: []catalog.PreviewDisk{{Before: "aaaaaaaa", Trial: "gone"}}}
		}, "preview"},
		"another snapshot": {func(_ *vmManifest, s *manifest) { s.Snapshot.ID = "6a6a6a6a" }, "of the snapshot"},
		"a strange name":   {func(_ *vmManifest, s *manifest) { s.Snapshot.Name = "a/b" }, "contains"},
		"strange memory":   {func(_ *vmManifest, s *manifest) { s.Snapshot.Memory = &catalog.SavedMemory{Path: "x.mem"} }, "memory is in"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newManifests()
			var refused []string
			for name, data := range written(t, "/srv/vm/web", c.change) {
				if err := m.take(name, data); err != nil {
					refused = append(refused, err.Error())
				}
			}
			got := strings.Join(refused, "; ")
			if c.want == "" && got != "" || !strings.Contains(got, c.want) {
				t.Errorf("refused: %q, want %q", got, c.want)
			}
		})
	}
}

func TestManifestsOfOthersAreNotRead(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, manifestDir), 0o700); err != nil {
		t.Fatal(err)
	}
	paths := map[string]string{}
	for name, data := range written(t, dir, nil) {
		paths[name] = filepath.Join(dir, manifestDir, name)
		if err := os.WriteFile(paths[name], data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	read := func() *manifests {
		m := newManifests()
		m.read(dir)
		return m
	}
	if m := read(); len(m.vms) != 1 || len(m.snapshots) != 1 || len(m.skipped) != 0 {
		t.Errorf("%+v", m)
	}
	change := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	change(os.Chmod(paths["5a5a5a5a.json"], 0o666))
	if m := read(); len(m.snapshots) != 0 || len(m.skipped) != 1 {
		t.Errorf("a manifest that all may write to: %+v", m)
	}
	change(os.Remove(paths["5a5a5a5a.json"]))
	change(os.Symlink(paths["vm-11111111.json"], paths["5a5a5a5a.json"]))
	if m := read(); len(m.snapshots) != 0 || len(m.skipped) != 1 {
		t.Errorf("a link: %+v", m)
	}
	change(os.Chmod(filepath.Join(dir, manifestDir), 0o777))
	if m := read(); len(m.vms) != 0 || len(m.skipped) != 1 {
		t.Errorf("a directory that all may write to: %+v", m)
	}
}

// TestDeletedSnapshotsStayDeleted has manifests that a VM's own does not name: of a
// snapshot that was taken later, and of one that was deleted.
func TestDeletedSnapshotsStayDeleted(t *testing.T) {
	for later, want := range map[time.Duration]int{-time.Minute: 0, time.Minute: 1} {
		m := newManifests()
		for name, data := range written(t, "/srv/vm/web", func(v *vmManifest, s *manifest) {
			v.Snapshots, s.Snapshot.Created = nil, v.Written.Add(later)
		}) {
			if err := m.take(name, data); err != nil {
				t.Fatal(err)
			}
		}
		if got := m.of(m.assemble()[0]); len(got) != want {
			t.Errorf("taken %s after the VM's manifest was written: %+v", later, got)
		}
	}
}

// TestTheLastManifestCounts has a VM whose disks are in two directories.
func TestTheLastManifestCounts(t *testing.T) {
	for _, order := range [][]string{{"old", "new"}, {"new", "old"}} {
		m := newManifests()
		for _, which := range order {
			files := written(t, "/srv/vm/web", func(v *vmManifest, _ *manifest) {
				v.VM.Name = which
				if which == "new" {
					v.Written = v.Written.Add(time.Second)
				}
			})
			if err := m.take("vm-11111111.json", files["vm-11111111.json"]); err != nil {
				t.Fatal(err)
			}
		}
		if got := m.assemble(); len(got) != 1 || got[0].VM.Name != "new" {
			t.Errorf("%v: %+v", order, got)
		}
	}
}

func FuzzManifest(f *testing.F) {
	for name, data := range written(&testing.T{}, "/srv/vm/web", nil) {
		f.Add(name, data)
	}
	f.Fuzz(func(t *testing.T, name string, data []byte) {
		m := newManifests()
		if m.take(name, data) != nil {
			return
		}
		for _, v := range m.assemble() {
			for _, l := range v.Layers {
				if !filepath.IsAbs(l.Path) || filepath.Clean(l.Path) != l.Path {
					t.Fatalf("layer %q", l.Path)
				}
			}
			m.of(v)
		}
	})
}
