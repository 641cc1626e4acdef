package freeze

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func sampleLease(id string) Lease {
	return Lease{
		ID: id,
		Request: Request{
			VM: "web", VMID: "7f3a", Operation: "op1", AgentSocket: "/run/web.qga",
			QEMU: Process{PID: 7, StartTime: 9}, Mountpoints: []string{"/"}, FreezeTimeout: time.Second, Lease: time.Minute,
		},
		Boot: "b", Owner: Process{1, 2}, Guard: Process{3, 4}, State: LeaseHeld,
		Since: time.Unix(1000, 0).UTC(), Deadline: time.Unix(1061, 0).UTC(),
	}
}

func TestLeaseFiles(t *testing.T) {
	dir := t.TempDir()
	young, old := sampleLease(newID()), sampleLease(newID())
	old.Since = old.Since.Add(-time.Hour)
	for _, l := range []Lease{young, old} {
		if err := l.write(dir); err != nil {
			t.Fatal(err)
		}
	}
	leases, err := Leases(dir)
	if diff := cmp.Diff([]Lease{old, young}, leases); err != nil || diff != "" {
		t.Errorf("error %v, leases (-want +got):\n%s", err, diff)
	}
	// What is not a lease, or is half written, is none of ours.
	for _, name := range []string{"notes", old.ID + ".tmp", "../" + filepath.Base(dir) + "/x.json"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	bad := newID()
	if err := os.WriteFile(filepath.Join(dir, bad+".json"), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/hostname", filepath.Join(dir, newID()+".json")); err != nil {
		t.Fatal(err)
	}
	leases, err = Leases(dir)
	if len(leases) != 2 || err == nil || !strings.Contains(err.Error(), bad) {
		t.Errorf("%d leases, error %v, want 2 and an error about %s", len(leases), err, bad)
	}
	for range 2 {
		if err := old.remove(dir); err != nil {
			t.Error(err)
		}
	}
	if leases, _ = Leases(dir); len(leases) != 1 {
		t.Errorf("%d leases, want 1", len(leases))
	}
	if leases, err := Leases(filepath.Join(dir, "none")); err != nil || leases != nil {
		t.Errorf("no directory: %v, error %v", leases, err)
	}
}

func FuzzLease(f *testing.F) {
	good, err := json.Marshal(sampleLease(newID()))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"id":1}`))
	f.Add([]byte(`{"request":{"qemu":{"pid":-1}}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := parseLease(b)
		if err != nil {
			return
		}
		if l.Request.QEMU.PID <= 0 || l.Request.AgentSocket == "" {
			t.Errorf("accepted %+v", l)
		}
		again, err := json.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		if l2, err := parseLease(again); err != nil || !cmp.Equal(l, l2) {
			t.Errorf("error %v, read back (-want +got):\n%s", err, cmp.Diff(l, l2))
		}
	})
}
