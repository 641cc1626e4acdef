package e2e

import (
	"encoding/json"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A mutant is the source without one of its protections. The tests have to
// notice each of them, or they show nothing.
type mutant struct {
	name     string
	file     string // below the module's root
	old, new string // what stands there once, and what takes its place
	test     string
	pkg      string
	says     string // in what the test says when it fails
	slow     bool   // the test takes more than seconds to notice
}

var mutants = []mutant{
	{
		name: "no thaw at recovery", file: "freeze/recover.go",
		old: "\tg, err := startRecovery(ctx, cfg, lease, 0)\n",
		new: "\treturn nil, Outcome{End: ByRecovery}, lease.remove(cfg.Dir)\n\tg, err := startRecovery(ctx, cfg, lease, 0)\n",
		pkg: "./freeze", test: "TestRecover", says: "the guest is frozen",
	},
	{
		name: "the intent is not synced", file: "agent/catalog/catalog.go",
		old: `"synchronous(FULL)"`, new: `"synchronous(OFF)"`,
		pkg: "./agent/catalog", test: "TestPowerCut", says: "acknowledged",
	},
	{
		name: "no mark before a merge", file: "agent/delete.go",
		old: "return d.setStates(ctx, func(_, _ catalog.Snapshot) catalog.PointState { return catalog.PointDeleting })", new: "return nil",
		pkg: "./internal/e2e", test: "TestQEMUWhatIsDeletedIsMarkedFirst", says: "QEMU is about to merge a layer of a snapshot", slow: true,
	},
	{
		name: "the guest runs before its writes are tracked", file: "memdump/background.go",
		old: "return m.RAM.Normal+m.RAM.Duplicate > 0, nil", new: "return m.Status == monitor.MigrationActive, nil",
		pkg: "./memdump", test: "TestNoContBeforeTracking", says: "cont after",
	},
	{
		name: "no resynchronisation after a timeout", file: "qga/client.go",
		old: "may be the answer to something else.\n\t\tc.inStep = false", new: "may be the answer to something else.",
		pkg: "./qga", test: "TestLateReplyWithoutSync", says: "the answer to the question before",
	},
	{
		name: "any answer to a synchronisation is taken", file: "qga/client.go",
		old: "return err == nil && got == id", new: "return err == nil && got != 0",
		pkg: "./qga", test: "TestSyncAgainstForgery", says: "error",
	},
	{
		name: "no lease before the freeze", file: "freeze/hold.go",
		old: "if err := k.announce(); err != nil {", new: "if err := error(nil); err != nil {",
		pkg: "./freeze", test: "TestLeaseBeforeFreeze", says: "lease",
	},
	{
		name: "a freeze is verified by nobody", file: "freeze/hold.go",
		old: `result.Verified = result.Reason == ""`, new: "result.Verified = true",
		pkg: "./freeze", test: "TestVerification", says: "want not verified",
	},
	{
		name: "a guard outlived by a frozen guest", file: "freeze/hold.go",
		old: "\tcase <-ctx.Done():\n\t\treturn k.thawUntilAnswered(AgentGone, \"the agent closed its pipe\")",
		new: "\tcase <-ctx.Done():\n\t\treturn Outcome{End: AgentGone}",
		pkg: "./freeze", test: "TestAgentKilled", says: "frozen false", slow: true,
	},
	{
		name: "a process is known by its number alone", file: "agent/discover/procfs.go",
		old: "return err == nil && !s.dead() && s.startTime == startTime", new: "return err == nil && !s.dead()",
		pkg: "./agent/discover", test: "TestSame", says: "FAIL",
	},
	{
		name: "a failed journal holds up nothing", file: "agent/op/op.go",
		old: "o.id, kind, b); err != nil {\n\t\treturn fmt.Errorf(\"journal %s: %w\", kind, err)", new: "o.id, kind, b); err != nil {\n\t\treturn nil",
		pkg: "./agent/op", test: "TestStoreFailsAtEveryCall", says: "was not announced",
	},
	{
		name: "every caller may do everything", file: "agent/rpc/roles.go",
		old: "if known && listed && role >= need.role {", new: "if known && listed {",
		pkg: "./agent/rpc", test: "TestEveryRoleAtEveryProcedure", says: "permitted is true, and should be false",
	},
	{
		name: "a backing file by protocol", file: "blockdev/image.go",
		old: "slash < 0 || colon < slash", new: "slash < -1 && colon < slash",
		pkg: "./blockdev", test: "TestReadHeaderRefuses", says: "accepted as",
	},
	{
		name: "the launch path follows the pivot", file: "blockdev/merge.go",
		old: "\tif err := a.beforePivot(whole); err != nil {\n\t\treturn s, false, err\n\t}\n\ts, err = a.finalize(whole, m)\n\treturn s, true, err\n",
		new: "\tif s, err = a.finalize(whole, m); err != nil {\n\t\treturn s, false, err\n\t}\n\treturn s, true, a.beforePivot(whole)\n",
		pkg: "./blockdev", test: "TestQEMUKilledAroundThePivot", says: "already, and the launch path does not lead there",
	},
	{
		name: "recovery takes every cut back", file: "agent/recover.go",
		old: "sent, c.cutAt = true, e.Time", new: "c.cutAt = e.Time",
		pkg: "./internal/e2e", test: "TestQEMUDaemonKilledAtEveryChange", says: "does not hold", slow: true,
	},
	{
		name: "covered layers can be written to", file: "blockdev/dir.go",
		old: "want = flags | fsImmutable", new: "want = flags",
		pkg: "./blockdev", test: "TestImmutable", says: "FAIL",
	},
	{
		name: "plain memory is removed and not overwritten", file: "memdump/encrypt.go",
		old: "overwritten := overwrite(file)", new: "overwritten := error(nil)",
		pkg: "./memdump", test: "TestPlainMemoryIsDestroyed", says: "not overwritten",
	},
	{
		name: "memory stays plain when the key is gone", file: "agent/memorykey.go",
		old: "\tif err != nil {\n\t\treturn \"\", fault.New(", new: "\tif err != nil {\n\t\treturn \"\", nil\n\t}\n\tif false {\n\t\treturn \"\", fault.New(",
		pkg: "./internal/e2e", test: "TestQEMUMemoryIsEncrypted", says: "want 1", slow: true,
	},
}

// TestTortureMutants takes each protection away and expects its test to fail.
// Without -torture.rounds it does that for one of them, and for the others makes
// sure that they can still be made.
func TestTortureMutants(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	seed := seedOf(t)
	random := rand.New(rand.NewPCG(seed, 1))
	chosen := random.IntN(len(mutants))
	for mutants[chosen].slow {
		chosen = random.IntN(len(mutants))
	}
	for i, m := range mutants {
		t.Run(strings.ReplaceAll(m.name, " ", "-"), func(t *testing.T) {
			overlay := m.overlay(t, root)
			if i == chosen || thorough() {
				m.dies(t, root, overlay)
			}
		})
	}
}

// seedOf returns the seed of the test's random choices, which it logs.
func seedOf(t *testing.T) uint64 {
	t.Helper()
	seed := *tortureSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d (-torture.seed repeats it)", seed)
	return seed
}

// overlay writes the mutated file, and what tells the go command of it.
func (m mutant) overlay(t *testing.T, root string) string {
	t.Helper()
	path := filepath.Join(root, m.file)
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(text), m.old); n != 1 {
		t.Fatalf("%s has %q %d times, want once: where has the protection gone?", m.file, m.old, n)
	}
	dir := t.TempDir()
	mutated, overlay := filepath.Join(dir, "mutated.go"), filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(mutated, []byte(strings.Replace(string(text), m.old, m.new, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	replace, err := json.Marshal(map[string]any{"Replace": map[string]string{path: mutated}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(overlay, replace, 0o600); err != nil {
		t.Fatal(err)
	}
	return overlay
}

// dies runs the mutant's test, which must fail, and for the right reason.
func (m mutant) dies(t *testing.T, root, overlay string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "test", "-count=1", "-vet=off", "-timeout=10m", "-run", "^"+m.test+"$", m.pkg)
	cmd.Dir = root
	// By the environment, since tests build programs themselves.
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS="+strings.TrimSpace(os.Getenv("GOFLAGS")+" -overlay="+overlay))
	began := time.Now()
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "--- FAIL: "+m.test) || !strings.Contains(string(out), m.says) {
		t.Fatalf("%s does not catch it (%v); its output, in which %q is expected:\n%s", m.test, err, m.says, out)
	}
	tally.add("mutants caught", 1)
	t.Logf("caught by %s in %s", m.test, time.Since(began).Round(time.Second/10))
}
