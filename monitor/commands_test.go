package monitor_test

import (
	"context"
	"encoding/json"
	"testing"

	"github.com/digitalocean/go-qemu/qmp"
	"github.com/digitalocean/go-qemu/qmp/raw"
	"github.com/google/go-cmp/cmp"
	"github.com/vmsnap/vmsnap/monitor"
	"github.com/vmsnap/vmsnap/monitor/monitortest"
)

// TestQueries decodes replies as QEMU gave them.
func TestQueries(t *testing.T) {
	tests := map[string]struct {
		reply string
		ask   func(context.Context, *monitor.Session) (any, error)
		want  any
	}{
		"query-status": {
			`{"status": "prelaunch", "singlestep": false, "running": false}`,
			func(ctx context.Context, s *monitor.Session) (any, error) { return s.QueryStatus(ctx) },
			monitor.Status{Running: false, Status: monitor.RunStatePrelaunch},
		},
		"query-name": {
			`{"name": "web"}`,
			func(ctx context.Context, s *monitor.Session) (any, error) { return s.QueryName(ctx) },
			"web",
		},
		"query-uuid": {
			`{"UUID": "00000000-0000-0000-0000-000000000000"}`,
			func(ctx context.Context, s *monitor.Session) (any, error) { return s.QueryUUID(ctx) },
			"00000000-0000-0000-0000-000000000000",
		},
		"query-chardev": {
			`[{"frontend-open": true, "filename": "unix:/run/qga.sock,server=on", "label": "qga0"},
			  {"frontend-open": false, "filename": "null", "label": "serial0"}]`,
			func(ctx context.Context, s *monitor.Session) (any, error) { return s.QueryChardev(ctx) },
			[]monitor.Chardev{
				{Label: "qga0", Filename: "unix:/run/qga.sock,server=on", FrontendOpen: true},
				{Label: "serial0", Filename: "null"},
			},
		},
		"query-cpus-fast": {
			`[{"thread-id": 42, "props": {"core-id": 0, "thread-id": 0, "socket-id": 0},
			   "qom-path": "/machine/unattached/device[0]", "cpu-index": 0, "target": "x86_64"}]`,
			func(ctx context.Context, s *monitor.Session) (any, error) { return s.QueryCPUsFast(ctx) },
			[]monitor.CPU{{ThreadID: 42, QOMPath: "/machine/unattached/device[0]", Target: "x86_64"}},
		},
		"query-jobs": {
			`[{"current-progress": 5, "status": "concluded", "total-progress": 10, "type": "commit", "id": "vmsnap-1",
			   "error": "No space left on device"}]`,
			func(ctx context.Context, s *monitor.Session) (any, error) { return s.QueryJobs(ctx) },
			[]monitor.Job{{ID: "vmsnap-1", Type: "commit", Status: monitor.JobConcluded,
				CurrentProgress: 5, TotalProgress: 10, Error: "No space left on device"}},
		},
		"query-migrate": {
			`{"blocked": true, "blocked-reasons": ["device is not migratable"], "status": "failed",
			  "error-desc": "Unable to write to file", "total-time": 120, "setup-time": 3,
			  "ram": {"total": 537722880, "postcopy-requests": 0, "dirty-sync-count": 1, "multifd-bytes": 0,
			          "pages-per-second": 7, "downtime-bytes": 0, "page-size": 4096, "remaining": 100, "mbps": 1.5,
			          "transferred": 200, "precopy-bytes": 0, "duplicate": 5, "dirty-pages-rate": 6,
			          "normal-bytes": 8192, "normal": 2}}`,
			func(ctx context.Context, s *monitor.Session) (any, error) { return s.QueryMigrate(ctx) },
			monitor.Migration{Status: monitor.MigrationFailed, ErrorDesc: "Unable to write to file",
				BlockedReasons: []string{"device is not migratable"}, TotalTime: 120, SetupTime: 3,
				RAM: monitor.MigrationRAM{Total: 537722880, DirtySyncCount: 1, PagesPerSecond: 7, PageSize: 4096,
					Remaining: 100, Mbps: 1.5, Transferred: 200, Duplicate: 5, DirtyPagesRate: 6, NormalBytes: 8192, Normal: 2}},
		},
	}
	for command, tt := range tests {
		t.Run(command, func(t *testing.T) {
			checkLeaks(t)
			srv := monitortest.NewServer(t)
			srv.HandleReturn(command, json.RawMessage(tt.reply))
			s := dial(t, srv.Path())
			got, err := tt.ask(t.Context(), s)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

func TestRunControl(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	s := dial(t, srv.Path())
	for command, run := range map[string]func(context.Context) error{
		"stop": s.Stop, "cont": s.Cont, "system_reset": s.SystemReset,
	} {
		srv.HandleReturn(command, nil)
		if err := run(t.Context()); err != nil {
			t.Errorf("%s: %v", command, err)
		}
		srv.Await(command)
	}
}

// TestGoQEMU drives a session through go-qemu's own interface.
func TestGoQEMU(t *testing.T) {
	checkLeaks(t)
	srv := monitortest.NewServer(t)
	srv.HandleReturn("query-status", map[string]any{"running": true, "status": "running", "singlestep": false})
	srv.HandleReturn("job-dismiss", nil)
	s := dial(t, srv.Path())
	var m qmp.Monitor = s
	if err := m.Connect(); err != nil {
		t.Fatal(err)
	}
	status, err := raw.NewMonitor(m).QueryStatus()
	if err != nil || !status.Running || status.Status != raw.RunStateRunning {
		t.Errorf("%+v, %v", status, err)
	}
	command, err := json.Marshal(qmp.Command{Execute: "job-dismiss", Args: map[string]string{"id": "j"}})
	if err != nil {
		t.Fatal(err)
	}
	if out, err := m.Run(command); err != nil || string(out) != `{"return":{}}` {
		t.Errorf("%s, %v", out, err)
	}
	if got := string(srv.Await("job-dismiss").Arguments); got != `{"id":"j"}` {
		t.Errorf("arguments %s", got)
	}
	out, err := m.Run([]byte(`{"execute": "query-status", "id": [7]}`))
	var reply struct{ ID []int }
	if jerr := json.Unmarshal(out, &reply); err != nil || jerr != nil || len(reply.ID) != 1 || reply.ID[0] != 7 {
		t.Errorf("%s, %v", out, err)
	}
	for _, bad := range []string{`{}`, `{"execute": 1}`, `stop`, `{"execute": "none"}`} {
		if out, err := m.Run([]byte(bad)); err == nil {
			t.Errorf("%s: %s", bad, out)
		}
	}
	if err := m.Disconnect(); err != nil {
		t.Error(err)
	}
	wantError(t, m.Connect(), []error{monitor.ErrClosed}, nil)
}
