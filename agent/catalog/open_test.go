package catalog

import (
	"context"
	"database/sql"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// reopen opens a catalog with the steps of a test and closes it again.
func reopen(t *testing.T, dir string, steps []step) error {
	t.Helper()
	c, err := open(t.Context(), dir, hclog.NewNullLogger(), steps)
	if err != nil {
		return err
	}
	check(t, c.Close())
	return nil
}

func realSteps(t *testing.T) []step {
	t.Helper()
	steps, err := embeddedSteps()
	check(t, err)
	return steps
}

// sqlOn runs statements on a database file that no catalog has open.
func sqlOn(t *testing.T, path, text string) {
	t.Helper()
	db, err := sql.Open("sqlite", dsn(path))
	check(t, err)
	_, err = db.Exec(text)
	check(t, err)
	check(t, db.Close())
}

func TestOpenTwice(t *testing.T) {
	dir := t.TempDir()
	first, err := Open(t.Context(), dir, hclog.NewNullLogger())
	check(t, err)
	_, err = Open(t.Context(), dir, hclog.NewNullLogger())
	wantKind(t, "second", err, fault.Busy)
	if want := "in use by process "; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%v, want it to say %q", err, want)
	}
	check(t, first.Close())
	check(t, reopen(t, dir, realSteps(t)))
}

func TestFilesArePrivate(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a?b%20c#d", "state")
	c := openTest(t, dir)
	seed(t, c, "web")
	info, err := os.Stat(dir)
	check(t, err)
	same(t, "mode of the directory", info.Mode().Perm(), fs.FileMode(0o700))
	entries, err := os.ReadDir(dir)
	check(t, err)
	var names []string
	for _, e := range entries {
		info, err := e.Info()
		check(t, err)
		same(t, "mode of "+e.Name(), info.Mode().Perm(), fs.FileMode(0o600))
		names = append(names, e.Name())
	}
	same(t, "files", names, []string{"catalog.db", "catalog.db-shm", "catalog.db-wal", "catalog.lock"})
}

func TestStateDirectoryOfOthers(t *testing.T) {
	for name, tc := range map[string]struct {
		mode fs.FileMode
		file string
		kind fault.Kind
		want fs.FileMode
	}{
		"empty":                  {0o755, "", "", 0o700},
		"was opened before":      {0o755, fileName, "", 0o700},
		"private, other files":   {0o700, "passwd", "", 0o700},
		"open to all, not empty": {0o755, "passwd", fault.Denied, 0o755},
		"like /tmp":              {0o777, "passwd", fault.Denied, 0o777},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if tc.file != "" {
				check(t, os.WriteFile(filepath.Join(dir, tc.file), nil, 0o644))
			}
			check(t, os.Chmod(dir, tc.mode))
			err := reopen(t, dir, realSteps(t))
			if tc.kind == "" {
				check(t, err)
			} else {
				wantKind(t, "open", err, tc.kind)
			}
			info, err := os.Stat(dir)
			check(t, err)
			same(t, "mode", info.Mode().Perm(), tc.want)
		})
	}
}

func TestConnectionsAreDurable(t *testing.T) {
	ctx, c := t.Context(), openTest(t, t.TempDir())
	for name, db := range map[string]*sql.DB{"write": c.write, "read": c.read} {
		var mode string
		var synchronous, references, readOnly int
		check(t, db.QueryRowContext(ctx, "PRAGMA journal_mode").Scan(&mode))
		check(t, db.QueryRowContext(ctx, "PRAGMA synchronous").Scan(&synchronous))
		check(t, db.QueryRowContext(ctx, "PRAGMA foreign_keys").Scan(&references))
		check(t, db.QueryRowContext(ctx, "PRAGMA query_only").Scan(&readOnly))
		same(t, name+": journal", mode, "wal")
		if name == "write" {
			same(t, "synchronous and foreign keys", []int{synchronous, references}, []int{2, 1})
		} else {
			same(t, "read only", readOnly, 1)
		}
	}
}

func TestNewerFormatIsRefused(t *testing.T) {
	dir := t.TempDir()
	steps := realSteps(t)
	newer := append(steps[:len(steps):len(steps)], step{"next.sql", "CREATE TABLE more (x) "})
	check(t, reopen(t, dir, newer))
	before, err := os.ReadFile(filepath.Join(dir, fileName))
	check(t, err)
	wantKind(t, "open", reopen(t, dir, steps), fault.Unsupported)
	after, err := os.ReadFile(filepath.Join(dir, fileName))
	check(t, err)
	if string(before) != string(after) {
		t.Error("the database was changed")
	}
}

func TestMigrationKeepsWhatWasThere(t *testing.T) {
	dir := t.TempDir()
	c, err := Open(t.Context(), dir, hclog.NewNullLogger())
	check(t, err)
	vm, _ := seed(t, c, "web")
	check(t, c.Close())

	// The table is rebuilt, SQLite's way to change one. With foreign keys on
	// this would take the disks and layers with it.
	steps := append(realSteps(t), step{"rebuild.sql", `
		CREATE TABLE new (id TEXT PRIMARY KEY, name TEXT NOT NULL, uuid TEXT NOT NULL, identity TEXT NOT NULL UNIQUE,
			unit TEXT NOT NULL, first_seen INTEGER NOT NULL, last_seen INTEGER NOT NULL, stopped TEXT NOT NULL,
			command TEXT NOT NULL, note TEXT NOT NULL DEFAULT '') STRICT;
		INSERT INTO new SELECT *, 'kept' FROM vms;
		DROP TABLE vms;
		ALTER TABLE new RENAME TO vms;`})
	c, err = open(t.Context(), dir, hclog.NewNullLogger(), steps)
	check(t, err)
	got, err := c.VM(t.Context(), vm.ID)
	check(t, err)
	same(t, "VM", got, vm)
	layers, err := c.Layers(t.Context(), vm.ID)
	check(t, err)
	same(t, "layers", len(layers), 2)
	check(t, c.DeleteVM(t.Context(), vm.ID))
	layers, err = c.Layers(t.Context(), vm.ID)
	check(t, err)
	same(t, "layers after the VM went", len(layers), 0)
	check(t, c.Close())

	// The copy made before is a whole catalog of the old format.
	backup := filepath.Join(dir, fmt.Sprintf("catalog.v%d.db", len(steps)-1))
	info, err := os.Stat(backup)
	check(t, err)
	same(t, "mode of the backup", info.Mode().Perm(), fs.FileMode(0o600))
	old := t.TempDir()
	check(t, os.Rename(backup, filepath.Join(old, fileName)))
	got, err = openTest(t, old).VM(t.Context(), vm.ID)
	check(t, err)
	same(t, "VM in the backup", got, vm)
}

func TestMigrationThatFailsChangesNothing(t *testing.T) {
	for name, text := range map[string]string{
		"wrong statement":   "CREATE TABLE more (x); INSERT INTO nowhere VALUES (1)",
		"broken references": "CREATE TABLE more (x); INSERT INTO journal (operation, kind, data, time) VALUES ('x', '', '', 0)",
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			check(t, reopen(t, dir, realSteps(t)))
			wantKind(t, "open", reopen(t, dir, append(realSteps(t), step{"bad.sql", text})), fault.Failed)
			c := openTest(t, dir)
			tables, err := query(t.Context(), c.reader, scanValue[string], "SELECT name FROM sqlite_schema WHERE name = 'more'")
			check(t, err)
			same(t, "tables of the failed step", len(tables), 0)
			seed(t, c, "web")
		})
	}
}

func TestDatabaseOfAnotherProgram(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, fileName)
	sqlOn(t, path, "CREATE TABLE theirs (x)")
	wantKind(t, "open", reopen(t, dir, realSteps(t)), fault.Denied)
}

func TestDamagedDatabase(t *testing.T) {
	for name, damage := range map[string]func(b []byte){
		"no database at all": func(b []byte) { copy(b, "this is not SQLite") },
		"a page of noise": func(b []byte) {
			for i := 2 * 4096; i < 3*4096; i++ {
				b[i] = byte(i * 7)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			c, err := Open(t.Context(), dir, hclog.NewNullLogger())
			check(t, err)
			seed(t, c, "web")
			check(t, c.Close())
			path := filepath.Join(dir, fileName)
			b, err := os.ReadFile(path)
			check(t, err)
			damage(b)
			check(t, os.WriteFile(path, b, 0o600))
			err = reopen(t, dir, realSteps(t))
			wantKind(t, "open", err, fault.Failed)
			if !strings.Contains(fault.Hint(err), "manifests") {
				t.Errorf("hint %q of %v does not tell what to do", fault.Hint(err), err)
			}
		})
	}
}

func TestOpenEndsWithItsContext(t *testing.T) {
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Open(ctx, dir, hclog.NewNullLogger()); err == nil {
		t.Fatal("opened")
	}
	check(t, reopen(t, dir, realSteps(t))) // and left nothing locked
}

// TestLockLeftToAChild has a process die that was starting another: the lock is
// that one's for a moment.
func TestLockLeftToAChild(t *testing.T) {
	dir := t.TempDir()
	l, err := lockDir(dir)
	check(t, err)
	gone := exec.Command("true")
	check(t, gone.Run())
	check(t, os.WriteFile(filepath.Join(dir, lockName), []byte(strconv.Itoa(gone.Process.Pid)+"\n"), 0o600))
	time.AfterFunc(50*time.Millisecond, func() { _ = l.release() })
	again, err := lockDir(dir)
	check(t, err)
	check(t, again.release())
}
