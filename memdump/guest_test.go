package memdump

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/internal/testvm"
	"github.com/vmsnap/vmsnap/monitor"
)

// savedGuest is a booted guest whose memory and disks are saved.
type savedGuest struct {
	*testvm.Guest
	t       *testing.T
	session *monitor.Session
	dir     string
	files   int
	cuts    int
}

func startSavedGuest(t *testing.T, q testvm.QEMU, c testvm.Config) *savedGuest {
	t.Helper()
	c.QEMU = q
	dir, err := os.MkdirTemp("", "save-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	g := &savedGuest{Guest: testvm.Start(t, c), t: t, dir: dir}
	g.dial()
	t.Cleanup(func() { _ = g.session.Close() })
	return g
}

// dial takes the monitor of the QEMU that runs now.
func (g *savedGuest) dial() {
	g.t.Helper()
	if g.session != nil {
		_ = g.session.Close()
	}
	s, err := monitor.Dial(g.ctx(), g.QMPSocket())
	if err != nil {
		g.t.Fatal(err)
	}
	g.session = s
}

func (g *savedGuest) ctx() context.Context {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(g.t.Context(), 60*time.Second)
	g.t.Cleanup(cancel)
	return ctx
}

// target makes a file of its own for a stream, with space reserved.
func (g *savedGuest) target(reserve uint64) *os.File {
	g.t.Helper()
	g.files++
	f, err := os.OpenFile(filepath.Join(g.dir, fmt.Sprintf("memory%d", g.files)), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { _ = f.Close() })
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, int64(reserve)); err != nil {
		g.t.Fatal(err)
	}
	return f
}

func (g *savedGuest) probe() Facts {
	g.t.Helper()
	f, err := Probe(g.ctx(), g.session, g.PID())
	if err != nil {
		g.t.Fatal(err)
	}
	return f
}

// config is that of a save by a strategy, into a file of its own.
func (g *savedGuest) config(strategy Strategy) Config {
	g.t.Helper()
	f := g.probe()
	f.Inexact = "" // how a save goes is the same with KVM; TestQEMUPrecopyOfAnEmulatedGuest has the rest
	if _, err := Choose(f, strategy); err != nil {
		g.t.Fatal(err)
	}
	return Config{
		Session: g.session, Strategy: strategy, Facts: f, ID: fmt.Sprintf("save%d", g.files),
		Target: g.target(f.Reserve()), PID: g.PID(), Guard: &countingGuard{},
	}
}

func (g *savedGuest) prepare(c Config) *Save {
	g.t.Helper()
	s, err := Prepare(g.ctx(), c)
	if err != nil {
		g.t.Fatal(err)
	}
	return s
}

// cutDisks puts an overlay on each disk in one transaction. The images that the
// launch command names are then what the cut left.
func (g *savedGuest) cutDisks(ctx context.Context) error {
	g.cuts++
	var actions []any
	for _, d := range g.Disks() {
		actions = append(actions, map[string]any{"type": "blockdev-snapshot-sync", "data": map[string]any{
			"device": "drive-" + d.Name, "format": "qcow2",
			"snapshot-file": filepath.Join(g.dir, fmt.Sprintf("%s.%d.qcow2", d.Name, g.cuts)),
		}})
	}
	return g.session.Execute(ctx, "transaction", map[string]any{"actions": actions}, nil)
}

// load kills the guest and has a fresh QEMU load its memory from a file, on the
// disks as the cut left them.
func (g *savedGuest) load(file *os.File) {
	g.t.Helper()
	_ = g.session.Close()
	if err := g.Load(g.ctx(), func(ctx context.Context) error { return g.loadStream(ctx, file) }); err != nil {
		g.t.Fatal(err)
	}
}

func (g *savedGuest) loadStream(ctx context.Context, file *os.File) error {
	s, err := monitor.Dial(ctx, g.QMPSocket())
	if err != nil {
		return err
	}
	g.session = s
	if _, err := file.Seek(0, 0); err != nil {
		return err
	}
	if err := s.ExecuteWithFile(ctx, "getfd", map[string]string{"fdname": "memory"}, nil, file); err != nil {
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
			return s.Cont(ctx)
		}
		if m.Status == monitor.MigrationFailed {
			return fmt.Errorf("load: %s", m.ErrorDesc)
		}
		select {
		case <-time.After(10 * time.Millisecond): // no event without the capability
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// counts waits until the guest's counter has come n further, and returns where
// it stands. It fails if memory and disks are not of one instant.
func (g *savedGuest) counts(n uint64) uint64 {
	g.t.Helper()
	ctx := g.ctx()
	first, err := g.Count(ctx)
	for now := first; ; {
		if err != nil {
			g.t.Fatal(err)
		}
		if now >= first+n {
			return now
		}
		now, err = g.Count(ctx)
	}
}

func (g *savedGuest) wantStatus(want monitor.RunState) {
	g.t.Helper()
	st, err := g.session.QueryStatus(g.ctx())
	if err != nil || st.Status != want {
		g.t.Errorf("the VM is %s, %v; want %s", st.Status, err, want)
	}
}

// ownersSettings are settings that an owner may have made, none of which a save
// can be made with.
func (g *savedGuest) ownersSettings() {
	g.t.Helper()
	caps := map[string]bool{"xbzrle": true, "auto-converge": true, "dirty-bitmaps": true}
	if err := setCapabilities(g.ctx(), g.session, caps); err != nil {
		g.t.Fatal(err)
	}
	args := map[string]any{"max-bandwidth": 7 << 20, "downtime-limit": 77}
	if g.session.AtLeast(9, 0) {
		args["zero-page-detection"] = "none"
	}
	if err := g.session.Execute(g.ctx(), "migrate-set-parameters", args, nil); err != nil {
		g.t.Fatal(err)
	}
}

// settings are all migration settings as they are.
func (g *savedGuest) settings() map[string]string {
	g.t.Helper()
	caps, err := queryCapabilities(g.ctx(), g.session)
	if err != nil {
		g.t.Fatal(err)
	}
	var parameters map[string]json.RawMessage
	if err := g.session.Execute(g.ctx(), "query-migrate-parameters", nil, &parameters); err != nil {
		g.t.Fatal(err)
	}
	all := map[string]string{}
	for name, on := range caps {
		all["capability "+name] = fmt.Sprint(on)
	}
	for name, value := range parameters {
		all["parameter "+name] = string(value)
	}
	return all
}

// closed closes a save and verifies that the settings are as before.
func (g *savedGuest) closed(s *Save, before map[string]string) {
	g.t.Helper()
	for range 2 { // the second time there is nothing to do
		if err := s.Close(g.ctx()); err != nil {
			g.t.Error(err)
		}
	}
	if diff := cmp.Diff(before, g.settings()); diff != "" {
		g.t.Errorf("the owner's settings have changed (-before +after)\n%s", diff)
	}
}

// countingGuard is a guard that notes what it is told.
type countingGuard struct {
	mu      sync.Mutex
	calls   []string
	acts    bool // says that it has resumed the VM
	refuses error
	// onArm is called with each Arm.
	onArm func()
}

func (g *countingGuard) Arm(limit time.Duration) error {
	g.note("arm")
	if limit <= 0 {
		return fmt.Errorf("a limit of %s", limit)
	}
	if g.onArm != nil {
		g.onArm()
	}
	return g.refuses
}

func (g *countingGuard) Disarm() (bool, error) {
	g.note("disarm")
	return g.acts, nil
}

func (g *countingGuard) note(call string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.calls = append(g.calls, call)
}

// want verifies the calls so far.
func (g *countingGuard) want(t *testing.T, calls ...string) {
	t.Helper()
	g.mu.Lock()
	defer g.mu.Unlock()
	if !slices.Equal(g.calls, calls) {
		t.Errorf("the guard was told to %v, want %v", g.calls, calls)
	}
}
