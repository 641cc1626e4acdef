package blockdev

import (
	"context"
	"fmt"
	"path"
	"strings"

	"github.com/vmsnap/vmsnap/monitor"
)

// Monitor executes QMP commands and delivers events. *monitor.Session is one.
type Monitor interface {
	Execute(ctx context.Context, command string, args, result any) error
	Subscribe(buffer int, names ...string) *monitor.Subscription
}

// Node is a node of QEMU's block graph.
type Node struct {
	Name         string
	Driver       string // "qcow2", "raw", "file", "host_device", "throttle", …
	Filename     string // as QEMU opened it; relative to QEMU's directory when not absolute
	ReadOnly     bool
	Encrypted    bool
	VirtualSize  uint64 // bytes
	Cache        Cache
	DetectZeroes string // "off", "on" or "unmap"
	// WriteThreshold is SetWriteThreshold's, 0 once QEMU has told of it.
	WriteThreshold uint64
	children       map[string]string
	parents        []string
}

// Cache is how a node uses the host's page cache. Overlays do not inherit it.
type Cache struct {
	Direct  bool `json:"direct"`
	NoFlush bool `json:"no-flush"`
}

// Child returns the name of the child in a role ("file", "backing"), or "".
func (n *Node) Child(role string) string { return n.children[role] }

// Parents returns the names of the nodes and devices that use the node.
func (n *Node) Parents() []string { return n.parents }

// filter reports whether the node passes data through unchanged, so that the
// layer to cut lies below it.
func (n *Node) filter() bool {
	switch n.Driver {
	case "throttle", "copy-on-read", "compress", "preallocate", "blkdebug", "blklogwrites":
		return true
	}
	return false
}

// job reports whether the node was inserted by a block job.
func (n *Node) job() bool {
	switch n.Driver {
	case "commit_top", "mirror_top", "backup-top", "cbw", "copy-before-write":
		return true
	}
	return false
}

// Graph is QEMU's block graph at one moment.
type Graph struct {
	Nodes  map[string]*Node
	drives []Drive
	jobs   map[string]string // node in use by a job -> the job
}

// namedNode is an element of query-named-block-nodes{flat:true} and, as
// "inserted", of query-block (qapi/block-core.json, BlockDeviceInfo).
type namedNode struct {
	NodeName     string `json:"node-name"`
	Driver       string `json:"drv"`
	File         string `json:"file"`
	ReadOnly     bool   `json:"ro"`
	Encrypted    bool   `json:"encrypted"`
	DetectZeroes string `json:"detect_zeroes"`
	Cache        Cache  `json:"cache"`
	Group        string `json:"group"` // throttle group
	Threshold    uint64 `json:"write_threshold"`
	Image        struct {
		VirtualSize uint64 `json:"virtual-size"`
	} `json:"image"`
}

// blockInfo is an element of query-block (qapi/block-core.json, BlockInfo).
type blockInfo struct {
	Device    string     `json:"device"`
	QDev      string     `json:"qdev"`
	Removable bool       `json:"removable"`
	IOStatus  string     `json:"io-status"` // absent for devices that do not stop the guest
	Inserted  *namedNode `json:"inserted"`
}

// debugGraph is x-debug-query-block-graph's answer: the one command, on every
// supported version, that names the edges.
type debugGraph struct {
	Nodes []struct {
		ID   uint64 `json:"id"`
		Name string `json:"name"`
		Type string `json:"type"`
	} `json:"nodes"`
	Edges []struct {
		Parent uint64 `json:"parent"`
		Child  uint64 `json:"child"`
		Name   string `json:"name"`
	} `json:"edges"`
}

// ReadGraph asks QEMU for its block graph. Four commands, no effect.
func ReadGraph(ctx context.Context, m Monitor) (*Graph, error) {
	var (
		named  []namedNode
		blocks []blockInfo
		debug  debugGraph
		jobs   []struct {
			Device string `json:"device"` // the job's id
			Type   string `json:"type"`
		}
	)
	if err := m.Execute(ctx, "query-named-block-nodes", map[string]any{"flat": true}, &named); err != nil {
		return nil, err
	}
	if err := m.Execute(ctx, "query-block", nil, &blocks); err != nil {
		return nil, err
	}
	if err := m.Execute(ctx, "x-debug-query-block-graph", nil, &debug); err != nil {
		return nil, err
	}
	if err := m.Execute(ctx, "query-block-jobs", nil, &jobs); err != nil {
		return nil, err
	}
	g := &Graph{Nodes: make(map[string]*Node, len(named)), jobs: map[string]string{}}
	for _, n := range named {
		g.Nodes[n.NodeName] = &Node{
			Name: n.NodeName, Driver: n.Driver, Filename: n.File, ReadOnly: n.ReadOnly, Encrypted: n.Encrypted,
			VirtualSize: n.Image.VirtualSize, Cache: n.Cache, DetectZeroes: n.DetectZeroes, WriteThreshold: n.Threshold,
			children: map[string]string{},
		}
	}
	g.link(debug, jobs)
	for _, b := range blocks {
		if d, ok := newDrive(b); ok {
			d.Throttled = d.Throttled || g.throttled(d)
			g.drives = append(g.drives, d)
		}
	}
	return g, nil
}

// link adds the edges to the nodes, and which nodes the block jobs use.
func (g *Graph) link(debug debugGraph, jobs []struct {
	Device string `json:"device"`
	Type   string `json:"type"`
}) {
	type vertex struct{ name, kind string }
	byID := make(map[uint64]vertex, len(debug.Nodes))
	for _, n := range debug.Nodes {
		byID[n.ID] = vertex{n.Name, n.Type}
	}
	for _, e := range debug.Edges {
		parent, child := byID[e.Parent], byID[e.Child]
		node := g.Nodes[child.name]
		if child.kind != "block-driver" || node == nil {
			continue
		}
		node.parents = append(node.parents, parent.name)
		if parent.kind == "block-driver" {
			if p := g.Nodes[parent.name]; p != nil {
				p.children[e.Name] = child.name
			}
		}
		if parent.kind == "block-job" {
			g.jobs[child.name] = parent.name
		}
	}
	// A job that hides its edges is still known by its id.
	for _, j := range jobs {
		if n := g.Nodes[j.Device]; n != nil {
			g.jobs[n.Name] = j.Device
		}
	}
}

// Drive is a guest device with a medium.
type Drive struct {
	Device    string // the label: qdev id, else drive id, else node name
	QDev      string // QOM path or id of the guest device; empty when it has none
	Backend   string // the drive id of -drive; empty with -blockdev
	Root      string // the node that the device uses
	ReadOnly  bool
	Removable bool
	Throttled bool
	Failed    Stop // why a request of the guest has failed, since the guest was last resumed
	// Unnamed means that neither the device nor a -drive has a name: Device is
	// that of the root, and changes when the root does.
	Unnamed bool
}

// newDrive reads one element of query-block. Devices without a medium and
// backends without a device are no drives.
func newDrive(b blockInfo) (Drive, bool) {
	if b.Inserted == nil || b.QDev == "" && b.Device == "" {
		return Drive{}, false
	}
	d := Drive{
		QDev: b.QDev, Backend: b.Device, Root: b.Inserted.NodeName,
		ReadOnly: b.Inserted.ReadOnly, Removable: b.Removable, Throttled: b.Inserted.Group != "",
	}
	if b.IOStatus != "ok" {
		d.Failed = Stop(b.IOStatus)
	}
	d.Device, d.Unnamed = label(b)
	return d, true
}

// label chooses the name by which operators know a drive. QEMU gives a qdev
// either as the id given on the command line or as a QOM path such as
// /machine/peripheral/ID/virtio-backend; an anonymous device has no id.
func label(b blockInfo) (name string, unnamed bool) {
	if !strings.HasPrefix(b.QDev, "/") && b.QDev != "" {
		return b.QDev, false
	}
	if rest, ok := strings.CutPrefix(b.QDev, "/machine/peripheral/"); ok {
		id, _, _ := strings.Cut(rest, "/")
		return id, false
	}
	if b.Device != "" {
		return b.Device, false
	}
	if b.Inserted.NodeName != "" && !strings.HasPrefix(b.Inserted.NodeName, "#") {
		return b.Inserted.NodeName, true
	}
	return path.Base(b.Inserted.File), true
}

// Drives returns the drives in QEMU's order.
func (g *Graph) Drives() []Drive { return g.drives }

// Layer is one image of a drive's chain: a format node on a protocol node.
type Layer struct {
	Node     *Node
	File     *Node // nil when the format node has no protocol node of its own
	Filename string
}

// Chain returns the layers of a drive, the active one first. Filters are
// passed through.
func (g *Graph) Chain(d Drive) ([]Layer, error) {
	var chain []Layer
	seen := map[string]bool{}
	name := d.Root
	for name != "" {
		if seen[name] {
			return nil, fmt.Errorf("block graph of %s: node %s is its own ancestor", d.Device, name)
		}
		seen[name] = true
		n := g.Nodes[name]
		if n == nil {
			return nil, fmt.Errorf("block graph of %s: QEMU does not describe node %s", d.Device, name)
		}
		if n.filter() || n.job() {
			name = n.passThrough()
			continue
		}
		l := Layer{Node: n, Filename: n.Filename}
		if f := g.Nodes[n.Child("file")]; f != nil {
			l.File, l.Filename = f, f.Filename
		}
		chain = append(chain, l)
		name = n.Child("backing")
	}
	if len(chain) == 0 {
		return nil, fmt.Errorf("block graph of %s: no layer", d.Device)
	}
	return chain, nil
}

// throttled reports whether one of the filters above the drive's active layer
// limits its I/O, as it is done with -blockdev.
func (g *Graph) throttled(d Drive) bool {
	n := g.Nodes[d.Root]
	for range len(g.Nodes) {
		if n == nil || !n.filter() && !n.job() {
			return false
		}
		if n.Driver == "throttle" {
			return true
		}
		n = g.Nodes[n.passThrough()]
	}
	return false
}

// passThrough returns the child that a filter shows.
func (n *Node) passThrough() string {
	if c := n.Child("file"); c != "" {
		return c
	}
	return n.Child("backing")
}

// Job returns the block job that uses the drive's chain, or "".
func (g *Graph) Job(d Drive) string {
	name := d.Root
	for range len(g.Nodes) + 1 {
		n := g.Nodes[name]
		if n == nil {
			return ""
		}
		if j := g.jobs[name]; j != "" {
			return j
		}
		if n.job() {
			return n.Name
		}
		if name = n.Child("backing"); name == "" {
			name = n.passThrough()
		}
	}
	return ""
}
