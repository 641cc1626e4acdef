package catalog

import (
	"encoding/json"
	"flag"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
)

var (
	cuts    = flag.Int("powercut.cuts", 12, "at how many moments TestPowerCut cuts the power")
	cutSeed = flag.Uint64("powercut.seed", 0, "seed of TestPowerCut; 0 takes one from the clock")
)

// TestPowerCut writes down what a process that appends to its journal does to the
// files of the catalog, and cuts the power at random moments: of what was written
// since a file was last synced, any part may be on the disk. The catalog must
// open, and hold all that was acknowledged before.
func TestPowerCut(t *testing.T) {
	seed := *cutSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d (-powercut.seed repeats it)", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	dir := t.TempDir()
	c, err := Open(t.Context(), dir, hclog.NewNullLogger())
	check(t, err)
	seedVM(t, c)
	check(t, c.Close())
	host := newDisk(t, dir)
	events := recordAppends(t, dir)
	if n := len(events); n < 500 {
		t.Fatalf("only %d events", n)
	}
	at := make([]int, *cuts)
	for i := range at {
		at[i] = random.IntN(len(events))
	}
	slices.Sort(at)
	var told acknowledged
	for i, e := range events {
		host.apply(t, e)
		told.hear(e.said)
		for len(at) > 0 && at[0] == i {
			at = at[1:]
			verifyCut(t, host.cut(t, random), told, i)
		}
		if t.Failed() {
			return
		}
	}
	if told.entries != doomedEntries {
		t.Errorf("%d entries were acknowledged, want %d", told.entries, doomedEntries)
	}
}

// acknowledged is what a process has told of.
type acknowledged struct {
	entries   int
	snapshots []string
}

func (a *acknowledged) hear(line string) {
	switch kind, what, _ := strings.Cut(strings.TrimSpace(line), " "); kind {
	case "entry":
		a.entries++
	case "snapshot":
		a.snapshots = append(a.snapshots, what)
	}
}

// verifyCut opens the catalog that a power cut has left.
func verifyCut(t *testing.T, dir string, told acknowledged, at int) {
	t.Helper()
	c, err := Open(t.Context(), dir, hclog.NewNullLogger())
	if err != nil {
		t.Errorf("event %d: the catalog does not open: %v", at, err)
		return
	}
	defer func() { check(t, c.Close()) }()
	got, err := c.Journal(t.Context(), "0badcafe")
	check(t, err)
	// One more may be there: written, and not told of.
	if n := len(got); n < told.entries || n > told.entries+1 {
		t.Errorf("event %d: %d entries, %d were acknowledged", at, n, told.entries)
	}
	for i, e := range got {
		var data struct{ N int }
		check(t, json.Unmarshal(e.Data, &data))
		same(t, "entry", data.N, i)
	}
	for _, name := range told.snapshots {
		if s, err := c.Snapshot(t.Context(), name); err != nil || len(s.Disks) != 2 {
			t.Errorf("event %d: the acknowledged snapshot %s: %v", at, name, err)
		}
	}
}

func seedVM(t *testing.T, c *Catalog) {
	t.Helper()
	seed(t, c, "web")
	check(t, c.CreateOperation(t.Context(), record("0badcafe", "vm")))
}

// recordAppends runs a process that appends entries, and returns what it did to the
// files of a directory and what it said, in order.
func recordAppends(t *testing.T, dir string) (events []fileEvent) {
	t.Helper()
	trace := filepath.Join(t.TempDir(), "trace")
	cmd := exec.CommandContext(t.Context(), "strace", "-f", "--seccomp-bpf", "-q", "-y", "-xx", "-s", "1000000", "-o", trace, "-e", "trace="+strings.Join(fileCalls, ","), os.Args[0])
	cmd.Env = append(os.Environ(), childDir+"="+dir)
	if out, err := cmd.CombinedOutput(); !strings.Contains(string(out), "nobody killed it") {
		t.Fatalf("strace: %v\n%s", err, out)
	}
	text, err := os.ReadFile(trace)
	check(t, err)
	p := traceParser{dir: dir + "/", unfinished: map[string]fileEvent{}}
	for line := range strings.Lines(string(text)) {
		e, ok, err := p.parse(strings.TrimSuffix(line, "\n"))
		check(t, err)
		if ok {
			events = append(events, e)
		}
	}
	return events
}
