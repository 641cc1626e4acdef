package blockdev_test

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/vmsnap/vmsnap/blockdev"
	"github.com/vmsnap/vmsnap/internal/testvm"
)

// fourLayers is a base with three overlays: each hides a part of the one below,
// and leaves another part of it to be seen.
func fourLayers(t *testing.T, q testvm.QEMU, format string, restart bool) *stack {
	t.Helper()
	s := newStack(t, q, "drive", format, "")
	s.write(write{1, 0, 64})
	for i := range 3 {
		s.cover()
		s.write(write{2 + i, 16 * (i + 1), 64})
	}
	if restart {
		s.restart()
	}
	return s
}

// unlinked takes a layer out of the stack that the one above it no longer needs,
// and verifies all the others.
func (s *stack) unlinked(layer int) {
	s.t.Helper()
	gone := s.layers[layer]
	s.remove(layer)
	s.noJob()
	g := s.graph()
	c := s.chain(g, "a")
	if len(c) != len(s.layers) {
		s.t.Errorf("QEMU has %d layers and not %d", len(c), len(s.layers))
	}
	for i, path := range s.layers {
		s.holds(i, "after "+gone+" is gone")
		l := c[len(c)-1-i]
		if s.fileID(l.Filename) != s.fileID(path) {
			s.t.Errorf("layer %d in QEMU is %s and not %s", i, l.Filename, path)
		}
		if active := i == len(s.layers)-1; l.Node.ReadOnly == active {
			s.t.Errorf("in QEMU %s is read-only: %v", path, l.Node.ReadOnly)
		}
		s.backing(i)
	}
	for _, n := range g.Nodes {
		if strings.Contains(n.Filename, gone) {
			s.t.Errorf("QEMU still has node %s for %s", n.Name, gone)
		}
	}
}

// backing verifies what a layer's header names.
func (s *stack) backing(layer int) {
	s.t.Helper()
	if s.format(layer) != "qcow2" {
		return
	}
	h, err := blockdev.ReadHeaderFile(s.layers[layer])
	if err != nil {
		s.t.Fatal(err)
	}
	want, format := "", ""
	if layer > 0 {
		want, format = s.layers[layer-1], s.format(layer-1)
	}
	if h.Backing != want || h.BackingFormat != format {
		s.t.Errorf("%s names %q (%s) as its backing and not %q (%s)", s.layers[layer], h.Backing, h.BackingFormat, want, format)
	}
}

// commit folds a layer into the one below it.
func (s *stack) commit(layer int) blockdev.Commit {
	s.t.Helper()
	s.flag(layer-1, false)
	s.flag(layer+1, false)
	return blockdev.Commit{
		Job: blockdev.Job{ID: "vmsnap-commit"}, Above: s.target(layer + 1), Top: s.node(layer), Base: s.target(layer - 1),
		BackingName: s.layers[layer-1], PID: s.cmd.Process.Pid,
	}
}

// stream gives a layer what it needs of the n layers below it.
func (s *stack) stream(layer, n int) blockdev.Stream {
	s.t.Helper()
	s.flag(layer, false)
	st := blockdev.Stream{Job: blockdev.Job{ID: "vmsnap-stream"}, Into: s.target(layer), PID: s.cmd.Process.Pid}
	for i := range n {
		st.Drop = append(st.Drop, s.node(layer-1-i))
	}
	if below := layer - 1 - n; below >= 0 {
		st.Below, st.BackingName = s.node(below), s.layers[below]
	}
	return st
}

func TestQEMUCommitOfACoveredLayer(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		for _, c := range []struct {
			name, format string
			layer        int
			restart      bool
		}{
			{"below-the-active", "qcow2", 2, false},
			{"in-the-middle", "qcow2", 1, false},
			{"into-raw", "raw", 1, false},
			{"below-the-active-started-again", "qcow2", 2, true},
			{"in-the-middle-started-again", "qcow2", 1, true},
		} {
			t.Run(c.name, func(t *testing.T) {
				s := fourLayers(t, q, c.format, c.restart)
				m := s.commit(c.layer)
				for range 2 { // the second time there is nothing to do
					if err := m.Run(s.ctx(), s); err != nil {
						t.Fatal(err)
					}
				}
				s.patterns[c.layer-1] = s.patterns[c.layer]
				s.unlinked(c.layer)
				s.write(write{9, 3, 200})
				s.restart()
				s.holds(len(s.layers)-1, "started again")
			})
		}
	})
}

func TestQEMUStream(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		for _, c := range []struct {
			name     string
			layer, n int
			restart  bool
		}{
			{"into-the-active", 3, 1, false},
			{"in-the-middle", 2, 1, false},
			{"flatten-the-active", 3, 3, false},
			{"flatten-in-the-middle", 1, 1, false},
			{"into-the-active-started-again", 3, 1, true},
			{"in-the-middle-started-again", 2, 1, true},
			{"flatten-the-active-started-again", 3, 3, true},
		} {
			t.Run(c.name, func(t *testing.T) {
				s := fourLayers(t, q, "qcow2", c.restart)
				m := s.stream(c.layer, c.n)
				for range 2 {
					if err := m.Run(s.ctx(), s); err != nil {
						t.Fatal(err)
					}
				}
				for i := range c.n {
					s.unlinkedOnce(c.layer-1-i, i == c.n-1)
				}
				s.write(write{9, 3, 200})
				s.restart()
				s.holds(len(s.layers)-1, "started again")
			})
		}
	})
}

// unlinkedOnce takes a layer out of the stack, and verifies the stack after the
// last of several.
func (s *stack) unlinkedOnce(layer int, last bool) {
	s.t.Helper()
	if last {
		s.unlinked(layer)
		return
	}
	s.remove(layer)
}

// remove deletes a layer's file.
func (s *stack) remove(layer int) {
	s.t.Helper()
	s.flag(layer, false)
	if err := os.Remove(s.layers[layer]); err != nil {
		s.t.Fatal(err)
	}
	s.layers = slices.Delete(s.layers, layer, layer+1)
	s.ids = slices.Delete(s.ids, layer, layer+1)
	s.patterns = slices.Delete(s.patterns, layer, layer+1)
}

func TestQEMUCommitAndStreamCancelled(t *testing.T) {
	testvm.ForEachQEMU(t, func(t *testing.T, q testvm.QEMU) {
		for _, kind := range []string{"commit", "stream"} {
			t.Run(kind, func(t *testing.T) {
				s := newStack(t, q, "drive", "qcow2", "")
				s.write(write{1, 0, 64})
				s.cover()
				s.write(write{2, 32, 800})
				s.cover()
				s.write(write{3, 900, 8})
				before := s.shape()
				c, st := s.commit(1), s.stream(2, 1)
				c.Speed, st.Speed = slow, slow
				run, job, watch := c.Run, &c.Job, &c.Watch
				if kind == "stream" {
					run, job, watch = st.Run, &st.Job, &st.Watch
				}
				why := errors.New("the operator does not want it any more")
				ctx, cancel := context.WithCancelCause(s.ctx())
				*watch = nil
				wait := begun(t, ctx, s, func(ctx context.Context, m blockdev.Monitor) error {
					if kind == "stream" {
						return st.Run(ctx, m)
					}
					return c.Run(ctx, m)
				}, watch)
				cancel(why)
				if err := wait(); !errors.Is(err, why) || !errors.Is(err, blockdev.ErrNotMerged) {
					t.Errorf("a %s that was cancelled: %v", kind, err)
				}
				s.sameShape(before, "after a cancel")
				s.noJob()
				for i := 1; i < 3; i++ { // the base of a commit is no restore point any more
					s.holds(i, "after a cancel")
					s.backing(i)
				}

				// Left, and adopted by a second run.
				ctx, leave := context.WithCancelCause(s.ctx())
				wait = begun(t, ctx, s, func(ctx context.Context, m blockdev.Monitor) error {
					if kind == "stream" {
						return st.Run(ctx, m)
					}
					return c.Run(ctx, m)
				}, watch)
				leave(blockdev.ErrLeaveJob)
				if err := wait(); !errors.Is(err, blockdev.ErrJobUnfinished) {
					t.Errorf("a %s that was left: %v", kind, err)
				}
				if j, err := blockdev.FindJob(s.ctx(), s, job.ID); err != nil || j.Kind != kind {
					t.Errorf("the job that was left is %+v, %v", j, err)
				}
				if err := blockdev.SetJobSpeed(s.ctx(), s, job.ID, 0); err != nil {
					t.Fatal(err)
				}
				if err := run(s.ctx(), s); err != nil {
					t.Fatal(err)
				}
				if kind == "commit" {
					s.patterns[0] = s.patterns[1]
				}
				s.unlinked(1)
			})
		}
	})
}
