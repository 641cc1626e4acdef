package agent

import (
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/vmsnap/vmsnap/agent/fault"
)

func TestProfileFillsInWhatIsOpen(t *testing.T) {
	dir := "/etc/other"
	p := Profile{
		Disks: []string{"r*"}, Exclude: []string{"*-scratch"}, Description: "of the profile", Labels: map[string]string{"a": "1", "b": "2"},
		Quiesce: QuiesceRequire, Mountpoints: []string{"/"}, Lease: time.Minute, Memory: true, MaxPause: time.Second, Hooks: &dir,
	}
	a := &Agent{}
	a.SetProfiles(map[string]Profile{"nightly": p, "weekly": {}})
	req := SnapshotRequest{VM: "web", Profile: "nightly"}
	if err := a.checkRequest(&req); err != nil {
		t.Fatal(err)
	}
	want := SnapshotRequest{
		VM: "web", Profile: "nightly", DiskPatterns: p.Disks, ExcludePatterns: p.Exclude, Description: "of the profile", Labels: p.Labels,
		Quiesce: QuiesceRequire, Mountpoints: []string{"/"}, FreezeTimeout: DefaultFreezeTimeout, Lease: time.Minute, Memory: true,
		MaxPause: time.Second, Hooks: &dir,
	}
	if d := cmp.Diff(want, req); d != "" {
		t.Error(d)
	}
	own := SnapshotRequest{
		Profile: "nightly", Disks: []string{"data"}, Description: "own", Labels: map[string]string{"b": "3"}, Quiesce: QuiesceNone, Lease: time.Second, MaxPause: time.Hour,
	}
	if err := a.checkRequest(&own); err != nil {
		t.Fatal(err)
	}
	want = SnapshotRequest{
		Profile: "nightly", Disks: []string{"data"}, Description: "own", Labels: map[string]string{"a": "1", "b": "3"}, Quiesce: QuiesceNone,
		FreezeTimeout: DefaultFreezeTimeout, Lease: time.Second, Memory: true, MaxPause: time.Hour, Hooks: &dir,
	}
	if d := cmp.Diff(want, own); d != "" {
		t.Errorf("what is given goes before it: %s", d)
	}
	if d := cmp.Diff(map[string]string{"a": "1", "b": "2"}, p.Labels); d != "" {
		t.Errorf("the profile has changed: %s", d)
	}
	err := a.checkRequest(&SnapshotRequest{Profile: "nihgtly"})
	var unknown *fault.Error
	if !errors.As(err, &unknown) || unknown.Kind != fault.NotFound || unknown.Hint != "known are nightly, weekly" {
		t.Errorf("an unknown profile: %#v", err)
	}
}

func TestTakesDisk(t *testing.T) {
	for _, c := range []struct {
		req             SnapshotRequest
		takes, excluded string
	}{
		{SnapshotRequest{}, "root data data-scratch ", ""},
		{SnapshotRequest{Disks: []string{"root"}}, "root ", ""},
		{SnapshotRequest{Exclude: []string{"root"}}, "data data-scratch ", "root "},
		{SnapshotRequest{DiskPatterns: []string{"data*"}}, "data data-scratch ", ""},
		{SnapshotRequest{DiskPatterns: []string{"data*"}, ExcludePatterns: []string{"*scratch"}}, "data ", "data-scratch "},
		{SnapshotRequest{DiskPatterns: []string{"nvme*"}}, "", ""},
	} {
		takes, excluded := "", ""
		for _, d := range []string{"root", "data", "data-scratch"} {
			yes, no := c.req.takesDisk(d)
			if yes {
				takes += d + " "
			}
			if no {
				excluded += d + " "
			}
		}
		if takes != c.takes || excluded != c.excluded {
			t.Errorf("%+v: takes %q and excludes %q", c.req, takes, excluded)
		}
	}
}
