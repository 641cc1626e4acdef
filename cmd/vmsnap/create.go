package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/vmsnap/vmsnap/api/client"
	vmsnapv1 "github.com/vmsnap/vmsnap/api/vmsnap/v1"
)

// quiesce is whether to freeze. It is a flag's value.
type quiesce string

var quiesces = map[quiesce]vmsnapv1.Quiesce{
	"require": vmsnapv1.Quiesce_QUIESCE_REQUIRE,
	"prefer":  vmsnapv1.Quiesce_QUIESCE_PREFER,
	"none":    vmsnapv1.Quiesce_QUIESCE_NONE,
}

// Set takes one of the words.
func (q *quiesce) Set(s string) error {
	if _, ok := quiesces[quiesce(s)]; !ok {
		return fmt.Errorf("%q is none of require, prefer, none", s)
	}
	*q = quiesce(s)
	return nil
}

// String returns the word.
func (q *quiesce) String() string { return string(*q) }

// Type returns what the help shows for the value.
func (q *quiesce) Type() string { return "mode" }

// strategy is how memory is saved. It is a flag's value.
type strategy string

var strategies = map[strategy]vmsnapv1.MemoryStrategy{
	"background": vmsnapv1.MemoryStrategy_MEMORY_STRATEGY_BACKGROUND,
	"precopy":    vmsnapv1.MemoryStrategy_MEMORY_STRATEGY_PRECOPY,
	"stopped":    vmsnapv1.MemoryStrategy_MEMORY_STRATEGY_STOPPED,
}

// Set takes one of the words.
func (s *strategy) Set(word string) error {
	if _, ok := strategies[strategy(word)]; !ok {
		return fmt.Errorf("%q is none of background, precopy, stopped", word)
	}
	*s = strategy(word)
	return nil
}

// String returns the word.
func (s *strategy) String() string { return string(*s) }

// Type returns what the help shows for the value.
func (s *strategy) Type() string { return "strategy" }

// freezing are the flags of everything that freezes a guest.
type freezing struct {
	timeout, lease time.Duration
	mountpoints    []string
}

func (f *freezing) flags(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.DurationVar(&f.timeout, "freeze-timeout", 0, "how long the guest may take to answer the freeze (default 15s)")
	flags.DurationVar(&f.lease, "lease", 0, "how long the guest may stay frozen, whatever happens (default 30s)")
	flags.StringArrayVar(&f.mountpoints, "mountpoint", nil, "freeze only this `mount point` of the guest; may be repeated")
	noFiles(cmd, "freeze-timeout", "lease", "mountpoint")
}

func (f *freezing) check(cmd *cobra.Command) error {
	for _, name := range []string{"freeze-timeout", "lease"} {
		if d, err := cmd.Flags().GetDuration(name); err != nil || cmd.Flags().Changed(name) && d <= 0 {
			return usage(cmd, "--%s must be more than zero", name)
		}
	}
	return nil
}

// optional returns nil for zero, which leaves the choice to the daemon.
func optional(d time.Duration) *durationpb.Duration {
	if d == 0 {
		return nil
	}
	return durationpb.New(d)
}

// creation is a snapshot that is asked for.
type creation struct {
	req            vmsnapv1.CreateSnapshotRequest
	quiesce        quiesce
	freezing       freezing
	labels         []string
	strategy       strategy
	maxPause       time.Duration
	expireAfter    string
	dryRun, detach bool
}

func (a *app) snapshotCreate() *cobra.Command {
	var c creation
	cmd := &cobra.Command{
		Use:   "create VM [NAME]",
		Short: "Take a snapshot of a VM's disks, and of its memory",
		Long: `Take a snapshot of a VM's disks, all at one instant and while it runs. Without
a NAME one is made up.

With --memory the guest's memory is saved too, of the same instant. Its CPUs
stand still for milliseconds while QEMU begins to track writes; where that is
impossible, and why, is in the result. --dry-run predicts the pause, --max-pause
refuses one that would be too long.

The guest's file systems are frozen for the cut when its guest agent permits:
--quiesce require fails without a verified freeze, prefer records why there was
none, none does not freeze and is the default with --memory. Whatever happens, the guest is thawed when the lease
ends.

Ctrl-C cancels the snapshot and waits until what it did is undone; a second one
leaves it to itself. With the same --request-id a repeated command returns the
first one's snapshot instead of taking another.`,
		Example: `  vmsnap snapshot create web before-upgrade
  vmsnap snapshot create web --quiesce require --label team=infra
  vmsnap snapshot create web --memory --max-pause 200ms
  vmsnap snapshot create web --disk root --dry-run
  vmsnap snapshot create web nightly --exclude scratch --detach -o name`,
		Args:              takes("VM", "[NAME]"),
		ValidArgsFunction: a.completing(a.completeVMs),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := c.complete(cmd, args); err != nil {
				return err
			}
			if c.dryRun {
				return a.plan(&c.req)
			}
			return a.create(&c)
		},
	}
	c.options(a, cmd)
	flags := cmd.Flags()
	flags.BoolVar(&c.dryRun, "dry-run", false, "only say what would be done, or why it would be refused")
	flags.BoolVar(&c.detach, "detach", false, "return when the operation has begun")
	flags.StringVar(&c.req.RequestId, "request-id", "", "makes repeating the command safe, for 30 days")
	noFiles(cmd, "request-id")
	return cmd
}

// options are the flags of what a snapshot is like.
func (c *creation) options(a *app, cmd *cobra.Command) {
	c.freezing.flags(cmd)
	flags := cmd.Flags()
	flags.StringVar(&c.req.Profile, "profile", "", "take what is not given here from this `profile` of vmsnapd's configuration")
	flags.StringArrayVar(&c.req.Disks, "disk", nil, "take only this `disk`; may be repeated")
	flags.StringArrayVar(&c.req.Exclude, "exclude", nil, "leave out this `disk`; may be repeated")
	flags.Var(&c.quiesce, "quiesce", "freeze the guest: require, prefer or none (default prefer, with --memory none)")
	flags.BoolVar(&c.req.Memory, "memory", false, "save the guest's memory too")
	flags.Var(&c.strategy, "memory-strategy", "how to save it: background, precopy or stopped (default: the best that works)")
	flags.StringVar(&c.expireAfter, "expire-after", "", "delete the snapshot when it is of this `age`, such as 7d or 12h")
	flags.DurationVar(&c.maxPause, "max-pause", 0, "refuse if the guest would stand still for longer, warn if it did")
	flags.BoolVar(&c.req.Compress, "compress", false, "compress the memory once it is saved")
	flags.StringVar(&c.req.Description, "description", "", "what the snapshot is for")
	flags.StringArrayVar(&c.labels, "label", nil, "a label, `key=value`; may be repeated")
	flags.BoolVar(&c.req.Strict, "strict", false, "refuse when there is a warning")
	flags.BoolVar(&c.req.AllowPartial, "allow-partial", false, "let a disk that fails drop out, and exit with 3")
	noFiles(cmd, "profile", "description", "label", "max-pause")
	must(cmd.RegisterFlagCompletionFunc("memory-strategy", cobra.FixedCompletions([]string{"background", "precopy", "stopped"}, cobra.ShellCompDirectiveNoFileComp)))
	must(cmd.RegisterFlagCompletionFunc("quiesce", cobra.FixedCompletions([]string{"require", "prefer", "none"}, cobra.ShellCompDirectiveNoFileComp)))
	must(cmd.RegisterFlagCompletionFunc("disk", a.completing(a.completeDisks)))
	must(cmd.RegisterFlagCompletionFunc("exclude", a.completing(a.completeDisks)))
}

// complete puts the request together from the command line.
func (c *creation) complete(cmd *cobra.Command, args []string) error {
	if c.dryRun && c.detach {
		return usage(cmd, "--dry-run and --detach exclude each other")
	}
	if err := c.take(cmd); err != nil {
		return err
	}
	c.req.Vm = args[0]
	if len(args) > 1 {
		c.req.Name = args[1]
	}
	if c.req.RequestId == "" {
		c.req.RequestId = rand.Text()
	}
	return nil
}

// take puts the options together.
func (c *creation) take(cmd *cobra.Command) error {
	if err := c.freezing.check(cmd); err != nil {
		return err
	}
	for _, name := range []string{"memory-strategy", "max-pause", "compress"} {
		if cmd.Flags().Changed(name) && !c.req.GetMemory() && c.req.GetProfile() == "" {
			return usage(cmd, "--%s is about memory: give --memory too", name)
		}
	}
	if cmd.Flags().Changed("max-pause") && c.maxPause <= 0 {
		return usage(cmd, "--max-pause must be more than zero")
	}
	expireAfter, err := parseAge(c.expireAfter)
	if err != nil || cmd.Flags().Changed("expire-after") && expireAfter <= 0 {
		return usage(cmd, "--expire-after: %q is not an age such as 7d or 12h", c.expireAfter)
	}
	labels, err := parseLabels(cmd, c.labels)
	if err != nil {
		return err
	}
	c.req.Labels = labels
	c.req.Quiesce = quiesces[c.quiesce]
	c.req.MemoryStrategy = strategies[c.strategy]
	c.req.MaxPause = optional(c.maxPause)
	c.req.ExpireAfter = optional(expireAfter)
	c.req.Mountpoints = c.freezing.mountpoints
	c.req.FreezeTimeout = optional(c.freezing.timeout)
	c.req.Lease = optional(c.freezing.lease)
	return nil
}

// plan prints what a snapshot would do, and fails as it would.
func (a *app) plan(req *vmsnapv1.CreateSnapshotRequest) error {
	ctx, cancel := context.WithTimeout(a.asked, planTimeout)
	defer cancel()
	res, err := a.client().Snapshots().PlanSnapshot(ctx, connect.NewRequest(req))
	if err != nil {
		return err
	}
	plan := res.Msg.GetPlan()
	if err := a.print(planResult(plan)); err != nil {
		return err
	}
	return blocked(plan.GetBlockers())
}

// blocked fails as what is planned would.
func blocked(blockers []*vmsnapv1.Error) error {
	if len(blockers) == 0 {
		return nil
	}
	return &exitError{
		code:    blockers[0].GetCode(),
		message: "would be refused: " + blockers[0].GetMessage(),
		hint:    blockers[0].GetHint(),
	}
}

// create takes a snapshot and stays with it to its end.
func (a *app) create(c *creation) error {
	daemon := a.client()
	began, err := a.begin(c.req.GetRequestId(), func(ctx context.Context) (*vmsnapv1.Operation, error) {
		res, err := daemon.Snapshots().CreateSnapshot(ctx, connect.NewRequest(&c.req))
		if err != nil {
			return nil, err
		}
		return res.Msg.GetOperation(), nil
	})
	if err != nil {
		return err
	}
	if c.detach {
		return a.print(begunResult(began))
	}
	operation, err := a.stay(daemon, began)
	if err != nil {
		return err
	}
	if operation.GetSnapshotId() == "" {
		return fmt.Errorf("operation %s succeeded without a snapshot", operation.GetId())
	}
	ctx, cancel := context.WithTimeout(a.forced, callTimeout)
	defer cancel()
	res, err := daemon.Snapshots().GetSnapshot(ctx, connect.NewRequest(&vmsnapv1.GetSnapshotRequest{Snapshot: operation.GetSnapshotId()}))
	if err != nil {
		return fmt.Errorf("the snapshot %s was taken: %w", operation.GetSnapshotId(), err)
	}
	snapshot := res.Msg.GetSnapshot()
	a.warn(snapshot.GetWarnings())
	if err := a.print(takenResult(snapshot)); err != nil {
		return err
	}
	if !operation.GetPartial() {
		return nil
	}
	why := "a disk that was asked for dropped out"
	if !snapshot.GetPartial() {
		why = "it is whole, but a hook that counts has failed"
	}
	return &exitError{
		code:    vmsnapv1.ErrorCode_ERROR_CODE_PARTIAL,
		message: fmt.Sprintf("%s is partial: %s", snapshotName(snapshot), why),
	}
}

// begunResult shows an operation that goes on by itself.
func begunResult(o *vmsnapv1.Operation) result {
	r := operationResult(o)
	r.human = func(p page, _ bool) error {
		p.line("operation %s has begun; vmsnap operation watch %s stays with it", o.GetId(), o.GetId())
		return nil
	}
	return r
}

// begin starts an operation. An interrupt does not cut it off, since then nobody
// would know whether there is an operation to cancel.
func (a *app) begin(requestID string, call func(context.Context) (*vmsnapv1.Operation, error)) (*vmsnapv1.Operation, error) {
	ctx, cancel := context.WithTimeout(a.forced, callTimeout)
	defer cancel()
	operation, err := call(ctx)
	if err == nil || !client.OutcomeUnknown(err) {
		return operation, err
	}
	code, message, _ := explain(err)
	return nil, &exitError{
		code:    code,
		message: message,
		hint:    "it may have begun all the same; the same command with --request-id " + requestID + " finds out",
		err:     err,
	}
}

// takenResult shows a snapshot that was just taken.
func takenResult(s *vmsnapv1.Snapshot) result {
	r := snapshotResult(s)
	detail := r.human
	r.human = func(p page, wide bool) error {
		if wide {
			return detail(p, wide)
		}
		text := fmt.Sprintf("%s taken, %s consistent", snapshotName(s), word(s.GetConsistency()))
		if m := s.GetMemory(); m != nil {
			text += fmt.Sprintf(", %s of memory saved with a pause of %s", size(m.GetSize()), brief(m.GetPause().AsDuration()))
		}
		if q := s.GetQuiesce(); q.GetFreezeWindow() != nil {
			text += fmt.Sprintf(", %d of %d file systems frozen for %s", q.GetFrozen(), q.GetTotal(), windowText(q))
		} else if q.GetReason() != "" {
			text += ", not frozen: " + q.GetReason()
		}
		p.line("%s", text)
		return nil
	}
	return r
}
