package main

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/vmsnap/vmsnap/agent"
	"github.com/vmsnap/vmsnap/agent/catalog"
	"github.com/vmsnap/vmsnap/agent/rpc/rpctest"
)

// planted adds snapshots of a VM, the oldest first: each "NAME" or "NAME<PARENT",
// "…!" for the one where the VM is now, "…?" for one that it previews, and "…~" for
// an automatic one.
func planted(b *rpctest.Backend, vm string, snapshots ...string) {
	for i, text := range snapshots {
		text, automatic := strings.CutSuffix(text, "~")
		text, previewed := strings.CutSuffix(text, "?")
		text, here := strings.CutSuffix(text, "!")
		here = here || previewed
		name, parent, _ := strings.Cut(text, "<")
		s := agent.SnapshotView{
			Snapshot: catalog.Snapshot{
				ID: vm + name, VMID: "id-" + vm, VMName: vm, Name: name, Consistency: catalog.Crash,
				Created: rpctest.Now.Add(time.Duration(i-len(snapshots)) * time.Hour), Automatic: automatic,
			},
			Space: &agent.SnapshotSpace{Exclusive: uint64(i) << 20},
		}
		if parent != "" {
			s.Parent = vm + parent
		}
		if here {
			s.Here, s.Previewed = &agent.Position{Parent: s.ID}, previewed
		}
		b.AddSnapshot(s)
	}
}

func TestTree(t *testing.T) {
	wide := func(b *rpctest.Backend) {
		var many []string
		for i := range 30 {
			name := fmt.Sprintf("s%d", i)
			if i > 0 {
				name += fmt.Sprintf("<s%d", i-1)
			}
			many = append(many, name)
		}
		planted(b, "deep", many...)
	}
	for name, c := range map[string]struct {
		line  string
		setup func(*rpctest.Backend)
	}{
		"tree":          {"snapshot list --tree", nil},
		"tree-json":     {"snapshot list datenbank-東京 --tree -o json", nil},
		"tree-name":     {"snapshot list --tree -o name", nil},
		"tree-headless": {"snapshot list web --tree --no-header", nil},
		"tree-sorted":   {"snapshot list --tree --sort name", nil},
		"tree-branches": {"snapshot list --tree", func(b *rpctest.Backend) {
			planted(b, "web", "a", "b<a", "c<b", "d<a", "e<d!", "f<a", "other", "g<other")
		}},
		"tree-restored": {"snapshot list --tree", func(b *rpctest.Backend) { planted(b, "web", "a!", "b<a", "c<b~") }},
		"tree-preview":  {"snapshot list --tree", func(b *rpctest.Backend) { planted(b, "web", "a?", "b<a") }},
		"tree-nowhere":  {"snapshot list --tree", func(b *rpctest.Backend) { planted(b, "web", "a", "b<a") }},
		// A catalog that has gone mad loses no snapshot.
		"tree-circle": {"snapshot list --tree", func(b *rpctest.Backend) { planted(b, "web", "a<c", "b<a", "c<b", "d<gone", "e<e") }},
		"tree-deep":   {"snapshot list --tree", wide},
	} {
		t.Run(name, func(t *testing.T) {
			b := rpctest.Sample()
			if c.setup != nil {
				b = rpctest.NewBackend()
				c.setup(b)
			}
			socket := serve(t, b)
			args := strings.Fields(c.line)
			golden(t, name, socket, args, command(t, socket, args...))
		})
	}
}
