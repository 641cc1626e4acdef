package catalog

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// childDir names the state directory to a child that is to be killed; childWork
// is set when the child is to run an operation.
const (
	childDir  = "VMSNAP_CATALOG_TEST_CHILD"
	childWork = "VMSNAP_CATALOG_TEST_OPERATION"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		work := appendForEver
		if os.Getenv(childWork) != "" {
			work = runForEver
		}
		fmt.Println("error:", work(dir))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

const doomedEntries = 200

// appendForEver writes journal entries and snapshots and tells of each one once
// it was acknowledged, until it is killed.
func appendForEver(dir string) error {
	ctx := context.Background()
	c, err := Open(ctx, dir, hclog.NewNullLogger())
	if err != nil {
		return err
	}
	vms, err := c.VMs(ctx)
	if err != nil {
		return err
	}
	disks, err := c.Disks(ctx, vms[0].ID)
	if err != nil {
		return err
	}
	for i := range doomedEntries {
		data := json.RawMessage(fmt.Sprintf(`{"n":%d,"pad":%q}`, i, strings.Repeat("x", rand.IntN(9000))))
		if _, err := c.AppendJournal(ctx, "0badcafe", "n", data); err != nil {
			return err
		}
		fmt.Println("entry", i)
		if i%10 == 0 {
			name := fmt.Sprint("s", i)
			if err := c.CommitSnapshot(ctx, Commit{Snapshot: snapshot(vms[0], disks[0], name, name, "web-1")}); err != nil {
				return err
			}
			fmt.Println("snapshot", name)
		}
	}
	return errors.New("nobody killed it")
}

func TestKilledProcessLosesNothingAcknowledged(t *testing.T) {
	for range 5 {
		dir := t.TempDir()
		c, err := Open(t.Context(), dir, hclog.NewNullLogger())
		check(t, err)
		seed(t, c, "web")
		check(t, c.CreateOperation(t.Context(), record("0badcafe", "vm")))
		check(t, c.Close())

		entries, snapshots := runAndKill(t, dir, 1+rand.IntN(doomedEntries-20))
		c = openTest(t, dir)
		got, err := c.Journal(t.Context(), "0badcafe")
		check(t, err)
		// One more may be there: written, and not told of any more.
		if n := len(got); n < entries || n > entries+1 {
			t.Errorf("%d entries, %d were acknowledged", n, entries)
		}
		for i, e := range got {
			var data struct{ N int }
			check(t, json.Unmarshal(e.Data, &data))
			same(t, "entry", data.N, i)
		}
		for _, name := range snapshots {
			s, err := c.Snapshot(t.Context(), name)
			check(t, err)
			same(t, "disks of "+name, len(s.Disks), 2)
		}
	}
}

// runAndKill runs a child until it has told of some entries, kills it, and
// returns all that it told of.
func runAndKill(t *testing.T, dir string, after int) (entries int, snapshots []string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), childDir+"="+dir)
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		kind, what, _ := strings.Cut(lines.Text(), " ")
		switch kind {
		case "entry":
			entries++
		case "snapshot":
			snapshots = append(snapshots, what)
		default:
			t.Fatalf("the child: %s", lines.Text())
		}
		if entries == after {
			check(t, cmd.Process.Kill())
		}
	}
	check(t, lines.Err())
	if err := cmd.Wait(); err == nil {
		t.Fatal("the child ended by itself")
	}
	if entries < after {
		t.Fatalf("the child told of %d entries, want %d", entries, after)
	}
	return entries, snapshots
}

// fill takes all space of a file system and returns what gives it back.
func fill(t *testing.T, dir string) func() {
	t.Helper()
	path := filepath.Join(dir, "ballast")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	check(t, err)
	chunk := make([]byte, 4096)
	for err == nil {
		_, err = f.Write(chunk)
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("fill: %v", err)
	}
	check(t, f.Close())
	return func() { check(t, os.Remove(path)) }
}

func TestFullDiskLosesNothingAcknowledged(t *testing.T) {
	mount := t.TempDir()
	check(t, unix.Mount("tmpfs", mount, "tmpfs", 0, "size=2m,mode=0700"))
	t.Cleanup(func() { check(t, unix.Unmount(mount, 0)) })
	ctx := t.Context()
	c, err := Open(ctx, mount, hclog.NewNullLogger())
	check(t, err)
	check(t, c.CreateOperation(ctx, record("0badcafe", "vm")))

	acknowledged := 0
	appendUntil := func(limit int) error {
		for range limit {
			data := json.RawMessage(fmt.Sprintf(`{"n":%d,"pad":%q}`, acknowledged, strings.Repeat("x", 3000)))
			if _, err := c.AppendJournal(ctx, "0badcafe", "n", data); err != nil {
				return err
			}
			acknowledged++
		}
		return nil
	}
	verify := func(what string) {
		t.Helper()
		got, err := c.Journal(ctx, "0badcafe")
		check(t, err)
		same(t, what, len(got), acknowledged)
		for i, e := range got {
			var data struct{ N int }
			check(t, json.Unmarshal(e.Data, &data))
			same(t, what, data.N, i)
		}
	}

	check(t, appendUntil(20))
	release := fill(t, mount)
	for range 3 { // it fails again and again, and stays whole
		err := appendUntil(10000)
		wantKind(t, "append on a full disk", err, fault.NoSpace)
		if fault.Hint(err) == "" {
			t.Error("no hint on what to do")
		}
		verify("entries on a full disk")
	}
	release()
	check(t, appendUntil(20))
	verify("entries after space was made")

	// A process that stops on a full disk starts on it again, to read at least.
	release = fill(t, mount)
	err = appendUntil(10000)
	wantKind(t, "append on a full disk", err, fault.NoSpace)
	if err := c.Close(); err != nil {
		t.Logf("close on a full disk: %v", err)
	}
	c, err = Open(ctx, mount, hclog.NewNullLogger())
	check(t, err)
	verify("entries after a restart")
	release()
	check(t, c.Close())
}

func TestFullDiskAtOpen(t *testing.T) {
	mount := t.TempDir()
	check(t, unix.Mount("tmpfs", mount, "tmpfs", 0, "size=512k,mode=0700"))
	t.Cleanup(func() { check(t, unix.Unmount(mount, 0)) })
	release := fill(t, mount)
	_, err := Open(t.Context(), mount, hclog.NewNullLogger())
	wantKind(t, "open", err, fault.NoSpace)
	release()
	check(t, reopen(t, mount, realSteps(t)))
}
