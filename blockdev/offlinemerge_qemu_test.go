package blockdev_test

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// pile is a chain of layers that no QEMU has open, each with its backing.
type pile struct {
	t      *testing.T
	tools  string
	layers []string
	format string // of the base; the others are qcow2
}

// newPile writes megabytes into a base and two layers above it: the first hides
// half of the base, the second half of the first.
func newPile(t *testing.T, q testvm.QEMU, format string, megabytes int) *pile {
	t.Helper()
	dir := t.TempDir()
	p := &pile{t: t, tools: filepath.Dir(q.Img), format: format}
	size := fmt.Sprintf("%dM", 4*megabytes)
	for i, name := range []string{"base," + format, "mid.qcow2", "top.qcow2"} {
		path := filepath.Join(dir, name)
		args := []string{"create", "-q", "-f", p.formatOf(i)}
		if i > 0 {
			args = append(args, "-b", p.layers[i-1], "-F", p.formatOf(i-1))
		}
		p.tool("qemu-img", append(args, path, size)...)
		p.layers = append(p.layers, path)
		write := fmt.Sprintf("write -P %d %dM %dM", i+1, i*megabytes/2, megabytes)
		p.tool("qemu-io", "-f", p.formatOf(i), "-c", write, path)
	}
	return p
}

func (p *pile) formatOf(layer int) string {
	if layer == 0 {
		return p.format
	}
	return "qcow2"
}

func (p *pile) tool(name string, args ...string) string {
	p.t.Helper()
	out, err := exec.Command(filepath.Join(p.tools, name), args...).CombinedOutput()
	if err != nil || strings.Contains(string(out), "failed") {
		p.t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// holds fails unless a layer reads as n layers of the pile did at its beginning.
func (p *pile) holds(path, format string, n, megabytes int, when string) {
	p.t.Helper()
	args := []string{"-U", "-r", "-f", format}
	for i := range n {
		end := (i + 2) * megabytes
		if i < n-1 {
			end = (i + 1) * megabytes
		}
		args = append(args, "-c", fmt.Sprintf("read -P %d %dM %dM", i+1, i*megabytes/2, end/2-i*megabytes/2))
	}
	out, err := exec.Command(filepath.Join(p.tools, "qemu-io"), append(args, path)...).CombinedOutput()
	if err != nil || strings.Contains(string(out), "failed") {
		p.t.Errorf("%s: %s: %v\n%s", when, path, err, out)
	}
}

func (p *pile) lock(layers ...int) []*blockdev.Lock {
	p.t.Helper()
	var locks []*blockdev.Lock
	for _, i := range layers {
		l, err := blockdev.LockNoWriters(p.layers[i])
		if err != nil {
			p.t.Fatal(err)
		}
		p.t.Cleanup(func() { _ = l.Close() })
		locks = append(locks, l)
	}
	return locks
}

func (p *pile) hash(layer int) string {
	p.t.Helper()
	b, err := os.ReadFile(p.layers[layer])
	if err != nil {
		p.t.Fatal(err)
	}
	return fmt.Sprintf("%x", sha256.Sum256(b))
}

// writable reports whether a QEMU can open a layer for writing.
func (p *pile) writable(layer int) bool {
	p.t.Helper()
	out, err := exec.Command(filepath.Join(p.tools, "qemu-io"), "-f", p.formatOf(layer), "-c", "info", p.layers[layer]).CombinedOutput()
	if err != nil && !strings.Contains(string(out), "lock") {
		p.t.Fatalf("qemu-io: %v\n%s", err, out)
	}
	return err == nil
}

// forEachTools runs a test with qemu-img of each version, one after the other.
func forEachTools(t *testing.T, f func(t *testing.T, q testvm.QEMU)) {
	t.Helper()
	versions, err := testvm.Versions()
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range versions {
		t.Run(q.Name, func(t *testing.T) {
			t.Setenv("PATH", filepath.Dir(q.Img)+":"+os.Getenv("PATH"))
			f(t, q)
		})
	}
}

func TestQEMUOfflineCommit(t *testing.T) {
	forEachTools(t, func(t *testing.T, q testvm.QEMU) {
		for _, format := range []string{"qcow2", "raw"} {
			p := newPile(t, q, format, 8)
			if err := (blockdev.Offline{}).Commit(context.Background(), p.layers[1], p.layers[0], format); !errors.Is(err, blockdev.ErrNotLocked) {
				t.Errorf("without locks: %v", err)
			}
			top := p.hash(2)
			mid := p.hash(1)
			locks := p.lock(0, 1, 2)
			var last uint64
			o := blockdev.Offline{Locks: locks, Progress: func(done, total uint64) {
				if done > total || done < last {
					t.Errorf("progress %d of %d after %d", done, total, last)
				}
				last = done
			}}
			if err := o.Commit(context.Background(), p.layers[1], p.layers[0], format); err != nil {
				t.Fatal(err)
			}
			if last != 10000 {
				t.Errorf("the last progress was %d", last)
			}
			if p.writable(0) || p.writable(1) {
				t.Error("the locks did not last")
			}
			if p.hash(1) != mid || p.hash(2) != top {
				t.Error("a layer above the base was written to")
			}
			p.holds(p.layers[0], format, 2, 8, "the base after a commit")
			p.holds(p.layers[2], "qcow2", 3, 8, "the top after a commit")
			if err := blockdev.Rebase(context.Background(), p.layers[2], p.layers[0], format); err != nil {
				t.Fatal(err)
			}
			if err := os.Remove(p.layers[1]); err != nil {
				t.Fatal(err)
			}
			p.holds(p.layers[2], "qcow2", 3, 8, "the top without the layer between")
			if err := blockdev.Check(context.Background(), p.layers[2]); err != nil {
				t.Error(err)
			}
		}
	})
}

func TestQEMUOfflineRebase(t *testing.T) {
	forEachTools(t, func(t *testing.T, q testvm.QEMU) {
		p := newPile(t, q, "qcow2", 8)
		o := blockdev.Offline{Locks: p.lock(0, 1, 2)}
		base, mid := p.hash(0), p.hash(1)
		if err := o.Rebase(context.Background(), p.layers[2], p.layers[0], "qcow2"); err != nil {
			t.Fatal(err)
		}
		if p.hash(0) != base || p.hash(1) != mid {
			t.Error("a layer below was written to")
		}
		if err := os.Remove(p.layers[1]); err != nil {
			t.Fatal(err)
		}
		p.holds(p.layers[2], "qcow2", 3, 8, "after the rebase")
		h, err := blockdev.ReadHeaderFile(p.layers[2])
		if err != nil || h.Backing != p.layers[0] || h.BackingFormat != "qcow2" {
			t.Errorf("the header says %+v, %v", h, err)
		}
		if err := o.Rebase(context.Background(), p.layers[2], "", ""); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(p.layers[0]); err != nil {
			t.Fatal(err)
		}
		p.holds(p.layers[2], "qcow2", 3, 8, "flattened")
		if h, err := blockdev.ReadHeaderFile(p.layers[2]); err != nil || h.Backing != "" {
			t.Errorf("the header of a flattened layer names %q, %v", h.Backing, err)
		}
		if err := blockdev.Check(context.Background(), p.layers[2]); err != nil {
			t.Error(err)
		}
	})
}

func TestQEMUOfflineCancelled(t *testing.T) {
	const megabytes = 128
	forEachTools(t, func(t *testing.T, q testvm.QEMU) {
		for _, kind := range []string{"commit", "rebase"} {
			p := newPile(t, q, "qcow2", megabytes)
			why := errors.New("the operator does not want it any more")
			ctx, cancel := context.WithCancelCause(context.Background())
			o := blockdev.Offline{Locks: p.lock(0, 1, 2), Progress: func(done, _ uint64) {
				if done > 0 {
					cancel(why)
				}
			}}
			run := func(ctx context.Context) error {
				if kind == "rebase" {
					return o.Rebase(ctx, p.layers[2], p.layers[0], "qcow2")
				}
				return o.Commit(ctx, p.layers[1], p.layers[0], "qcow2")
			}
			if err := run(ctx); !errors.Is(err, why) {
				t.Errorf("a %s that was cancelled: %v", kind, err)
			}
			for i := 1; i < 3; i++ {
				p.holds(p.layers[i], "qcow2", i+1, megabytes, kind+" cancelled")
			}
			h, err := blockdev.ReadHeaderFile(p.layers[2])
			if err != nil || h.Backing != p.layers[1] {
				t.Errorf("%s cancelled: the header says %+v, %v", kind, h, err)
			}
			o.Progress = nil
			if err := run(context.Background()); err != nil {
				t.Errorf("a %s that was cancelled, again: %v", kind, err)
			}
			p.holds(p.layers[2], "qcow2", 3, megabytes, kind+" again")
		}
	})
}

// offlineAgent makes the test binary the agent that is killed.
const offlineAgent = "VMSNAP_TEST_OFFLINE_AGENT"

// An agent that dies takes its qemu-img with it, and the locks last until then.
func TestQEMUOfflineAgentKilled(t *testing.T) {
	if layers := os.Getenv(offlineAgent); layers != "" {
		beOfflineAgent(strings.Split(layers, ":"))
		return
	}
	forEachTools(t, func(t *testing.T, q testvm.QEMU) {
		p := newPile(t, q, "qcow2", 128)
		cmd := exec.Command(os.Args[0], "-test.run=^TestQEMUOfflineAgentKilled$")
		cmd.Env = append(os.Environ(), offlineAgent+"="+strings.Join(p.layers, ":"))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		line, err := bufio.NewReader(out).ReadString('\n')
		if !strings.Contains(line, "merging") || p.writable(0) {
			t.Fatalf("the merge has not begun: %q, %v", line, err)
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		for deadline := time.Now().Add(10 * time.Second); !p.writable(0); {
			if time.Now().After(deadline) {
				t.Fatal("qemu-img goes on without its agent")
			}
		}
		if got, err := blockdev.AllocatedBytes(context.Background(), p.layers[0], "qcow2"); err != nil || got >= 192<<20 {
			t.Errorf("the base got all of its %d bytes: qemu-img went on without its agent; %v", got, err)
		}
		for i := 1; i < 3; i++ {
			p.holds(p.layers[i], "qcow2", i+1, 128, "after the agent's death")
		}
		o := blockdev.Offline{Locks: p.lock(0, 1, 2)}
		if err := o.Commit(context.Background(), p.layers[1], p.layers[0], "qcow2"); err != nil {
			t.Fatal(err)
		}
		p.holds(p.layers[0], "qcow2", 2, 128, "in the end")
	})
}

func beOfflineAgent(layers []string) {
	var o blockdev.Offline
	for _, path := range layers {
		l, err := blockdev.LockNoWriters(path)
		if err != nil {
			panic(err)
		}
		o.Locks = append(o.Locks, l)
	}
	told := false
	o.Progress = func(done, _ uint64) {
		if done > 0 && !told {
			told = true
			fmt.Println("merging")
		}
	}
	_ = o.Commit(context.Background(), layers[1], layers[0], "qcow2")
	select {} // it is killed, not ended
}
