package blockdev

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
)

// LostDataError means that a job has copied, and what it copied cannot be found
// in the file that it was to get into.
type LostDataError struct {
	Path  string // the file
	Bytes uint64 // how much of the dropped layers' data it lacks
}

func (e *LostDataError) Error() string {
	return fmt.Sprintf("%s lacks %d bytes that were copied into it", e.Path, e.Bytes)
}

// makeDurable makes what the job has copied durable, before a header is changed
// that until now leads to it elsewhere. QEMU does not: it keeps the tables of a
// qcow2 in memory until somebody flushes it, and writes the header at once. A
// QEMU that is killed then loses all that was copied (tried on 7.2 and 10.0).
//
// There is no command for it, so QEMU's monitor for humans is told to. It answers
// nothing, so the tables are compared.
func (r relink) makeDurable(ctx context.Context, m Monitor) (err error) {
	g, err := ReadGraph(ctx, m)
	if err != nil {
		return err
	}
	into, err := g.layer(r.into)
	if err != nil {
		return err
	}
	path := pathOf(r.pid, into.Filename)
	// Opened before the flush, it learns of each error in writing since.
	f, err := openImage(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := syncWithin(ctx, f); err != nil { // the most of it, which QEMU need not wait for
		return err
	}
	if err := flushNode(ctx, m, r.into); err != nil {
		return err
	}
	if err := syncWithin(ctx, f); err != nil {
		return err
	}
	if into.Node.Driver == "raw" {
		return nil // it has no tables
	}
	for _, node := range r.drop {
		from, err := g.layer(node)
		if err != nil {
			return err
		}
		lost, err := uncopied(ctx, pathOf(r.pid, from.Filename), from.Node.Driver, path, into.Node.Driver)
		if err != nil {
			return fmt.Errorf("compare %s with %s: %w", from.Filename, into.Filename, err)
		}
		if lost > 0 {
			return &LostDataError{into.Filename, lost}
		}
	}
	return nil
}

// uncopied returns how many bytes of data one image holds that the other lacks.
func uncopied(ctx context.Context, from, fromFormat, into, intoFormat string) (lost uint64, err error) {
	err = readRuns(ctx, from, fromFormat, func(old iter.Seq2[run, error]) error {
		return readRuns(ctx, into, intoFormat, func(got iter.Seq2[run, error]) error {
			lost, err = missing(old, got)
			return err
		})
	})
	return lost, err
}

// flushNode makes QEMU write what it keeps of an image in its memory.
func flushNode(ctx context.Context, m Monitor, node string) error {
	var answer string
	err := m.Execute(ctx, "human-monitor-command", map[string]any{"command-line": "qemu-io " + node + " flush"}, &answer)
	if err == nil && answer != "" {
		err = errors.New(answer)
	}
	if err != nil {
		return fmt.Errorf("flush node %s: %w", node, err)
	}
	return nil
}

// syncHeader makes the changed header durable, before the layer goes that it
// named until now.
func (r relink) syncHeader(ctx context.Context, m Monitor) error {
	g, err := ReadGraph(ctx, m)
	if err != nil {
		return err
	}
	above, err := g.layer(r.above.Node)
	if err != nil {
		return err
	}
	f, err := openImage(pathOf(r.pid, above.Filename))
	if err != nil {
		return err
	}
	return errors.Join(syncWithin(ctx, f), f.Close())
}

// syncWithin waits for a sync as long as the context lasts. The file must not be
// closed before the sync is through; the kernel keeps it for that long.
func syncWithin(ctx context.Context, f *os.File) error {
	done := make(chan error, 1)
	go func() { done <- f.Sync() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
