package blockdev

import (
	"context"
	"errors"
	"fmt"

	"github.com/vmsnap/vmsnap/monitor"
)

// Commit folds a layer that another one lies on into the layer below it, while
// the disk runs (block-commit in qapi/block-core.json). It ends by itself: the
// layer above then names the base in its header and in QEMU.
//
// As with ActiveMerge the base must be taken for no restore point any more
// before, and nothing else may lie on it. The files of the base and of the layer
// above must be open to writing.
type Commit struct {
	Job
	Above       Target // the layer whose backing is changed
	Top         string // format node of the layer that is folded
	Base        Target
	BackingName string // permanent name of the base, for the header above
	PID         int    // of QEMU
}

// Run merges, or goes on with the job of this id, or with what was left to do
// after it. It returns nil if and only if the merge is done, durably, and the nodes
// of the top are gone. When ctx ends the job is cancelled: the chain reads as before
// (ErrNotMerged). ErrLeaveJob and ErrJobUnfinished are as with ActiveMerge.
func (c Commit) Run(ctx context.Context, m Monitor) error {
	if err := c.relink().run(ctx, m); err != nil {
		return fmt.Errorf("merge %s into %s: %w", c.Top, c.Base.Node, err)
	}
	return nil
}

// Abandon cancels the job that an earlier process has left. A merge that has
// happened is finished instead, and merged is true.
func (c Commit) Abandon(ctx context.Context, m Monitor) (merged bool, err error) {
	return c.relink().abandon(ctx, m)
}

func (c Commit) relink() relink {
	return relink{
		Job: c.Job, command: "block-commit", above: c.Above, drop: []string{c.Top}, below: c.Base.Node, into: c.Base.Node,
		written: []Target{c.Above, c.Base}, pid: c.PID,
		args: map[string]any{"top-node": c.Top, "base-node": c.Base.Node, "backing-file": c.BackingName, "auto-dismiss": false},
	}
}

// Stream copies into a layer what the layers below it hold for it, so that it
// does not need them any more (block-stream in qapi/block-core.json). What the
// layer reads as does not change, and no other layer is written to.
//
// The file of the layer must be open to writing.
type Stream struct {
	Job
	Into        Target
	Drop        []string // format nodes below it, from the top, that it shall not need
	Below       string   // format node that it lies on afterwards; empty for none
	BackingName string   // permanent name of that, for the header; empty for none
	PID         int      // of QEMU
}

// Run streams, or goes on with the job of this id, or with what was left to do
// after it. It returns nil if and only if the layer lies on Below, durably, and the
// nodes of Drop are gone. When ctx ends the job is cancelled (ErrNotMerged), and
// the layer keeps what it has got. ErrLeaveJob and ErrJobUnfinished are as with
// ActiveMerge.
func (s Stream) Run(ctx context.Context, m Monitor) error {
	if err := s.relink().run(ctx, m); err != nil {
		return fmt.Errorf("stream into %s: %w", s.Into.Node, err)
	}
	return nil
}

// Abandon cancels the job that an earlier process has left. One that has done
// its work is finished instead, and merged is true.
func (s Stream) Abandon(ctx context.Context, m Monitor) (merged bool, err error) {
	return s.relink().abandon(ctx, m)
}

func (s Stream) relink() relink {
	// A job that has streamed and was not dismissed is fatal: QEMU (7.2 and 10.0)
	// crashes at query-named-block-nodes, which anybody may ask at any time. So it
	// goes by itself; what came of it is seen in the graph.
	args := map[string]any{"device": s.Into.Node, "auto-dismiss": true}
	setIf(args, "base-node", s.Below)
	setIf(args, "backing-file", s.BackingName)
	return relink{
		Job: s.Job, command: "block-stream", above: s.Into, drop: s.Drop, below: s.Below, into: s.Into.Node,
		written: []Target{s.Into}, pid: s.PID, args: args,
	}
}

// relink is a job at whose end one layer lies on another than before.
type relink struct {
	Job
	command string
	args    map[string]any
	above   Target
	drop    []string // the nodes between
	below   string
	into    string // the node that the data goes to
	written []Target
	pid     int
}

func (r relink) run(ctx context.Context, m Monitor) error {
	_, err := FindJob(ctx, m, r.ID)
	if errors.Is(err, ErrNoJob) {
		g, err := ReadGraph(ctx, m)
		if err != nil {
			return err
		}
		if linked, err := r.linked(g); err != nil {
			return err
		} else if linked {
			return r.cleanUp(ctx, m)
		}
		if err := r.begin(ctx, m, g); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	s, err := r.await(ctx, m, monitor.JobPending)
	if err == nil && s.Status == monitor.JobPending {
		if err = r.makeDurable(ctx, m); err == nil {
			s, err = r.finalize(ctx, m)
		}
	}
	return r.settle(ctx, m, s, err, func(ctx context.Context) (bool, error) { return r.conclude(ctx, m) })
}

func (r relink) abandon(ctx context.Context, m Monitor) (merged bool, err error) {
	_, err = r.cancel(ctx, m)
	if err == nil || errors.Is(err, ErrNoJob) {
		merged, err = r.conclude(context.WithoutCancel(ctx), m)
	}
	if err != nil {
		return merged, fmt.Errorf("abandon job %s: %w", r.ID, err)
	}
	return merged, nil
}

// linked reports whether the layer lies on what it shall lie on already.
func (r relink) linked(g *Graph) (bool, error) {
	chain, err := g.chainWith(r.above.Node)
	if err != nil {
		return false, err
	}
	return chain.below(r.above.Node) == r.below, nil
}

// begin verifies the chain, opens what is written to, and starts the job.
func (r relink) begin(ctx context.Context, m Monitor, g *Graph) error {
	chain, err := g.chainWith(r.above.Node)
	if err != nil {
		return err
	}
	at := r.above.Node
	for _, next := range append(r.drop[:len(r.drop):len(r.drop)], r.below) {
		if chain.below(at) != next {
			return fmt.Errorf("node %s does not lie on node %s", at, next)
		}
		at = next
	}
	for _, t := range r.written {
		l, err := g.layer(t.Node)
		if err != nil {
			return err
		}
		if err := t.verifyName(r.pid, l); err != nil {
			return err
		}
	}
	for _, t := range r.written {
		if err := t.reopen(ctx, m, g, false); err != nil {
			return errors.Join(err, r.protect(ctx, m))
		}
	}
	if _, ok := r.args["device"]; !ok {
		r.args["device"] = chain.drive.Root
	}
	err = r.start(ctx, m, r.command, r.args)
	if refused(err) {
		return errors.Join(err, r.protect(ctx, m))
	}
	return err
}

// conclude finds out what came of a job that has ended, or was dismissed.
func (r relink) conclude(ctx context.Context, m Monitor) (merged bool, err error) {
	g, err := ReadGraph(ctx, m)
	if err != nil {
		return false, fmt.Errorf("job %s: %w: %w", r.ID, ErrJobUnfinished, err)
	}
	if merged, err = r.linked(g); err != nil {
		return false, err
	}
	if err := r.dismiss(ctx, m); err != nil {
		return merged, err
	}
	if merged {
		return true, r.cleanUp(ctx, m)
	}
	return false, r.protect(ctx, m)
}

// cleanUp removes the nodes that are needed no more.
func (r relink) cleanUp(ctx context.Context, m Monitor) error {
	ctx = context.WithoutCancel(ctx)
	if err := r.syncHeader(ctx, m); err != nil {
		return err
	}
	for _, node := range r.drop { // each is in use until the one above is gone
		if err := dropLayer(ctx, m, node); err != nil {
			return err
		}
	}
	return r.protect(ctx, m)
}

// protect makes what was written to read-only again in QEMU, but for an active
// layer.
func (r relink) protect(ctx context.Context, m Monitor) error {
	ctx = context.WithoutCancel(ctx)
	g, err := ReadGraph(ctx, m)
	if err != nil {
		return err
	}
	var errs []error
	for _, t := range r.written {
		if _, err := g.driveOn(t.Node); err != nil {
			errs = append(errs, t.reopen(ctx, m, g, true))
		}
	}
	return errors.Join(errs...)
}

// driveChain is a drive with its layers, the active one first.
type driveChain struct {
	drive  Drive
	layers []Layer
}

// chainWith returns the chain that a format node is in.
func (g *Graph) chainWith(node string) (driveChain, error) {
	for _, d := range g.Drives() {
		chain, err := g.Chain(d)
		if err != nil {
			continue
		}
		for _, l := range chain {
			if l.Node.Name == node {
				return driveChain{d, chain}, nil
			}
		}
	}
	return driveChain{}, fmt.Errorf("node %s is in no drive's chain", node)
}

// below returns the format node that a layer of the chain lies on, or "".
func (c driveChain) below(node string) string {
	for i, l := range c.layers[:len(c.layers)-1] {
		if l.Node.Name == node {
			return c.layers[i+1].Node.Name
		}
	}
	return ""
}
