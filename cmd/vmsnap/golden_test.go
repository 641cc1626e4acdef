package main

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/fault"
	"github.com/vmsnap/vmsnap/agent/launch"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/agent/rpc/rpctest"
)

// TestOutputInEachFormat runs every command that prints a result in every
// format.
func TestOutputInEachFormat(t *testing.T) {
	for name, line := range map[string]string{
		"vm-list":          "vm list",
		"vm-show":          "vm show web",
		"vm-forget":        "vm forget web --release",
		"snapshot-list":    "snapshot list",
		"snapshot-show":    "snapshot show web/before-upgrade",
		"snapshot-rename":  "snapshot rename web/nightly weekly",
		"snapshot-create":  "snapshot create web fresh",
		"snapshot-detach":  "snapshot create web fresh --detach",
		"snapshot-dry-run": "snapshot create web fresh --dry-run",
		"operation-list":   "operation list",
		"operation-show":   "operation show c0ffee01",
		"operation-watch":  "operation watch c0ffee01",
		"operation-cancel": "operation cancel 0badcafe",
		"operation-pause":  "operation pause 0badcafe",
		"operation-resume": "operation resume 0badcafe",
		"event-list":       "event list",
		"schedule-list":    "schedule list",
		"schedule-show":    "schedule show nightly",
		"schedule-create":  "schedule create web --daily --hour 2 --minute 30 --zone Europe/Berlin --exclude data --label team=infra",
		"schedule-edit":    "schedule edit dbs --weekly sat,sun --hour 4 --quiesce none --overlap wait",
		"schedule-pause":   "schedule pause nightly",
		"schedule-resume":  "schedule resume dbs",
		"schedule-delete":  "schedule delete nightly",
		"runs-taken":       "snapshot list --taken",
		"runs-scheduled":   "snapshot list web --scheduled",
		"event-watch":      "event watch --since 3 --count 3",
		"freeze":           "freeze web --lease 10s",
		"thaw":             "thaw web",
	} {
		for _, f := range formats() {
			t.Run(name+"-"+f, func(t *testing.T) {
				b := rpctest.Sample()
				b.Script(rpctest.Script{Create: creates(b, taken("fresh"), op.Succeeded)})
				socket := serve(t, b)
				args := append(strings.Fields(line), "-o", f)
				golden(t, name+"-"+f, socket, args, command(t, socket, args...))
			})
		}
	}
}

// TestOutput runs what differs from the plain case.
func TestOutput(t *testing.T) {
	for name, c := range map[string]struct {
		line  string
		setup func(*rpctest.Backend)
	}{
		"vm-list-no-header": {line: "vm list --no-header"},
		"vm-list-scanning": {line: "vm list -o name", setup: func(b *rpctest.Backend) {
			b.SetDiscovery(agent.Discovery{Source: "scan", Reason: "netlink: operation not permitted"})
		}},
		"vm-show-problem":       {line: "vm show legacy"},
		"vm-show-stopped":       {line: "vm show datenbank-東京"},
		"vm-show-unresolved":    {line: "vm show odd", setup: oddVM},
		"vm-list-hostile":       {line: "vm list -o wide", setup: oddVM},
		"vm-list-empty":         {line: "snapshot list odd", setup: oddVM},
		"snapshot-list-vm":      {line: "snapshot list web --sort name"},
		"snapshot-list-space":   {line: "snapshot list --sort space -o name"},
		"usage-sort":            {line: "snapshot list --sort size"},
		"snapshot-list-label":   {line: "snapshot list --label team=infra --label keep=yes -o name"},
		"snapshot-show-partial": {line: "snapshot show web/nightly"},
		"operation-list-active": {line: "operation list --active"},
		"operation-list-limit":  {line: "operation list web --limit 1"},
		"operation-show-failed": {line: "operation show c0ffee02"},
		"schedule-show-paused":  {line: "schedule show dbs"},
		"runs-disk":             {line: "snapshot list --taken --disk data"},
		"usage-runs-both":       {line: "snapshot list --taken --scheduled"},
		"usage-runs-label":      {line: "snapshot list --taken --label a=b"},
		"usage-runs-disk":       {line: "snapshot list --disk root"},
		"usage-schedule-when":   {line: "schedule create web"},
		"usage-schedule-kinds":  {line: "schedule create web --daily --weekly mon"},
		"usage-schedule-hour":   {line: "schedule create web --hourly --hour 3"},
		"usage-schedule-day":    {line: "schedule create web --monthly 32"},
		"usage-schedule-week":   {line: "schedule create web --weekly monday"},
		"usage-schedule-once":   {line: "schedule create web --once tomorrow"},
		"usage-schedule-name":   {line: "schedule create --selector * --daily"},
		"usage-schedule-vm":     {line: "schedule create web --selector * --daily"},
		"usage-schedule-age":    {line: "schedule create web --daily --max-age long"},
		"usage-schedule-space":  {line: "schedule create web --daily --max-space 1XB"},
		"usage-schedule-missed": {line: "schedule create web --daily --missed later"},
		"usage-schedule-cron":   {line: "schedule create web --cron 61"},
		"schedule-retention":    {line: "schedule create web --daily --keep-last 3 --max-age 30d --max-space 10GiB"},
		"help-schedule-create":  {line: "schedule create --help"},
		"event-list-filter":     {line: "event list web --severity warning --within 4h"},
		"event-list-kind":       {line: "event list --kind vm-started --kind agent-started --limit 1"},
		"event-list-forgotten":  {line: "event list --since 1", setup: func(b *rpctest.Backend) { b.ForgetEvents(5) }},
		"event-watch-forgotten": {line: "event watch --since 1 --count 1", setup: func(b *rpctest.Backend) { b.ForgetEvents(5) }},
		"event-watch-ahead":     {line: "event watch --since 1000"},
		"usage-event-kind":      {line: "event list --kind vm-exploded"},
		"usage-event-severity":  {line: "event list --severity grave"},
		"usage-event-count":     {line: "event watch --count 0"},
		"help-event-watch":      {line: "event watch --help"},
		"create-partial": {line: "snapshot create web fresh --allow-partial", setup: func(b *rpctest.Backend) {
			s := taken("fresh")
			s.Partial = true
			s.Warnings = []op.Warning{{Code: "disk-dropped", Disk: "data", Message: "its overlay could not be made: no space left"}}
			b.Script(rpctest.Script{Create: creates(b, s, op.Succeeded)})
		}},
		"create-failed": {line: "snapshot create web fresh --quiesce require", setup: func(b *rpctest.Backend) {
			b.Script(rpctest.Script{Create: creates(b, taken("fresh"), op.Failed)})
		}},
		"create-not-frozen": {line: "snapshot create web fresh", setup: func(b *rpctest.Backend) {
			s := taken("fresh")
			s.Consistency = catalog.Crash
			s.Quiesce = catalog.Quiesce{Requested: "prefer", Reason: "the guest agent did not answer within 15s"}
			b.Script(rpctest.Script{Create: creates(b, s, op.Succeeded)})
		}},
		"dry-run-refused": {line: "snapshot create web fresh --dry-run", setup: func(b *rpctest.Backend) {
			b.Script(rpctest.Script{Plan: func(_ context.Context, req agent.SnapshotRequest) (agent.Plan, error) {
				p := rpctest.SamplePlan(req)
				p.Disks[0].Settle = agent.SettleConvert
				p.Blockers = []*fault.Error{
					fault.New(fault.NoSpace, "disk root: 1 MiB is free in /srv/vm/web, 64 MiB are needed").WithHint("free some space there"),
					fault.New(fault.Busy, "%w", &op.BusyError{VM: "web", Operation: "0badcafe"}),
				}
				return p, nil
			}})
		}},
		"thaw-too-late": {line: "thaw web", setup: func(b *rpctest.Backend) {
			b.Script(rpctest.Script{Thaw: func(context.Context, string) (agent.ThawResult, error) {
				return agent.ThawResult{Window: 30 * time.Second}, nil
			}})
		}},
		"doctor":                {line: "doctor web"},
		"doctor-finds":          {line: "doctor legacy"},
		"doctor-json":           {line: "doctor legacy -o json"},
		"doctor-repairs":        {line: "doctor legacy --repair"},
		"doctor-all":            {line: "doctor"},
		"doctor-all-json":       {line: "doctor -o json"},
		"doctor-all-names":      {line: "doctor -o name"},
		"doctor-host":           {line: "doctor --host"},
		"doctor-host-json":      {line: "doctor --host -o json"},
		"doctor-host-names":     {line: "doctor --host -o name"},
		"usage-doctor-host":     {line: "doctor web --host"},
		"help-doctor":           {line: "doctor --help"},
		"export":                {line: "snapshot export web/before-upgrade /srv/a.qcow2 --disk root", setup: exports},
		"export-json":           {line: "snapshot export web/before-upgrade /srv/a.raw --format raw -o json", setup: exports},
		"export-detach":         {line: "snapshot export web/before-upgrade /srv/a.qcow2 --compress --detach", setup: exports},
		"help-export":           {line: "snapshot export --help"},
		"clone-disk":            {line: "snapshot clone web/before-upgrade /srv/a.qcow2 --disk root", setup: clones},
		"clone-disk-full":       {line: "snapshot clone web/before-upgrade /srv/a.qcow2 --full", setup: clones},
		"usage-clone-name":      {line: "snapshot clone web/before-upgrade a.qcow2"},
		"usage-clone-file":      {line: "snapshot clone web/before-upgrade ./a.qcow2 --start"},
		"usage-clone-launcher":  {line: "snapshot clone web/before-upgrade web2 --launcher exec"},
		"clone-vm":              {line: "snapshot clone web/before-upgrade web2 --disk root --replace tap0=tap2", setup: clones},
		"clone-vm-full":         {line: "snapshot clone web/before-upgrade web2 --full --start --launcher exec", setup: clones},
		"help-clone":            {line: "snapshot clone --help"},
		"delete":                {line: "snapshot delete web/nightly web/live", setup: deletes},
		"delete-chosen":         {line: "snapshot delete web --older-than 30d --label team=infra --speed 100MiB -o json", setup: deletes},
		"delete-plan":           {line: "snapshot delete web/nightly --dry-run", setup: deletes},
		"delete-plan-wide":      {line: "snapshot delete web/nightly --dry-run -o wide", setup: deletes},
		"delete-plan-json":      {line: "snapshot delete web/nightly --dry-run -o json", setup: deletes},
		"delete-plan-refused":   {line: "snapshot delete web/alpha --dry-run", setup: deletesNothing},
		"delete-refused":        {line: "snapshot delete web/alpha", setup: deletesNothing},
		"snapshot-list-states":  {line: "snapshot list web", setup: unrestorable},
		"snapshot-show-states":  {line: "snapshot show web/half", setup: unrestorable},
		"help-delete":           {line: "snapshot delete --help"},
		"usage-delete-both":     {line: "snapshot delete web/nightly --all"},
		"usage-delete-age":      {line: "snapshot delete web --older-than long"},
		"usage-delete-speed":    {line: "snapshot delete web --all --speed fast"},
		"template":              {line: "snapshot template web/nightly"},
		"template-off":          {line: "snapshot template web/nightly --off"},
		"disk-forget-unknown":   {line: "disk forget /srv/a.qcow2"},
		"disk-attach":           {line: "disk attach web /srv/a.qcow2 --device third", setup: plugs},
		"disk-detach":           {line: "disk detach web third", setup: plugs},
		"usage-attach-format":   {line: "disk attach web /srv/a.vmdk --format vmdk"},
		"usage-export-format":   {line: "snapshot export web/nightly /srv/a --format vmdk"},
		"usage-export-compress": {line: "snapshot export web/nightly /srv/a --format raw --compress"},
		"rebuild":               {line: "doctor --rebuild --dir /srv/vm/web"},
		"rebuild-nothing":       {line: "doctor --rebuild"},
		"rebuild-json":          {line: "doctor --rebuild --dir /srv/vm/web -o json"},
		"usage-rebuild":         {line: "doctor web --rebuild"},
		"usage-doctor-dir":      {line: "doctor web --dir /srv"},
		"usage-delete-nothing":  {line: "snapshot delete"},
		"usage-edit-nothing":    {line: "schedule edit nightly -o json"},
		"usage-misspelt":        {line: "snapshot lsit"},
		"usage-misspelt-group":  {line: "vmm list"},
		"usage-unknown-command": {line: "snapshot creat web"},
		"usage-unknown-flag":    {line: "snapshot create web --ram"},
		"usage-no-argument":     {line: "vm show"},
		"usage-more-arguments":  {line: "vm list web"},
		"usage-group":           {line: "operation"},
		"usage-format":          {line: "vm list -o xml"},
		"usage-label":           {line: "snapshot create web --label team"},
		"usage-lease":           {line: "freeze web --lease 0s"},
		"usage-max-pause":       {line: "snapshot create web --max-pause 1s"},
		"dry-run-memory":        {line: "snapshot create web live --memory --dry-run"},
		"snapshot-show-memory":  {line: "snapshot show web/live"},
		"usage-dry-run-detach":  {line: "snapshot create web --dry-run --detach"},
		"help":                  {line: "--help"},
		"help-create":           {line: "snapshot create --help"},
	} {
		t.Run(name, func(t *testing.T) {
			b := rpctest.Sample()
			if c.setup != nil {
				c.setup(b)
			}
			socket := serve(t, b)
			args := strings.Fields(c.line)
			golden(t, name, socket, args, command(t, socket, args...))
		})
	}
}

// taken returns a snapshot of web that was frozen for.
func taken(name string) agent.SnapshotView {
	return agent.SnapshotView{
		Snapshot: catalog.Snapshot{
			ID: "feedf00d", VMID: "5f0c1a2b", VMName: "web", Name: name, Created: rpctest.Now,
			Consistency: catalog.Filesystem, Operation: "beefbeef",
			Quiesce:  catalog.Quiesce{Requested: "prefer", Frozen: 2, Total: 2, Window: 84 * time.Millisecond},
			Warnings: []op.Warning{{Code: "settles-when-stopped", Message: "the launch path is settled when the VM has stopped"}},
			Disks:    []catalog.SnapshotDisk{{Device: "root", LayerID: "aa", Size: 20 << 30}},
		},
		Layers: map[string]agent.LayerView{"aa": {ID: "aa", Path: "/srv/vm/web/root.7f3a.qcow2", Format: "qcow2", Allocated: 196 << 10}},
	}
}

// creates returns a script that takes a snapshot in two steps and ends the
// operation as told.
func creates(b *rpctest.Backend, s agent.SnapshotView, end op.State) func(context.Context, agent.SnapshotRequest) (op.Record, error) {
	return func(_ context.Context, req agent.SnapshotRequest) (op.Record, error) {
		if req.RequestID == "" {
			return op.Record{}, fmt.Errorf("the command sent no request id")
		}
		record := op.Record{
			ID: "beefbeef", Kind: op.KindSnapshot, VMID: s.VMID, VMName: s.VMName, State: op.Queued,
			Created: rpctest.Now, Progress: op.Progress{Total: 2, Unit: "steps"},
		}
		first := b.PutOperation(record)
		go func() {
			record.State, record.Started = op.Running, rpctest.Now
			record.Steps = rpctest.Steps(rpctest.Now, false, "freeze", "cut")
			record.Progress.Done = 2
			record.Ended = rpctest.Now.Add(240 * time.Millisecond)
			record.State = end
			switch end {
			case op.Succeeded:
				b.AddSnapshot(s)
				record.Snapshot, record.Warnings, record.Partial = s.ID, s.Warnings, s.Partial
			default:
				record.Steps[1].Error = "the guest was not frozen any more"
				record.Failure = &op.Failure{
					Kind: fault.NotQuiesced, Message: "cut web: the guest was not frozen any more at the cut",
					Hint: "raise --lease, or take the snapshot with --quiesce prefer",
				}
			}
			b.PutOperation(record)
		}()
		return first, nil
	}
}

// exports has exports succeed.
func exports(b *rpctest.Backend) {
	b.Script(rpctest.Script{Export: func(_ context.Context, req agent.ExportRequest) (op.Record, error) {
		if req.Path == "" || req.Format == "" || req.RequestID == "" {
			return op.Record{}, fmt.Errorf("an export of %+v", req)
		}
		return b.PutOperation(done(op.KindExport)), nil
	}})
}

// clones has clones of disks succeed.
func clones(b *rpctest.Backend) {
	b.Script(rpctest.Script{CloneDisk: func(context.Context, agent.CloneDiskRequest) (op.Record, error) {
		return b.PutOperation(done(op.KindClone)), nil
	}, CloneVM: func(_ context.Context, req agent.CloneVMRequest) (op.Record, error) {
		linked := len(req.Disks) == 1 && req.Replace["tap0"] == "tap2"
		full := req.Full && req.Start && req.Launcher == launch.Exec
		if req.Name != "web2" || req.RequestID == "" || !linked && !full {
			return op.Record{}, fmt.Errorf("a clone of %+v", req)
		}
		return b.PutOperation(done(op.KindClone)), nil
	}})
}

// deletes has deletions succeed, and plans them.
func deletes(b *rpctest.Backend) {
	b.Script(rpctest.Script{
		Delete: func(_ context.Context, req agent.DeleteRequest) (op.Record, error) {
			chosen := req.VM == "web" && req.OlderThan == 30*24*time.Hour && req.Labels["team"] == "infra" && req.Speed == 100<<20
			if req.RequestID == "" || len(req.Snapshots) != 2 && !chosen {
				return op.Record{}, fmt.Errorf("a deletion of %+v", req)
			}
			return b.PutOperation(done(op.KindDelete)), nil
		},
		PlanDelete: func(_ context.Context, req agent.DeleteRequest) (agent.DeletePlan, error) {
			return agent.DeletePlan{
				VM: "web", Snapshots: []string{"nightly"}, Live: true, Memory: 3 << 30, Moved: 700 << 20, Freed: 3<<30 + 120<<20,
				Merges: []agent.PlanMerge{
					{Device: "root", Way: agent.MergeStream, Layer: "/srv/vm/web/root.1c22.qcow2", Into: "/srv/vm/web/root.7f3a.qcow2", Live: true, Bytes: 400 << 20, Room: 280 << 20, Other: 6 << 30},
					{Device: "data", Way: agent.MergeCommit, Layer: "/srv/vm/web/data.7f3a.qcow2", Into: "/srv/vm/web/data.raw", Bytes: 300 << 20, Only: "several layers lie on /srv/vm/web/data.7f3a.qcow2"},
					{Device: "data", Way: agent.MergeRemove, Layer: "/srv/vm/web/data.0bad.qcow2"},
				},
				Kept: []agent.PlanKept{
					{Device: "root", Layer: "/srv/vm/web/root.0aaa.qcow2", Reason: "2 layers lie on it", Dependants: []string{"web/live", "the state of disk root now"}},
					{Device: "data", Layer: "/srv/vm/web/data.raw", Reason: "it is a block device"},
				},
			}, nil
		},
	})
}

// deletesNothing has deletions refused.
func deletesNothing(b *rpctest.Backend) {
	refusal := fault.New(fault.HasDependants, "VM web: disk root: web/live, the state of disk root now lie on the layer /srv/vm/web/root.0aaa.qcow2").
		WithHint("--flatten copies into each what it needs; --keep-layers keeps the layer for as long as they lie on it")
	b.Script(rpctest.Script{
		Delete: func(context.Context, agent.DeleteRequest) (op.Record, error) { return op.Record{}, refusal },
		PlanDelete: func(context.Context, agent.DeleteRequest) (agent.DeletePlan, error) {
			return agent.DeletePlan{VM: "web", Snapshots: []string{"alpha"}, Live: true, Blockers: []*fault.Error{refusal}}, nil
		},
	})
}

// unrestorable adds snapshots that cannot be restored.
func unrestorable(b *rpctest.Backend) {
	for name, state := range map[string]catalog.PointState{"half": catalog.PointInvalid, "going": catalog.PointDeleting} {
		s := taken(name)
		s.ID, s.State, s.Warnings = name, state, nil
		if name == "half" {
			s.Disks[0].LayerID = ""
			s.Created = s.Created.Add(-time.Hour)
		}
		b.AddSnapshot(s)
	}
}

// plugs has disks plugged in and taken out.
func plugs(b *rpctest.Backend) {
	b.Script(rpctest.Script{
		Attach: func(context.Context, agent.AttachRequest) (op.Record, error) {
			rec := done(op.KindAttach)
			rec.Warnings = []op.Warning{{Code: "attached-until-end", Disk: "third", Message: "it is there until this QEMU ends"}}
			return b.PutOperation(rec), nil
		},
		Detach: func(context.Context, agent.DetachRequest) (op.Record, error) {
			return b.PutOperation(done(op.KindDetach)), nil
		},
	})
}

// done is an operation on web that has succeeded.
func done(kind op.Kind) op.Record {
	return op.Record{
		ID: "beefbeef", Kind: kind, VMID: "5f0c1a2b", VMName: "web", State: op.Succeeded,
		Created: rpctest.Now, Started: rpctest.Now, Ended: rpctest.Now.Add(time.Second),
	}
}

// oddVM adds a VM whose texts try to command the terminal.
func oddVM(b *rpctest.Backend) {
	b.AddVM(agent.VMView{
		ID: "0dd0dd00", Name: "odd", State: agent.Running, RunState: "io-error",
		GuestAgent: agent.GuestAgentView{Presence: agent.Connected, Socket: "/run/\x1b]0;owned\a/qga"},
		Process:    &agent.ProcessView{PID: 1, Unit: "a\x1b[2Jb.service", QEMUVersion: "7.2\n22"},
		Freeze:     &agent.FreezeView{Since: rpctest.Now.Add(-90 * time.Second), Unresolved: true},
		Problems: []agent.Problem{
			{Code: "thaw-unresolved", Message: "\u202egnp.exe", Hint: "restart the guest agent"},
			{Code: "bytes", Message: "not UTF-8: \xff"},
		},
	})
}
