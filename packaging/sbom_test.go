package packaging

import (
	"debug/buildinfo"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestSBOM compares the bills of materials in the packages with what the linker
// has noted in the programs, and the packages with each other.
func TestSBOM(t *testing.T) {
	root := t.TempDir()
	deb, rpm := filepath.Join(root, "deb"), filepath.Join(root, "rpm")
	output(t, "dpkg-deb", "--extract", filepath.Join(packages(t), version1, "vmsnap_"+version1+"_amd64.deb"), deb)
	if err := os.Mkdir(rpm, 0o755); err != nil {
		t.Fatal(err)
	}
	output(t, "rpm", "--root", rpm, "--install", "--nodeps", "--noscripts", rpmFile(t, version1))
	for _, program := range []string{"vmsnap", "vmsnapd"} {
		at := "usr/share/doc/vmsnap/" + program + ".cdx.json"
		text, err := os.ReadFile(filepath.Join(deb, at))
		if err != nil {
			t.Fatal(err)
		}
		if other, err := os.ReadFile(filepath.Join(rpm, at)); err != nil || string(other) != string(text) {
			t.Errorf("%s: the rpm has another: %v", at, err)
		}
		var bom struct {
			Metadata   struct{ Component struct{ Version string } }
			Components []struct{ Name, Version string }
		}
		if err := json.Unmarshal(text, &bom); err != nil {
			t.Fatal(err)
		}
		if got := bom.Metadata.Component.Version; got != "v"+version1 {
			t.Errorf("%s: of version %s", at, got)
		}
		info, err := buildinfo.ReadFile(filepath.Join(deb, "usr/bin", program))
		if err != nil {
			t.Fatal(err)
		}
		want := []string{"std " + info.GoVersion}
		for _, m := range info.Deps {
			want = append(want, m.Path+" "+m.Version)
		}
		var got []string
		for _, c := range bom.Components {
			got = append(got, c.Name+" "+c.Version)
		}
		slices.Sort(want)
		slices.Sort(got)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-what it is made of +what it says):\n%s", at, diff)
		}
	}
}
