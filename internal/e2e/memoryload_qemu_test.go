package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/memdump"
	"github.com/vmsnap/vmsnap/monitor"
	"github.com/vmsnap/vmsnap/qga"
)

// memoryOf returns the path of a snapshot's memory.
func (h *host) memoryOf(ref string) string {
	h.t.Helper()
	memory, _ := h.object("snapshot", "show", ref)["memory"].(map[string]any)
	path, _ := memory["path"].(string)
	if path == "" {
		h.t.Fatalf("%s has no memory", ref)
	}
	return path
}

// goBack has a fresh QEMU go on from a snapshot: fresh overlays on its layers,
// and its memory.
func goBack(t *testing.T, q testvm.QEMU, g *testvm.Guest, disks []snapshotDisk, memory string) {
	t.Helper()
	g.Kill()
	for _, d := range disks {
		launch := g.Disk(d.Device).Path
		if err := os.Remove(launch); err != nil {
			t.Fatal(err)
		}
		img(t, q, "create", "-q", "-f", "qcow2", "-b", d.Path, "-F", d.Format, launch)
	}
	err := g.Load(t.Context(), func(ctx context.Context) error { return load(ctx, g, memory) })
	if err != nil {
		t.Fatalf("%s: %v", memory, err)
	}
}

func load(ctx context.Context, g *testvm.Guest, memory string) error {
	s, err := monitor.Dial(ctx, g.QMPSocket())
	if err != nil {
		return err
	}
	defer func() { _ = s.Close() }()
	if err := loadInto(ctx, s, memory); err != nil {
		return err
	}
	return s.Cont(ctx)
}

// loadInto has a QEMU that waits for a memory load it.
func loadInto(ctx context.Context, s *monitor.Session, memory string) error {
	dir, err := os.OpenRoot(filepath.Dir(memory))
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	stream, err := memdump.OpenStream(ctx, dir, filepath.Base(memory), nil)
	if err != nil {
		return err
	}
	defer func() { _ = stream.Close() }()
	if err := s.ExecuteWithFile(ctx, "getfd", map[string]string{"fdname": "memory"}, nil, stream.File); err != nil {
		return err
	}
	if err := stream.Release(); err != nil {
		return err
	}
	if err := s.Execute(ctx, "migrate-incoming", map[string]string{"uri": "fd:memory"}, nil); err != nil {
		return err
	}
	for {
		m, err := s.QueryMigrate(ctx)
		if err != nil {
			return err
		}
		if m.Status == monitor.MigrationCompleted {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the load is %s: %w", m.Status, ctx.Err())
		case <-time.After(5 * time.Millisecond): // its event needs a capability
		}
	}
}

// strategies are those that memory can be saved with here: QEMU before 9.0 would
// miss changes of the memory of an emulated guest in precopy.
func strategies(q testvm.QEMU) []string {
	if q.Name == "7.2" {
		return []string{"background", "stopped"}
	}
	return []string{"background", "precopy", "stopped"}
}

// counts verifies that the guest's counter goes on, which finds out whether its
// memory and its disks are of one instant.
func counts(t *testing.T, g *testvm.Guest, when string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), eventLimit)
	defer cancel()
	first, err := g.Count(ctx)
	for n := first; err == nil && n < first+5; {
		n, err = g.Count(ctx)
	}
	if err != nil {
		t.Fatalf("%s: the guest does not count: %v", when, err)
	}
}

func TestQEMUMemoryIsOfTheCut(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		g := testvm.Start(t, testvm.Config{QEMU: q, Disks: testvm.TwoDisks()})
		h := newHost(t, g)
		if err := g.StartCounter(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := g.Dirty(t.Context(), 48<<20, 10<<20); err != nil {
			t.Fatal(err)
		}
		taken, wanted := map[string]shown{}, map[string]string{"packed": "--compress", "frozen": "--quiesce require"}
		for _, strategy := range strategies(q) {
			wanted[strategy] = "--memory-strategy " + strategy
		}
		for name, flags := range wanted {
			h.must(append([]string{"snapshot", "create", g.Name, name, "--memory"}, strings.Fields(flags)...)...)
			counts(t, g, "after "+name)
			h.must("snapshot", "verify", g.Name+"/"+name)
			taken[name] = h.snapshot(g.Name + "/" + name)
		}
		memories := map[string]string{}
		for name, s := range taken {
			if s.Consistency != "memory" || len(s.Warnings) > 0 || name == "frozen" && s.Quiesce.Frozen != 2 {
				t.Errorf("%s: %+v", name, s)
			}
			memories[name] = h.memoryOf(g.Name + "/" + name)
		}
		h.signal(syscall.SIGKILL) // what comes next is not for it to see
		for name, s := range taken {
			goBack(t, q, g, s.Disks, memories[name])
			if name == "frozen" {
				c, err := qga.Dial(t.Context(), g.AgentSocket(), qga.DefaultLimits)
				if err != nil {
					t.Fatal(err)
				}
				if n, err := c.Thaw(t.Context()); err != nil || n != 2 {
					t.Errorf("%d file systems were frozen, error %v", n, err)
				}
				_ = c.Close()
			}
			counts(t, g, "loaded "+name)
			thawed(t, g)
		}
	})
}

// layers returns how many layers each disk of a VM has.
func (h *host) layers(vm string) (n []int) {
	h.t.Helper()
	v, err := h.vm(vm)
	if err != nil {
		h.t.Fatal(err)
	}
	for _, d := range v.GetDisks() {
		n = append(n, len(d.GetLayers()))
	}
	return n
}

// memoryFiles returns the memory files beside the disks in a directory.
func memoryFiles(t *testing.T, dir string) []string {
	t.Helper()
	files, err := filepath.Glob(dir + "/.vmsnap/*.mem*")
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// TestQEMUMemoryInterrupted cancels saves, and kills the daemon, at random
// moments: the guest runs on, and the snapshot is whole or has left nothing.
func TestQEMUMemoryInterrupted(t *testing.T) {
	seed := *tortureSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		t.Logf("seed %d (-torture.seed repeats it)", seed)
		random := rand.New(rand.NewPCG(seed, 1))
		g := testvm.Start(t, testvm.Config{QEMU: q, Disks: testvm.TwoDisks()})
		h := newHost(t, g)
		if err := g.StartCounter(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := g.Dirty(t.Context(), 64<<20, 20<<20); err != nil {
			t.Fatal(err)
		}
		whole := 0
		for round := range *tortureRounds {
			name, kills := fmt.Sprintf("s%d", round), round%2 == 1
			delay := time.Duration(random.IntN(700)) * time.Millisecond
			when := fmt.Sprintf("round %d: after %s, killed: %v", round, delay, kills)
			id := strings.TrimSpace(h.must("snapshot", "create", g.Name, name, "--memory", "--detach", "-o", "name"))
			<-time.After(delay)
			if kills {
				h.signal(syscall.SIGKILL)
			} else if err := h.cancel(id); err != nil && !strings.Contains(err.Error(), "cannot be cancelled") {
				t.Fatalf("%s: %v", when, err)
			}
			counts(t, g, when)
			if kills {
				h.start()
			}
			h.run("operation", "watch", id)
			h.await(g.Name, "running")
			if h.run("snapshot", "show", g.Name+"/"+name).code == 0 {
				whole++
				h.must("snapshot", "verify", g.Name+"/"+name)
			}
			if n := len(memoryFiles(t, g.Dir)); n != whole {
				t.Fatalf("%s: %d memory files of %d snapshots: %v\n%s", when, n, whole, memoryFiles(t, g.Dir), h.log)
			}
			h.eventually(eventLimit, when+": the layers", func() error {
				if n := h.layers(g.Name); len(n) != 2 || n[0] != whole+1 || n[1] != whole+1 {
					return fmt.Errorf("%v layers, %d snapshots", n, whole)
				}
				return nil
			})
			counts(t, g, when+", at last")
		}
		t.Logf("%d of the snapshots came about", whole)
		if j := h.journal(); len(j) > 0 {
			t.Errorf("journal %v", j)
		}
		thawed(t, g)
	})
}
