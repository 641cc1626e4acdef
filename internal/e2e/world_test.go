package e2e

import (
	"context"
	"database/sql"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	_ "modernc.org/sqlite" // the catalog is looked into

	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"

	"connectrpc.com/connect"

	"github.com/vmsnap/vmsnap/monitor"
)

// world is everything that a snapshot which did not happen has to leave as it
// was.
type world struct {
	Nodes   []string // of QEMU's block graph, with their files
	Jobs    []string // of QEMU
	Files   []string // beside the disks, with inode and links
	State   []string // files of the daemon's state directory
	Journal []string // of unfinished operations
	Guards  []string // processes of the daemon
}

// world looks at everything. own is the test's monitor, nil when QEMU is gone.
func (h *host) world(own *monitor.Session, dir string) world {
	h.t.Helper()
	w := world{Files: listing(h.t, dir), State: listing(h.t, h.path("state")), Journal: h.journal(), Guards: h.guards()}
	w.State = slices.DeleteFunc(w.State, func(f string) bool { return strings.HasPrefix(f, "catalog.") })
	if own == nil {
		return w
	}
	ctx, cancel := context.WithTimeout(context.Background(), eventLimit)
	defer cancel()
	var nodes []struct {
		Name string `json:"node-name"`
		Drv  string `json:"drv"`
		File string `json:"file"`
		RO   bool   `json:"ro"`
	}
	if err := own.Execute(ctx, "query-named-block-nodes", map[string]any{"flat": true}, &nodes); err != nil {
		h.t.Fatal(err)
	}
	for _, n := range nodes {
		w.Nodes = append(w.Nodes, fmt.Sprintf("%s %s %s %v", n.Name, n.Drv, n.File, n.RO))
	}
	slices.Sort(w.Nodes)
	var jobs []struct {
		ID     string `json:"id"`
		Status string `json:"status"`
	}
	if err := own.Execute(ctx, "query-jobs", nil, &jobs); err != nil {
		h.t.Fatal(err)
	}
	for _, j := range jobs {
		w.Jobs = append(w.Jobs, j.ID+" "+j.Status)
	}
	return w
}

// listing lists the files of a directory.
func listing(t *testing.T, dir string) []string {
	t.Helper()
	var names []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := os.Lstat(path)
		if err != nil {
			return err
		}
		if fi.Mode().IsRegular() {
			st := fi.Sys().(*syscall.Stat_t)
			name, _ := filepath.Rel(dir, path)
			names = append(names, fmt.Sprintf("%s inode %d links %d mode %s", name, st.Ino, st.Nlink, fi.Mode()))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// database opens the daemon's catalog beside it.
func (h *host) database() *sql.DB {
	h.t.Helper()
	db, err := sql.Open("sqlite", "file:"+h.path("state/catalog.db")+"?_pragma=busy_timeout(5000)")
	if err != nil {
		h.t.Fatal(err)
	}
	return db
}

// journal lists the entries of operations that have not ended.
func (h *host) journal() (entries []string) {
	h.t.Helper()
	db := h.database()
	defer func() { _ = db.Close() }()
	rows, err := db.QueryContext(h.ctx(), "SELECT operation || ' ' || kind FROM journal")
	if err != nil {
		h.t.Fatal(err)
	}
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		var e string
		if err := rows.Scan(&e); err != nil {
			h.t.Fatal(err)
		}
		entries = append(entries, e)
	}
	if err := rows.Err(); err != nil {
		h.t.Fatal(err)
	}
	return entries
}

// lockCatalog keeps the daemon from writing to its catalog, which it waits for
// for five seconds, until it is given back.
func (h *host) lockCatalog() (unlock func()) {
	h.t.Helper()
	db := h.database()
	conn, err := db.Conn(h.ctx())
	if err != nil {
		h.t.Fatal(err)
	}
	if _, err := conn.ExecContext(h.ctx(), "BEGIN IMMEDIATE"); err != nil {
		h.t.Fatal(err)
	}
	return func() {
		h.t.Helper()
		if _, err := conn.ExecContext(h.ctx(), "ROLLBACK"); err != nil {
			h.t.Error(err)
		}
		_ = conn.Close()
		_ = db.Close()
	}
}

// guards returns the processes that the daemon started: "guard PID" and
// "launch-guard PID".
func (h *host) guards() []string {
	h.t.Helper()
	paths, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		h.t.Fatal(err)
	}
	var found []string
	for _, path := range paths {
		line, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		args := strings.Split(strings.TrimRight(string(line), "\x00"), "\x00")
		if len(args) < 2 || !strings.HasPrefix(args[0], binaries) || !strings.HasSuffix(args[1], "guard") {
			continue
		}
		pid := filepath.Base(filepath.Dir(path))
		status, err := os.ReadFile("/proc/" + pid + "/status")
		if err == nil && strings.Contains(string(status), fmt.Sprintf("\nPPid:\t%d\n", h.daemon.Process.Pid)) {
			found = append(found, args[1]+" "+pid)
		}
	}
	return found
}

// creation is a `vmsnap snapshot create` that runs.
type creation struct {
	h     *host
	ended chan struct{}
	result
}

// create runs `vmsnap snapshot create` meanwhile.
func (h *host) create(args ...string) *creation {
	c := &creation{h: h, ended: make(chan struct{})}
	go func() {
		defer close(c.ended)
		c.result = h.run(append([]string{"snapshot", "create"}, args...)...)
	}()
	return c
}

// end waits for its end.
func (c *creation) end() result {
	c.h.t.Helper()
	select {
	case <-c.ended:
		return c.result
	case <-time.After(eventLimit):
		c.h.t.Fatalf("the snapshot does not end\nvmsnapd's log:\n%s", c.h.log)
		return result{}
	}
}

// operation returns the operation that runs on a VM.
func (h *host) operation(vm string) string {
	h.t.Helper()
	var id string
	h.eventually(eventLimit, "an operation runs on "+vm, func() error {
		res, err := h.Operations().ListOperations(h.ctx(), connect.NewRequest(&vmsnapv1.ListOperationsRequest{Vm: vm, Active: true}))
		if err != nil {
			return err
		}
		if len(res.Msg.GetOperations()) == 0 {
			return fmt.Errorf("none")
		}
		id = res.Msg.GetOperations()[0].GetId()
		return nil
	})
	return id
}

// awaitStep follows an operation until a step of it runs.
func (h *host) awaitStep(id, step string) {
	h.t.Helper()
	ctx, cancel := context.WithCancel(h.ctx())
	defer cancel()
	seen := false
	last, err := h.Follow(ctx, id, func(o *vmsnapv1.Operation) {
		for _, s := range o.GetSteps() {
			if s.GetName() == step && s.GetEnded() == nil {
				seen = true
				cancel()
			}
		}
	})
	if !seen {
		h.t.Fatalf("operation %s is never in step %s: %v, %v\nvmsnapd's log:\n%s", id, step, last, err, h.log)
	}
}

// cancel cancels an operation. The acknowledgement has to come within a second.
func (h *host) cancel(id string) error {
	h.t.Helper()
	began := time.Now()
	_, err := h.Operations().CancelOperation(h.ctx(), connect.NewRequest(&vmsnapv1.CancelOperationRequest{Id: id}))
	if took := time.Since(began); took > promptly(time.Second) {
		h.t.Errorf("the cancel was acknowledged after %s", took)
	}
	return err
}
