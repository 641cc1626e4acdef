package agent

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/discover"
	"github.com/vmsnap/vmsnap/agent/event"
	"github.com/vmsnap/vmsnap/agent/launch"
	"github.com/vmsnap/vmsnap/agent/op"
	"github.com/vmsnap/vmsnap/freeze"
)

// Config is what an Agent needs to know of its host.
type Config struct {
	StateDir     string         // of the catalog; created 0700
	OverridesDir string         // YAML files that name VMs or override what was found; may be absent
	OverlayDir   string         // where overlays are made unless an override says otherwise; empty: beside the layer
	Freezing     freeze.Config  // how the guards of freezes are started
	LaunchGuard  []string       // command that runs GuardLaunchPaths
	PauseGuard   []string       // command that runs memdump.RunGuard
	MemoryDir    string         // where memory is saved; beside the first disk's layers when empty
	Sealing      *MemorySealing // how memory files are encrypted; nil: they are plain
	Launcher     launch.Kind    // that starts QEMU where memory is restored; Automatic by default
	KeepPages    bool           // do not put a guest's huge pages back after a save
	ScanOnly     bool           // find VMs without process events
	ListedOnly   bool           // manage only VMs that a file in OverridesDir names
	Logger       hclog.Logger
	EventKeep    int           // how many events are kept; 0: DefaultEventKeep
	EventMaxAge  time.Duration // how old they get; 0: DefaultEventMaxAge
	Sinks        []event.Sink  // where events are passed on to
	ScheduleCaps ScheduleCaps  // what schedules may keep
	Profiles     map[string]Profile
	Limits       op.Limits  // of operations that run at the same time
	Hooks        HookConfig // the host's own programs around operations
	MergeSpeed   uint64     // of merges, bytes a second, unless a request says otherwise; 0: no limit
	UpkeepSpeed  uint64     // of merges that nobody asked for, bytes a second; 0: there are none
	// UpkeepInterval is how often it is looked for such merges; 0: never.
	UpkeepInterval time.Duration
	MaxChain       int // layers of a disk that may lie on each other; 0: any number
	// LowSpace is how much is to be free where a disk grows, bytes; 0: nobody is told
	// that there is less.
	LowSpace uint64
	// ResumeGuests lets guests run again that QEMU stopped for want of space.
	ResumeGuests bool
	// OnOperation, when not nil, is called with every operation that ends.
	OnOperation func(op.Record)
	// OnFreezeWindow, when not nil, is called with every freeze window.
	OnFreezeWindow func(time.Duration)
	// OnPause, when not nil, is called with every pause of a guest's CPUs.
	OnPause func(time.Duration)
	// OnRun, when not nil, is called with every run of a schedule that begins or is
	// skipped, and by how much that was late.
	OnRun func(begun bool, late time.Duration)
}

// DefaultMaxChain is how many layers of a disk may lie on each other. Each costs a
// running QEMU two descriptors, memory for its tables, and time at each read of
// what only the lowest holds.
const DefaultMaxChain = 200

// Agent is the VMs of this host.
type Agent struct {
	cfg     Config
	log     hclog.Logger
	catalog *catalog.Catalog
	ops     *op.Runner
	news    *news
	// create is CreateSnapshot, clock time.Now; tests have their own.
	create    func(context.Context, SnapshotRequest) (op.Record, error)
	clock     func() time.Time
	scheduler *scheduler
	deleter   Deleter
	reloads   chan reloading
	rebuilds  chan rebuilding
	reserved  reservations

	// recording is held while a VM's coming, going or being forgotten is
	// recorded, so that the catalog has them in the order in which they
	// happened. It is taken before mu, and mu before that of a vm.
	recording sync.Mutex

	mu        sync.RWMutex
	vms       map[string]*vm // by catalog id
	overrides []discover.Override
	profiles  map[string]Profile
	// stopping is closed when Run begins to wait for the recipes: those that
	// wait for what may never come leave it to the next agent.
	stopping chan struct{}
	watcher  *discover.Watcher
	group    sync.WaitGroup
}

// Open opens the state directory. Nothing runs before Run.
func Open(ctx context.Context, cfg Config) (*Agent, error) {
	overrides, err := discover.LoadOverrides(cfg.OverridesDir)
	if err != nil {
		return nil, err
	}
	cat, err := catalog.Open(ctx, cfg.StateDir, cfg.Logger.Named("catalog"))
	if err != nil {
		return nil, err
	}
	a := &Agent{
		cfg: cfg, log: cfg.Logger, catalog: cat, overrides: overrides,
		ops: op.NewRunner(cat, cfg.Logger.Named("operation"), op.Limit(cfg.Limits)), news: newNews(cat, cfg.Logger.Named("event")),
		vms: map[string]*vm{}, reloads: make(chan reloading), rebuilds: make(chan rebuilding), stopping: make(chan struct{}),
		profiles: cfg.Profiles, clock: time.Now, scheduler: newScheduler(),
	}
	a.create, a.deleter = a.CreateSnapshot, a
	return a, nil
}

// Close closes an Agent that was not run. Run closes it by itself.
func (a *Agent) Close() error { return a.catalog.Close() }

// Run thaws what an earlier agent left frozen, finds the VMs, finishes or
// reverts what an earlier agent left unfinished, and then follows the host
// until ctx ends. ready is called once requests can be served. It returns
// after every recipe has come to its end, or shutdownGrace later.
func (a *Agent) Run(ctx context.Context, ready func()) error {
	go a.news.run()
	err := a.run(ctx, ready)
	a.news.close()
	if !errors.Is(err, errUnended) { // what still runs needs the catalog, and the next agent takes it over
		err = errors.Join(err, a.catalog.Close())
	}
	return err
}

// errUnended means that a recipe has not come to its end.
var errUnended = errors.New("not everything has ended")

// run is Run, between the recording of its first and its last event.
func (a *Agent) run(ctx context.Context, ready func()) error {
	leftovers := a.thawLeftovers(ctx)
	if err := a.loadCatalog(ctx); err != nil {
		return err
	}
	a.showUnresolved(leftovers)
	a.coverDevices()
	a.checkMemoryKey()
	w, err := discover.Watch(ctx, discover.Options{NoNetlink: a.cfg.ScanOnly})
	if err != nil {
		return err
	}
	a.mu.Lock()
	a.watcher = w
	a.mu.Unlock()
	a.group.Go(func() { a.purge(ctx) })
	a.group.Go(func() { a.keepEvents(ctx) })
	// Recipes that come to their end when ctx has ended need QEMU for that.
	sessions, closeSessions := context.WithCancel(context.WithoutCancel(ctx))
	defer closeSessions()
	a.followHost(ctx, sessions, w, func() {
		a.group.Go(func() {
			a.recover(ctx)
			a.news.tell(event.Event{Kind: event.AgentStarted, Severity: event.Info, Message: "vmsnapd serves requests"})
			a.group.Go(func() { a.followSchedules(ctx) })
			a.group.Go(func() { a.followSpace(ctx) })
			a.group.Go(func() { a.followUpkeep(ctx) })
			ready()
		})
	})
	a.news.tell(event.Event{Kind: event.AgentStopped, Severity: event.Info, Message: "vmsnapd stops"})
	close(a.stopping)
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownGrace)
	defer cancel()
	last := time.AfterFunc(lastAnswers, closeSessions)
	err = a.ops.Shutdown(stop)
	last.Stop()
	closeSessions()
	a.giveUpRecovery()
	ended := make(chan struct{})
	go func() { a.group.Wait(); close(ended) }()
	select {
	case <-ended:
		return err
	case <-stop.Done():
		return errors.Join(err, fmt.Errorf("%w %s after the stop", errUnended, shutdownGrace))
	}
}

// purge forgets request ids and operations that are older than they are kept for.
func (a *Agent) purge(ctx context.Context) {
	daily := time.NewTicker(24 * time.Hour)
	defer daily.Stop()
	for {
		if err := a.catalog.Purge(ctx); err != nil {
			a.log.Warn("old operations and request ids are kept", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-daily.C:
		}
	}
}

// shutdownGrace is how long recipes may take to come to a safe end when the
// daemon stops. It is longer than the default freeze lease.
const shutdownGrace = 60 * time.Second

// lastAnswers is how long QEMU may take to answer once the daemon stops: a
// healthy one takes milliseconds, and one that hangs would hold the stop up for
// the deadline of its command. What its recipe leaves is recovered at the next
// start.
const lastAnswers = 2 * time.Second

// Operation returns one operation.
func (a *Agent) Operation(ctx context.Context, id string) (op.Record, error) {
	return a.ops.Operation(ctx, id)
}

// Operations returns operations, the newest first.
func (a *Agent) Operations(ctx context.Context, f OperationFilter) ([]op.Record, error) {
	filter := op.Filter{Active: f.Active, Limit: f.Limit}
	if may := f.Visible; may != nil {
		filter.Visible = func(rec op.Record) bool { return may(rec.VMID, rec.VMName) }
	}
	if filter.Limit == 0 {
		filter.Limit = 100
	}
	if f.VM != "" {
		v, err := a.find(f.VM)
		if err != nil {
			return nil, err
		}
		filter.VMID = v.id
	}
	return a.ops.Operations(ctx, filter)
}

// WatchOperation yields the operation at once, at each change, and a last time
// when it ends.
func (a *Agent) WatchOperation(ctx context.Context, id string) iter.Seq2[op.Record, error] {
	return a.ops.Watch(ctx, id)
}

// CancelOperation asks an operation to stop. It returns when the cancel is
// acknowledged, not when the operation has ended.
func (a *Agent) CancelOperation(ctx context.Context, id string) (op.Record, error) {
	return a.ops.Cancel(ctx, id)
}

// PauseOperation lets an operation rest until ResumeOperation. Only deletions
// can; others fail with fault.Unsupported.
func (a *Agent) PauseOperation(ctx context.Context, id string) (op.Record, error) {
	return a.ops.Pause(ctx, id)
}

// ResumeOperation lets an operation go on that rests.
func (a *Agent) ResumeOperation(ctx context.Context, id string) (op.Record, error) {
	return a.ops.GoOn(ctx, id)
}
