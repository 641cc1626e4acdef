package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// TestQEMURetention has a guest snapshotted each minute, of which the last three
// stay: what goes is merged under the guest, which notices nothing.
func TestQEMURetention(t *testing.T) {
	t.Parallel() // it waits for minutes
	g := testvm.StartAside(t, testvm.Config{})
	h := newHost(t, g)
	round := 0
	write := func(round int) { put(t, g, "file", fmt.Sprintf("of round %d", round)) }
	write(round)
	h.must("snapshot", "create", g.Name, "mine", "--quiesce", "require")
	h.must("schedule", "create", g.Name, "--name", "each", "--cron", "* * * * *", "--quiesce", "require", "--keep-last", "3")

	taken := map[string]bool{}
	scheduled := func() (names []string) {
		res, err := h.Snapshots().ListSnapshots(h.ctx(), connect.NewRequest(&vmsnapv1.ListSnapshotsRequest{Vm: g.Name}))
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range res.Msg.GetSnapshots() {
			if s.GetName() != "mine" {
				names, taken[s.GetName()] = append(names, s.GetName()), true
			}
		}
		return names
	}
	h.eventually(5*time.Minute, "the fourth has come and the first has gone", func() error {
		names := scheduled()
		if len(taken) > round {
			round = len(taken)
			write(round)
		}
		if len(taken) < 4 || len(names) != 3 {
			return fmt.Errorf("%d were taken, there are %q", len(taken), names)
		}
		return nil
	})
	h.must("schedule", "pause", "each")
	h.eventually(eventLimit, "all has ended", h.idle)
	left := scheduled()
	all := make([]string, 0, len(taken))
	for name := range taken {
		all = append(all, name)
	}
	slices.Sort(all)
	slices.Sort(left)
	if want := all[len(all)-3:]; !slices.Equal(left, want) {
		t.Errorf("of %q there are %q", all, left)
	}
	if out := h.must("snapshot", "list", g.Name, "-o", "name"); !strings.Contains(out, g.Name+"/mine") {
		t.Errorf("one that no schedule took is gone:\n%s", out)
	}
	if n := h.layers(g.Name); !slices.Equal(n, []int{5, 5}) { // of four snapshots, and the active one
		t.Errorf("the disks have %v layers", n)
	}
	h.guestHolds(g, fmt.Sprintf("of round %d", round))
	thawed(t, g)
	for _, name := range append(left, "mine") {
		for _, d := range h.snapshot(g.Name + "/" + name).Disks {
			checkImage(t, g.QEMU(), d.Path)
		}
	}
	g.Kill()
	h.await(g.Name, "stopped")
	if err := g.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.guestHolds(g, fmt.Sprintf("of round %d", round))
}
